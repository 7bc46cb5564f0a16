"""The book of pages: nothing is lent twice, and what is shared is the same."""

import numpy as np
import pytest

from t2x.decode import page_table


@pytest.mark.parametrize('seed', range(4))
def test_pages_hold_what_a_row_was_told(seed):
  """Rows come and go at random; a dict says what each page really holds."""
  rng = np.random.default_rng(seed)
  size = 4
  pages = page_table.Pages(24, size)
  held: dict[int, tuple] = {}  # page -> all tokens up to its end
  rows = []
  num_shared = 0
  for _ in range(400):
    if rows and rng.random() < 0.5:
      tokens, lease = rows.pop(rng.integers(len(rows)))
      pages.release(lease)
      continue
    # Few tokens, so that many texts begin alike.
    tokens = rng.integers(0, 2, rng.integers(1, 20)).tolist()
    length = len(tokens) + int(rng.integers(0, 6))
    free = pages.num_free
    lease = pages.lend(tokens, length)
    if lease is None:
      assert free < pages.needed(length)
      continue
    assert len(lease.pages) == pages.needed(length)
    assert lease.num_shared < len(tokens)
    num_shared += lease.num_shared
    for number in range(lease.num_shared // size):
      assert held[lease.pages[number]] == tuple(tokens[: (number + 1) * size])
    own = lease.pages[lease.num_shared // size :]
    for _, other in rows:  # What is written to is read by nobody else.
      assert not set(own) & set(other.pages)
    for number in range(lease.num_shared // size, len(lease.pages)):
      whole = tokens[: (number + 1) * size]
      held[lease.pages[number]] = tuple(whole)
    pages.fill(lease, tokens[:-1])
    rows.append((tokens, lease))
    used = {page for _, lease in rows for page in lease.pages}
    assert pages.num_used == len(used)
  assert num_shared > 100
  for _, lease in rows:
    pages.release(lease)
  assert pages.num_used == 0


def test_the_oldest_free_page_is_taken_and_one_in_use_never():
  pages = page_table.Pages(3, 2)
  first = pages.lend([1, 2, 3], 3)
  pages.fill(first, [1, 2])
  second = pages.lend([1, 2, 4], 2)  # Shares the only page it needs.
  assert second.pages == first.pages[:1]
  pages.release(first)
  assert pages.num_used == 1  # The second still reads it.
  third = pages.lend([7, 8, 9], 4)
  assert third.num_shared == 0 and pages.lend([5], 1) is None
  pages.release(second)
  pages.release(third)
  assert pages.lend([1, 2, 3], 3).num_shared == 2  # It was not needed since.


def test_a_page_that_was_taken_is_no_longer_found():
  pages = page_table.Pages(2, 2)
  first = pages.lend([1, 2, 3], 4)
  pages.fill(first, [1, 2, 3])
  pages.release(first)
  pages.release(pages.lend([8, 8, 8], 4))
  assert pages.lend([1, 2, 3], 4).num_shared == 0


def test_tokens_after_other_tokens_are_not_the_same():
  """[5, 6] as a second page is found only after what stood before it."""
  pages = page_table.Pages(8, 2)
  first = pages.lend([1, 2, 5, 6, 0], 5)
  pages.fill(first, [1, 2, 5, 6])
  assert pages.lend([3, 4, 5, 6, 0], 5).num_shared == 0
  assert pages.lend([1, 2, 5, 6, 7], 5).num_shared == 4

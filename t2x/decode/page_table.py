"""Page table: the pages of each sequence, and prefix sharing between them.

Nothing here touches a device. A full page is identified by a hash of all tokens
up to its end, so that a sequence with the same prefix finds it (Kwon et al.,
2023; the hash of a page covers that of the page before). Free pages keep their
contents until they are needed, the least recently used first.
"""

import collections
from collections.abc import Sequence
import dataclasses
import hashlib

import numpy as np


@dataclasses.dataclass
class Lease:
  """The pages of one sequence.

  Attributes:
    pages: page of each of its blocks, in order.
    num_shared: number of its first positions that lie in shared pages.
  """

  pages: list[int]
  num_shared: int
  _digests: list[bytes] = dataclasses.field(default_factory=list)


class Pages:
  """A pool of pages, which are lent to sequences.

  >>> pages = Pages(4, 2)
  >>> first = pages.lend([1, 2, 3], 5)
  >>> first.pages, pages.num_free
  ([0, 1, 2], 1)
  >>> pages.fill(first, [1, 2, 3])
  >>> second = pages.lend([1, 2, 9], 4)
  >>> second.pages, second.num_shared
  ([0, 3], 2)
  >>> pages.lend([5], 1) is None
  True
  """

  def __init__(self, num_pages: int, size: int):
    """Creates a pool of free pages.

    Args:
      num_pages: number of pages in the pool.
      size: number of positions in a page.
    """
    self.num_pages, self.size = num_pages, size
    self._num_users = [0] * num_pages
    self._digest: list[bytes | None] = [None] * num_pages
    self._page_of: dict[bytes, int] = {}
    # In the order in which they are reused.
    self._free = collections.OrderedDict.fromkeys(range(num_pages))

  @property
  def num_free(self) -> int:
    """Number of pages that no sequence uses."""
    return len(self._free)

  @property
  def num_used(self) -> int:
    """Number of pages that sequences use."""
    return self.num_pages - len(self._free)

  def needed(self, length: int) -> int:
    """Returns the number of pages for `length` positions."""
    return -(-length // self.size)

  def lend(
    self, prompt: Sequence[int], length: int, share: bool = True
  ) -> Lease | None:
    """Lends pages to a sequence; returns None if too few are free.

    Args:
      prompt: first tokens of the sequence; pages that hold the same prefix are
        shared. The last token is not counted, since it is still to be computed.
      length: number of positions of the whole sequence.
      share: whether to use pages that other sequences have filled.
    """
    digests = self._digests(prompt[: len(prompt) - 1], []) if share else []
    shared = []
    for digest in digests:
      if digest not in self._page_of:
        break
      shared.append(self._page_of[digest])
    num_new = self.needed(length) - len(shared)
    idle = sum(page in self._free for page in shared)
    if num_new > self.num_free - idle:
      return None
    for page in shared:
      self._num_users[page] += 1
      self._free.pop(page, None)
    new = [self._take() for _ in range(num_new)]
    return Lease(
      pages=shared + new,
      num_shared=len(shared) * self.size,
      _digests=digests[: len(shared)],
    )

  def fill(self, lease: Lease, tokens: Sequence[int]) -> None:
    """Records that the keys and values of a sequence's first tokens are there.

    Args:
      lease: lease of the sequence.
      tokens: all its tokens so far whose pages are filled, also those that were
        recorded before.
    """
    known = len(lease._digests)
    lease._digests = self._digests(tokens, lease._digests)
    for digest, page in zip(lease._digests[known:], lease.pages[known:]):
      # If two sequences filled equal pages, the first one is shared.
      if digest not in self._page_of:
        self._page_of[digest] = page
        self._digest[page] = digest

  def release(self, lease: Lease) -> None:
    """Takes back the pages of a sequence; their contents can be shared."""
    # The last pages are reused first: none is of use without those before.
    for page in reversed(lease.pages):
      self._num_users[page] -= 1
      if not self._num_users[page]:
        self._free[page] = None
        if self._digest[page] is None:
          self._free.move_to_end(page, last=False)
    lease.pages = []

  def forget(self) -> None:
    """Makes all pages filled so far unavailable for sharing."""
    self._page_of.clear()
    self._digest = [None] * self.num_pages

  def _take(self) -> int:
    page, _ = self._free.popitem(last=False)
    digest, self._digest[page] = self._digest[page], None
    if digest is not None:
      del self._page_of[digest]
    self._num_users[page] = 1
    return page

  def _digests(self, tokens: Sequence[int], known: list[bytes]) -> list[bytes]:
    """Returns the digest of each page that the tokens fill."""
    result = list(known)
    for number in range(len(known), len(tokens) // self.size):
      part = tokens[number * self.size : (number + 1) * self.size]
      before = result[-1] if result else b''
      data = before + np.asarray(part, np.int32).tobytes()
      result.append(hashlib.sha256(data).digest())
    return result

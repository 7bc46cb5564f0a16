"""Which row has which page, and which pages of one row another one can use.

Nothing here touches a device. A page that is full is known by the tokens that
lead up to its end, so that a text which begins alike finds it (Kwon et al.,
2023; the hash of a page holds that of the page before). Pages that nobody
reads keep what they hold until they are needed, the oldest first.
"""

import collections
from collections.abc import Sequence
import dataclasses
import hashlib

import numpy as np


@dataclasses.dataclass
class Lease:
  """The pages of one row.

  Attributes:
    pages: of its blocks, in order.
    num_shared: positions whose entries were there already.
  """

  pages: list[int]
  num_shared: int
  _digests: list[bytes] = dataclasses.field(default_factory=list)


class Pages:
  """Lends pages of a pool.

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
    """Starts with all of them free.

    Args:
      num_pages: of the pool.
      size: positions of a page.
    """
    self.num_pages, self.size = num_pages, size
    self._readers = [0] * num_pages
    self._digest: list[bytes | None] = [None] * num_pages
    self._page_of: dict[bytes, int] = {}
    # In the order in which they are taken.
    self._free = collections.OrderedDict.fromkeys(range(num_pages))

  @property
  def num_free(self) -> int:
    return len(self._free)

  @property
  def num_used(self) -> int:
    return self.num_pages - len(self._free)

  def needed(self, length: int) -> int:
    """Returns the pages of so many positions."""
    return -(-length // self.size)

  def lend(
    self, prompt: Sequence[int], length: int, share: bool = True
  ) -> Lease | None:
    """Returns pages for a row, or None while too few are free.

    Args:
      prompt: its first tokens; pages that hold entries of the same ones are
        shared, but for the last token, which is yet to be read.
      length: positions in all.
      share: whether it takes pages that others have filled.
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
      self._readers[page] += 1
      self._free.pop(page, None)
    new = [self._take() for _ in range(num_new)]
    return Lease(
      pages=shared + new,
      num_shared=len(shared) * self.size,
      _digests=digests[: len(shared)],
    )

  def fill(self, lease: Lease, tokens: Sequence[int]) -> None:
    """Says that the entries of a row's first tokens are all written.

    Args:
      lease: of the row.
      tokens: from its start; those told before may be among them.
    """
    known = len(lease._digests)
    lease._digests = self._digests(tokens, lease._digests)
    for digest, page in zip(lease._digests[known:], lease.pages[known:]):
      # Where two rows wrote the same, that of the first is found.
      if digest not in self._page_of:
        self._page_of[digest] = page
        self._digest[page] = digest

  def release(self, lease: Lease) -> None:
    """Takes a row's pages back; what they hold can still be shared."""
    # The last ones are taken first: none is of use without those before.
    for page in reversed(lease.pages):
      self._readers[page] -= 1
      if not self._readers[page]:
        self._free[page] = None
        if self._digest[page] is None:
          self._free.move_to_end(page, last=False)
    lease.pages = []

  def forget(self) -> None:
    """Shares nothing of what was told so far."""
    self._page_of.clear()
    self._digest = [None] * self.num_pages

  def _take(self) -> int:
    page, _ = self._free.popitem(last=False)
    digest, self._digest[page] = self._digest[page], None
    if digest is not None:
      del self._page_of[digest]
    self._readers[page] = 1
    return page

  def _digests(self, tokens, known: list[bytes]) -> list[bytes]:
    """Returns one digest for each page that the tokens fill."""
    result = list(known)
    for number in range(len(known), len(tokens) // self.size):
      part = tokens[number * self.size : (number + 1) * self.size]
      before = result[-1] if result else b''
      data = before + np.asarray(part, np.int32).tobytes()
      result.append(hashlib.sha256(data).digest())
    return result

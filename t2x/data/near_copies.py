"""Finding documents that are near copies, by the runs of words they share.

A run is eight words in a row (a shingle; Broder, 1997; used on training data by
Lee et al., 2022). A word is everything between two blanks, as it is written,
with its case and punctuation. In scripts that put no blanks between words,
three characters count as a word. A text of fewer words is one run.

A run that more than `COMMON` documents have is ignored: it is part of a
preamble, a licence or a form, and does not tell a copy. Documents that consist
almost only of a long passage of such runs are copies of each other, and are not
counted here, so that a text that occurs a hundred times is still found. Long
means more than `FORM` runs, about sixty words.
"""

from collections.abc import Sequence
import re

import numpy as np

COMMON = 10  # Most documents that may share a run that counts.
FORM = 50  # Runs of a passage that is long.
MAX_SHARED = 0.2  # Share of a document's runs that the other split may have.
MAX_ALIKE = 0.7  # Share of the runs of either document that both may have.
_WORD = 3  # Thirds.
_RUN = 8 * _WORD
# Characters that count as a third of a word: South-East Asian scripts, kana,
# ideographs and their punctuation, cuneiform and hieroglyphs.
_THIRDS = (
  '\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf'
  '\u1b00-\u1b7f\u3001-\u312f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\ua4cf'
  '\ua980-\ua9ff\uaa60-\uaadf\uf900-\ufaff\uff00-\uffef'
  '\U00012000-\U0001467f\U00020000-\U0003ffff'
)
# U+200B marks where a line may be broken; it is no part of a word.
_UNIT = re.compile(rf'[{_THIRDS}]|[^\s\u200b{_THIRDS}]+')
_THIRD = re.compile(f'[{_THIRDS}]')
_FACTOR = 0x9E3779B97F4A7C15  # Odd, and so invertible modulo 2^64.


class Runs:
  """The distinct runs of each document, as 64-bit hashes."""

  def __init__(self):
    self._ids: dict[str, int] = {}
    self._hashes: list[np.ndarray] = []

  def add(self, text: str, target: str) -> int:
    """Adds a document, and returns a hash of all its words.

    Args:
      text: the text, or of a pair the source.
      target: the target of a pair, else empty.
    """
    ids = self._unit_ids(text)
    if target:  # The 0 marks where it begins.
      ids += [0, *self._unit_ids(target)]
    hashes, whole = _hashes(np.array(ids, np.uint64))
    self._hashes.append(hashes)
    return whole

  def index(self, chosen: Sequence[int] | np.ndarray) -> 'Index':
    """Returns an index of some documents, which numbers them from 0.

    Args:
      chosen: numbers of the documents, in the order in which they were added.
    """
    return Index([self._hashes[i] for i in chosen])

  def _unit_ids(self, text: str) -> list[int]:
    """Returns the number of each word; thirds of a word have odd numbers."""
    ids = self._ids
    return [
      ids.setdefault(unit, 2 * len(ids) + 2 + bool(_THIRD.match(unit)))
      for unit in _UNIT.findall(text)
    ]


class Index:
  """An index of documents by the runs that count."""

  def __init__(self, hashes_of: Sequence[np.ndarray]):
    """Takes the hashes of the distinct runs of each document."""
    self._size = len(hashes_of)
    lengths = np.array([len(hashes) for hashes in hashes_of], int)
    hashes = np.concatenate([np.zeros(0, np.uint64), *hashes_of])
    owners = np.repeat(np.arange(self._size), lengths)
    order = np.argsort(hashes, kind='stable')  # Owners of a run ascend.
    owners, groups = owners[order], _groups(hashes[order])
    is_common = np.bincount(groups)[groups] > COMMON // 2
    num_common = np.bincount(owners[is_common], minlength=self._size)
    # Two such documents are alike by their common runs alone.
    is_copy = num_common > 2 * MAX_ALIKE / (1 + MAX_ALIKE) * lengths
    is_copy &= num_common > FORM
    size = int(groups[-1]) + 1 if len(groups) else 0
    counts = np.bincount(groups[~is_copy[owners]], minlength=size)
    is_used = counts[groups] <= COMMON
    self._owners = owners[is_used]
    self._groups = _groups(groups[is_used])
    self._num = np.bincount(self._owners, minlength=self._size)
    self._starts = np.searchsorted(self._groups, np.arange(self._num_groups))
    self._by_owner = np.argsort(self._owners, kind='stable')
    self._firsts = np.cumsum(self._num) - self._num

  @property
  def _num_groups(self) -> int:
    return int(self._groups[-1]) + 1 if len(self._groups) else 0

  def shared(self, others: np.ndarray) -> np.ndarray:
    """Returns the share of each document's runs that any of `others` has.

    Args:
      others: (documents,) bool, the documents to compare with.
    """
    is_known = np.zeros(self._num_groups, bool)
    is_known[self._groups[others[self._owners]]] = True
    counts = np.bincount(
      self._owners[is_known[self._groups]], minlength=self._size
    )
    return counts / np.maximum(self._num, 1)

  def closest(self, document: int, others: np.ndarray) -> int:
    """Returns the document that shares the most runs with a given one.

    Args:
      document: number of the given document.
      others: (documents,) bool, the documents to choose from.
    """
    first = self._firsts[document]
    places = self._by_owner[first : first + self._num[document]]
    groups = self._groups[places]
    ends = np.append(self._starts[1:], len(self._owners))
    spans = zip(self._starts[groups], ends[groups])
    owners = np.concatenate([self._owners[a:b] for a, b in spans])
    return int(np.bincount(owners[others[owners]]).argmax())

  def alike(self, side: np.ndarray) -> list[tuple[int, int]]:
    """Returns the pairs of documents of one split that are near copies.

    Two documents are near copies if more than `MAX_ALIKE` of the runs that
    either has are in both. For a run that very many documents have, only the
    first `COMMON` documents of a split are compared with the others.

    Args:
      side: (documents,) the split of each document, 0 or 1; -1 leaves it out.

    Returns:
      Pairs of a document and a later one, sorted by the later one.
    """
    chosen = side[self._owners] >= 0
    owners = self._owners[chosen]
    keys = 2 * self._groups[chosen] + side[owners]
    order = np.argsort(keys, kind='stable')
    owners, groups = owners[order], _groups(keys[order])
    place = np.arange(len(owners))
    start = np.searchsorted(groups, groups)
    codes = []
    for rank in range(COMMON):
      later = np.flatnonzero(place > start + rank)
      codes.append(owners[later] * self._size + owners[start[later] + rank])
    pairs, both = np.unique(np.concatenate(codes), return_counts=True)
    second, first = np.divmod(pairs, self._size)
    either = self._num[first] + self._num[second] - both
    is_alike = both > MAX_ALIKE * either
    return list(zip(first[is_alike].tolist(), second[is_alike].tolist()))


def _groups(sorted_values: np.ndarray) -> np.ndarray:
  """Returns the number of each value among the distinct values, from 0."""
  is_new = np.diff(sorted_values, prepend=sorted_values[:1]) != 0
  return np.cumsum(is_new)


def _hashes(ids: np.ndarray) -> tuple[np.ndarray, int]:
  """Returns the distinct hashes of the runs of words, and a hash of all words.

  The hash of words x_i, ..., x_j is a polynomial in a constant c modulo 2^64.
  It is the difference of two prefix sums of x_k c^k, times c^-i.
  """
  num = len(ids)
  sums = np.zeros(num + 1, np.uint64)
  sums[1:] = np.cumsum(_mixed(ids) * _powers(_FACTOR, num), dtype=np.uint64)
  sizes = np.where(ids & np.uint64(1), 1, _WORD)
  ends = np.concatenate([[0], np.cumsum(sizes)])
  last = np.searchsorted(ends, ends[:-1] + _RUN)
  first = np.flatnonzero(last <= num)
  if not len(first):
    first, last = np.array([0]), np.array([num])
  last = last[first]
  inverse = _powers(pow(_FACTOR, -1, 2**64), num + 1)
  hashes = _mixed((sums[last] - sums[first]) * inverse[first])
  whole = int(_mixed(sums[-1:] ^ np.uint64(num))[0])
  return np.unique(hashes), whole


def _powers(base: int, num: int) -> np.ndarray:
  """Returns base^0, base^1, ... modulo 2^64."""
  factors = np.full(num, base, np.uint64)
  factors[:1] = 1
  return np.cumprod(factors, dtype=np.uint64)


def _mixed(x: np.ndarray) -> np.ndarray:
  """Returns hashes of numbers (SplitMix64, Steele et al., 2014)."""
  x = x + np.uint64(_FACTOR)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))

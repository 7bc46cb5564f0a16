"""Which documents nearly say the same, by the runs of words that they share.

A run is eight words in a row (a shingle; Broder, 1997; used on training data by
Lee et al., 2022). A word is what stands between blanks, as it is written, with
its case, marks and punctuation. In scripts that put no blanks between words
three characters count as a word. A shorter text is one run.

A run that more than `COMMON` documents have is left out, as part of a preamble,
a licence or a form, which says nothing of what is copied. Documents that hold a
long passage of such runs and hardly anything else are copies of each other, and
do not count: a text that is there a hundred times is found. Long is more than
`FORM` runs, about sixty words; of shorter ones nothing is dropped.
"""

from collections.abc import Sequence
import re

import numpy as np

COMMON = 10
FORM = 50
MAX_SHARED = 0.2  # Of a document's runs, with the other side of the split.
MAX_ALIKE = 0.7  # Of the runs of two documents of one side, those of both.
_WORD = 3
_RUN = 8 * _WORD
# Characters that count as a third of a word: South-East Asian scripts, kana,
# ideographs and their punctuation, cuneiform and hieroglyphs.
_THIRDS = (
  '\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf'
  '\u1b00-\u1b7f\u3001-\u312f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\ua4cf'
  '\ua980-\ua9ff\uaa60-\uaadf\uf900-\ufaff\uff00-\uffef'
  '\U00012000-\U0001467f\U00020000-\U0003ffff'
)
# U+200B is where a line may be broken, and no part of a word.
_UNIT = re.compile(rf'[{_THIRDS}]|[^\s\u200b{_THIRDS}]+')
_THIRD = re.compile(f'[{_THIRDS}]')
_FACTOR = 0x9E3779B97F4A7C15  # Odd, and so invertible modulo 2^64.


class Runs:
  """The distinct runs of documents, as 64-bit hashes."""

  def __init__(self):
    self._ids: dict[str, int] = {}
    self._found: list[np.ndarray] = []

  def add(self, text: str, target: str) -> int:
    """Takes one more document, and returns a hash of all its words."""
    ids = self._unit_ids(text)
    if target:  # Where it begins is part of what is said.
      ids += [0, *self._unit_ids(target)]
    hashes, whole = _hashes(np.array(ids, np.uint64))
    self._found.append(hashes)
    return whole

  def index(self, chosen: Sequence[int]) -> 'Index':
    """Returns the runs of some documents, which are counted from 0 there."""
    return Index([self._found[i] for i in chosen])

  def _unit_ids(self, text: str) -> list[int]:
    """Returns numbers of the words, odd ones for thirds of a word."""
    ids = self._ids
    return [
      ids.setdefault(unit, 2 * len(ids) + 2 + bool(_THIRD.match(unit)))
      for unit in _UNIT.findall(text)
    ]


class Index:
  """Which documents have which of the runs that are not left out."""

  def __init__(self, found: Sequence[np.ndarray]):
    self._size = len(found)
    lengths = np.array([len(hashes) for hashes in found], int)
    hashes = np.concatenate([np.zeros(0, np.uint64), *found])
    owners = np.repeat(np.arange(self._size), lengths)
    order = np.argsort(hashes, kind='stable')  # Owners of a run ascend.
    owners, groups = owners[order], _groups(hashes[order])
    is_common = np.bincount(groups)[groups] > COMMON // 2
    num_common = np.bincount(owners[is_common], minlength=self._size)
    # Two of these are alike by what is common alone.
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
      others: (documents,) bool.
    """
    is_known = np.zeros(self._num_groups, bool)
    is_known[self._groups[others[self._owners]]] = True
    counts = np.bincount(
      self._owners[is_known[self._groups]], minlength=self._size
    )
    return counts / np.maximum(self._num, 1)

  def closest(self, document: int, others: np.ndarray) -> int:
    """Returns which of `others` has the most runs of a document."""
    first = self._firsts[document]
    places = self._by_owner[first : first + self._num[document]]
    groups = self._groups[places]
    ends = np.append(self._starts[1:], len(self._owners))
    spans = zip(self._starts[groups], ends[groups])
    owners = np.concatenate([self._owners[a:b] for a, b in spans])
    return int(np.bincount(owners[others[owners]]).argmax())

  def alike(self, side: np.ndarray) -> list[tuple[int, int]]:
    """Returns the pairs on one side that share more than `MAX_ALIKE`.

    Of the runs that either document has, as many as both have; of a run that
    very many have, the first `COMMON` of a side are compared with all. In the
    order of the second of each pair, which comes after the first.

    Args:
      side: (documents,) 0 or 1 of each document; -1 leaves one out.
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
  """Numbers the runs of equal values from 0."""
  is_new = np.diff(sorted_values, prepend=sorted_values[:1]) != 0
  return np.cumsum(is_new)


def _hashes(ids: np.ndarray) -> tuple[np.ndarray, int]:
  """Returns the distinct hashes of the runs of words, and of all words.

  Of words x_i, ..., x_j it is a polynomial of a constant c modulo 2^64: sums of
  x_k c^k from the start give that of any run, times c^-i.
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
  """Returns numbers whose bits all depend on all bits (SplitMix64)."""
  x = x + np.uint64(_FACTOR)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))

"""The rows of each training batch, in random order, across batch sizes.

A plan says which rows are in the n-th batch of a given size. The rows that it
leaves of an epoch are where the plan of another size begins. So no row is read
twice before all rows were read, whatever batch sizes follow each other.
"""

from collections.abc import Sequence
import math
from typing import NamedTuple

import grain
import numpy as np


class Read(NamedTuple):
  """The rows of a batch.

  Attributes:
    group: number of the rows' group in the layout.
    rows: numbers of the rows in the group; -1 for an empty row.
    visits: number of times that each row was read before.
    goes_on: whether each row continues the row of the batch before that has the
      same place.
  """

  group: int
  rows: np.ndarray
  visits: np.ndarray
  goes_on: np.ndarray


def apart(
  group: int, rows: np.ndarray, visits: np.ndarray | None = None
) -> Read:
  """Returns a read of rows that continue no others.

  Args:
    group: number of the rows' group in the layout.
    rows: numbers of the rows in the group; -1 for an empty row.
    visits: number of times that each row was read before; None for 0.
  """
  if visits is None:
    visits = np.zeros(len(rows), np.int64)
  return Read(group, rows, visits, np.zeros(len(rows), bool))


def shuffled(num: int, seed: np.uint64) -> grain.MapDataset:
  """Returns an endless sequence: range(num) again and again, reshuffled."""
  return grain.MapDataset.range(num).shuffle(seed=int(seed)).repeat()


def get(sequence: grain.MapDataset, index: int | np.integer) -> int:
  """Returns one number of a `shuffled` sequence."""
  value = sequence[int(index)]
  assert value is not None  # Nothing is filtered.
  return value


class Listed(NamedTuple):
  """A list of rows of a group.

  Attributes:
    rows: numbers of the rows.
    visits: number of times that each was read before.
  """

  rows: np.ndarray
  visits: np.ndarray

  def at(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows at some indices, and how often each was read before."""
    return self.rows[indices], self.visits[indices]


class ReadPosition(NamedTuple):
  """The place where the reading of a group continues.

  Some unread rows come first, then the group's endless order.

  Attributes:
    source: the sequence that holds the unread rows.
    first: indices of the unread rows in `source`.
    place: index in the endless order at which reading continues after them.
  """

  source: 'Listed | Group'
  first: np.ndarray
  place: int


_NONE = np.zeros(0, np.int64)
START = ReadPosition(Listed(_NONE, _NONE), _NONE, 0)


class Group:
  """The endless sequence of a group's rows: a rest, then a shuffled order.

  Args:
    size: number of rows in the group.
    seed: seed of the shuffled order.
    rest: the place where reading starts.
  """

  def __init__(self, size: int, seed: np.uint64, rest: ReadPosition = START):
    self._size = size
    self._order = shuffled(size, seed)
    self._rest = rest

  def at(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows at some indices, and how often each was read before."""
    source, first, place = self._rest
    rows, visits = np.zeros((2, len(indices)), np.int64)
    early = np.flatnonzero(indices < len(first))
    rows[early], visits[early] = source.at(first[indices[early]])
    late = np.flatnonzero(indices >= len(first))
    places = place + indices[late] - len(first)
    rows[late] = self._ordered(places)
    visits[late] = places // self._size
    return rows, visits

  def _ordered(self, places: np.ndarray) -> np.ndarray:
    return np.array([get(self._order, p) for p in places], np.int64)

  def rest(self, left: np.ndarray, end: int) -> ReadPosition:
    """Returns the place where reading continues.

    Args:
      left: indices below `end` of rows that are unread.
      end: index of the sequence from which on all rows are unread.
    """
    num = len(self._rest.first)
    first = np.concatenate([left, np.arange(end, num)]).astype(np.int64)
    return ReadPosition(self, first, self._rest.place + max(end - num, 0))

  def unread(self, rest: ReadPosition) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns the unread rows of the current visit.

    Args:
      rest: the place where the reading of this group continues.

    Returns:
      The rows, the number of times that each was read before, and the number of
      visits when they are read.
    """
    end = math.ceil(rest.place / self._size) * self._size
    places = np.arange(rest.place, end)
    rows, visits = rest.source.at(rest.first)
    return (
      np.concatenate([rows, self._ordered(places)]),
      np.concatenate([visits, places // self._size]),
      end // self._size,
    )


class Shuffled:
  """A plan of batches in random order, each with rows of one group.

  With several groups, an epoch is a shuffled sequence of groups, in which each
  occurs as often as its rows fill a batch. The rest of an epoch of another
  batch size comes first, shuffled as well.
  """

  def __init__(
    self,
    sizes: Sequence[int],
    batch_size: int,
    seeds: np.ndarray,
    rests: Sequence[ReadPosition] | None = None,
  ):
    """Makes the plan.

    Args:
      sizes: number of rows of each group.
      batch_size: number of rows in a batch.
      seeds: seed of the order of the groups, then one for each group.
      rests: the place where reading starts, for each group; None for the start.
    """
    self._batch_size = batch_size
    rests = rests or [START] * len(sizes)
    self.groups = [
      Group(*each) for each in zip(sizes, seeds[1:], rests, strict=True)
    ]
    # Rounding up would repeat the rows of small buckets more often.
    whole = math.ceil if len(sizes) == 1 else round
    self._counts = np.array([whole(s / batch_size) for s in sizes])
    self._lead = np.array([round(len(r.first) / batch_size) for r in rests])
    self._order = shuffled(self.epoch, seeds[0])
    if self._lead.any():
      seed = seeds[0] ^ np.uint64(sum(r.place for r in rests) + 1)
      self._lead_order = shuffled(int(self._lead.sum()), seed & _LOW)

  @property
  def epoch(self) -> int:
    """Number of batches in which every row is read once."""
    return int(self._counts.sum())

  def read(self, number: int, lanes: np.ndarray) -> Read:
    """Returns some rows of a batch.

    Args:
      number: number of the batch, from 0.
      lanes: places of the rows in the batch.
    """
    group, batch = self._locate(number)
    indices = batch * self._batch_size + lanes
    rows, visits = self.groups[group].at(indices)
    return apart(group, rows, visits)

  def rests(self, number: int) -> list[ReadPosition]:
    """Returns for each group where reading continues after `number` batches."""
    if len(self.groups) == 1:
      end = number * self._batch_size
      return [self.groups[0].rest(_NONE, end)]
    epoch, past = self._epoch_of(number)
    stop = number if not past else number - past + self._length(epoch)
    left = [self._locate(n) for n in range(number, stop)]
    ends = self._before(epoch + bool(past))
    lanes = np.arange(self._batch_size)
    result = []
    for g, (group, end) in enumerate(zip(self.groups, ends, strict=True)):
      batches = sorted(batch for other, batch in left if other == g)
      indices = np.array(batches, np.int64)[:, None] * self._batch_size + lanes
      result.append(group.rest(indices.ravel(), int(end) * self._batch_size))
    return result

  def _locate(self, number: int) -> tuple[int, int]:
    """Returns the group of a batch, and the number of the batch in it."""
    if len(self.groups) == 1:
      return 0, number
    epoch, _ = self._epoch_of(number)
    if epoch < 0:
      counts, place = self._lead, get(self._lead_order, number)
    else:
      counts, place = self._counts, get(self._order, number - self._num_lead)
    ends = np.cumsum(counts)
    group = int(np.searchsorted(ends, place, side='right'))
    in_group = place - int(ends[group] - counts[group])
    return group, int(self._before(epoch)[group]) + in_group

  @property
  def _num_lead(self) -> int:
    return int(self._lead.sum())

  def _epoch_of(self, number: int) -> tuple[int, int]:
    """Returns a batch's epoch (-1 for the rest before them) and place in it."""
    if number < self._num_lead:
      return -1, number
    return divmod(number - self._num_lead, self.epoch)

  def _length(self, epoch: int) -> int:
    return self._num_lead if epoch < 0 else self.epoch

  def _before(self, epoch: int) -> np.ndarray:
    """Returns the number of batches of each group before an epoch."""
    if epoch < 0:
      return np.zeros_like(self._lead)
    return self._lead + epoch * self._counts


_LOW = np.uint64(2**32 - 1)  # Grain's seeds have 32 bits.


def dealt(
  rests: Sequence[ReadPosition],
  plan: Shuffled,
  old: Sequence[np.ndarray],
  new: Sequence[np.ndarray],
) -> list[ReadPosition]:
  """Returns where new groups of the same documents start to read.

  Groups that do not change continue as they are. The others start with the
  documents that are unread in the current visit.

  Args:
    rests: the place where each old group continues.
    plan: plan of the old groups.
    old: documents of each old group, ascending.
    new: documents of each new group, ascending.
  """
  stays = [np.array_equal(a, b) for a, b in zip(old, new)]
  stays += [False] * (max(len(old), len(new)) - len(stays))
  pool, visits, following = [], [], 0
  for group, rest, documents, same in zip(plan.groups, rests, old, stays):
    if not same:
      rows, row_visits, visit = group.unread(rest)
      pool.append(documents[rows])
      visits.append(row_visits)
      following = max(following, visit)
  result = []
  for g, documents in enumerate(new):
    if stays[g]:
      result.append(rests[g])
      continue
    left, left_visits = np.concatenate(pool), np.concatenate(visits)
    is_here = np.isin(left, documents)
    rows = np.searchsorted(documents, left[is_here])
    first = Listed(rows, left_visits[is_here])
    place = following * len(documents)
    result.append(ReadPosition(first, np.arange(len(rows)), place))
  return result

"""Which layers each part has, so that the slowest stage is as fast as can be.

The load of a stage is what its parts cost, what comes before the first layer
of a tower and after the last included. Of placements whose slowest stage is
equally loaded the one with the least sum of squared loads is best, and of
those the one that is next to the even placement.

With one part to a stage the result is exact: dynamic programming over where
the parts end, once for the slowest stage and once, under that bound, for the
squares. With several all placements are tried where they are few. Else it is a
local search, from even placements and from those that give unit after unit to
the stage that has least: single units move from part to part while that makes
the placement better, or need less memory where that is over the limit. Where
all units of the only tower cost the same and there is no limit, the start is
the best already.

Shape suffixes: P parts, S stages, C candidates.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import itertools
import math

import numpy as np

from t2x.pipeline import partition
from t2x.pipeline import placement_cost
from t2x.pipeline import schedule as schedule_lib

CostModel = placement_cost.CostModel
Stack = placement_cost.Stack
_GIB = 2**30
# So many placements are few.
_FEW = 10_000
# Starts of the local search, the best of those found.
_STARTS = 3


def balance(
  stacks: Sequence[Stack],
  table: schedule_lib.Schedule,
  *,
  fixed_bytes: float = 0.0,
  moved_bytes: float = 0.0,
  limit: float | None = None,
) -> list[int]:
  """Returns the units of each part.

  Args:
    stacks: of the towers, in order of depth.
    table: says which parts a stage has, and how many microbatches of them are
      in flight.
    fixed_bytes: of a device, whatever the placement.
    moved_bytes: besides, unless each stage has the same share in order and
      layers stay where they are kept.
    limit: bytes of a device, or None.

  Raises:
    ValueError: fewer units than parts, fewer parts than towers, or no
      placement within the limit.
  """
  model = CostModel(stacks, table, fixed_bytes, moved_bytes, limit)
  even = [model.even_P, *map(model.spread, model.shares())]
  if table.num_chunks == 1:
    found = _exact(model)
  elif _num_placements(model) <= _FEW:
    found = _all(model)
  else:
    starts = [*even, *(_filled(model, shares) for shares in model.shares())]
    starts = sorted(starts, key=model.rank)[:_STARTS]
    found = [_improved(model, start) for start in starts]
  best = min([*even, *found], key=model.rank)
  need = min(map(model.bytes_of, [*even, *found]))
  if limit is not None and model.bytes_of(best) > limit:
    raise ValueError(
      f'pipeline.layers=balanced: a device needs {need / _GIB:.4g} GiB at '
      f'least, and pipeline.memory_limit={limit / _GIB:.4g} GiB. Take more '
      'stages (mesh.pipe), fewer microbatches in flight (another '
      'pipeline.schedule, or smaller ones: more pipeline.microbatches), or '
      'train.remat=full.'
    )
  return [int(units) for units in best]


def _exact(model: CostModel) -> list[np.ndarray]:
  """Returns the best of parts that each have a stage; none if none fits."""
  rows = [
    partition.Row(*row) for row in zip(model.costs, model.firsts, model.lasts)
  ]
  options = []  # (slowest stage, parts of each tower, most units of a part)
  for shares in model.shares():
    for most in _most_units(model, shares):
      each = (r.slowest(num, cap) for r, num, cap in zip(rows, shares, most))
      options.append((max(each), shares, most))
  bound = min((option[0] for option in options), default=0)
  found = []
  for slowest, shares, most in options:
    if slowest == bound:
      ends = np.cumsum(shares)
      pieces = [
        row.even(model.even_P[end - num : end], cap, bound)
        for row, num, cap, end in zip(rows, shares, most, ends)
      ]
      found.append(np.concatenate(pieces))
  return found


def _most_units(model: CostModel, shares) -> Iterator[tuple[int, ...]]:
  """Yields how many units the parts of each tower can have within the limit.

  What the parts of one tower leave, those of the next can use.
  """
  sizes = model.sizes
  if model.limit is None:
    yield tuple(sizes)
    return
  prices, begin = [], 0
  for t, num in enumerate(shares):
    prices.append(sum(model.prices(t, begin, begin + num)))
    begin += num
  least = [-(-size // num) for size, num in zip(sizes, shares)]
  most = [size - num + 1 for size, num in zip(sizes, shares)]
  some = (range(a, b + 1) for a, b in zip(least[:-1], most[:-1]))
  for caps in itertools.product(*some):
    used = model.moving_bytes + sum(map(math.prod, zip(caps, prices)))
    room = model.limit - used
    if room >= prices[-1] * least[-1]:
      fits = room // prices[-1] if prices[-1] else most[-1]
      yield (*caps, min(most[-1], int(fits)))


def _num_placements(model: CostModel) -> int:
  return sum(
    math.prod(math.comb(n - 1, k - 1) for n, k in zip(model.sizes, shares))
    for shares in model.shares()
  )


def _all(model: CostModel) -> list[np.ndarray]:
  """Returns the best of all placements, for all parts of the towers."""
  found = []
  for shares in model.shares():
    rows = [
      [
        np.diff([0, *cuts, n])
        for cuts in itertools.combinations(range(1, n), k - 1)
      ]
      for n, k in zip(model.sizes, shares)
    ]
    units_CP = np.array([np.concatenate(p) for p in itertools.product(*rows)])
    best = np.lexsort(model.ranks(units_CP, shares)[::-1])[0]
    found.append(units_CP[best])
  return found


def _filled(model: CostModel, shares: Sequence[int]) -> np.ndarray:
  """Gives unit after unit to the stage that then has least."""
  units_P = np.ones(model.table.num_parts, int)
  mean_P = np.repeat([costs.mean() for costs in model.costs], shares)
  load_S = (mean_P + model.extra_P(shares))[model.part_SV].sum(1)
  tower_P = np.repeat(np.arange(len(shares)), shares)
  rest = np.array(model.sizes) - shares
  while rest.any():
    open_P = rest[tower_P] > 0
    then_P = np.where(open_P, load_S[model.stage_P] + mean_P, math.inf)
    # Of equals, the part that has the fewest units.
    p = np.lexsort((units_P, then_P))[0]
    units_P[p] += 1
    load_S[model.stage_P[p]] += mean_P[p]
    rest[tower_P[p]] -= 1
  return units_P


def _improved(model: CostModel, units_P: np.ndarray) -> np.ndarray:
  """Moves single units within towers until no move is better."""
  shares = model.shares_of(units_P)
  tower_P = np.repeat(np.arange(len(shares)), shares)
  one_PP = np.eye(len(units_P), dtype=int)
  to, out = np.nonzero(tower_P[:, None] == tower_P)
  moves_CP = (one_PP[to] - one_PP[out])[to != out]
  while True:
    units_CP = units_P + moves_CP
    units_CP = units_CP[units_CP.min(1, initial=1) > 0]
    if not len(units_CP):
      return units_P
    best = np.lexsort(model.ranks(units_CP, shares)[::-1])[0]
    if model.rank(units_CP[best]) >= model.rank(units_P):
      return units_P
    units_P = units_CP[best]

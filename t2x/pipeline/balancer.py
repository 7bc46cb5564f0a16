"""Load balancing: divides the layers so that the slowest stage is fast.

The load of a stage is the cost of its parts. It includes the work before the
first layer and after the last layer of a tower. The best placement has the
least load on its slowest stage. Of several, it is the one with the least sum of
squared loads, and of those the one closest to the even placement.

With one part on each stage the result is exact: dynamic programming over the
ends of the parts, once for the slowest stage and once, under that bound, for
the squares. With several parts on each stage all placements are tried if there
are few. Otherwise a local search starts from even placements and from greedy
ones, which give one unit after another to the stage with the least load. The
search moves single units between parts while that makes the placement better,
or makes it need less memory where it is over the limit. Where all units of the
only tower cost the same and there is no limit, the even placement is already
the best.

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
Stack = placement_cost.TowerCosts
_GIB = 2**30
# All placements are tried if there are at most this many.
_MAX_EXHAUSTIVE = 10_000
# The local search starts from this many placements, the best of all candidates.
_NUM_STARTS = 3


def balance(
  stacks: Sequence[Stack],
  table: schedule_lib.Schedule,
  *,
  fixed_bytes: float = 0.0,
  moved_bytes: float = 0.0,
  limit: float | None = None,
) -> list[int]:
  """Returns the number of units of each part, in order of depth.

  Args:
    stacks: costs of the towers, in order of depth.
    table: schedule, which says which parts a stage has and how many of their
      microbatches are in flight.
    fixed_bytes: bytes that a device needs whatever the placement is.
    moved_bytes: bytes that a device needs in addition where layers move from
      where they are kept to where they are used. They stay only if each stage
      has the same share of every tower, in order.
    limit: most bytes that a device may need, or None for no limit.

  Raises:
    ValueError: there are fewer units than parts, fewer parts than towers, or
      no placement is within the limit.
  """
  model = CostModel(stacks, table, fixed_bytes, moved_bytes, limit)
  even = [model.even_P, *map(model.spread, model.shares())]
  if table.num_chunks == 1:
    candidates = _exact(model)
  elif _num_placements(model) <= _MAX_EXHAUSTIVE:
    candidates = _all(model)
  else:
    starts = [*even, *(_filled(model, shares) for shares in model.shares())]
    starts = sorted(starts, key=model.rank)[:_NUM_STARTS]
    candidates = [_improved(model, start) for start in starts]
  best = min([*even, *candidates], key=model.rank)
  need = min(map(model.bytes_of, [*even, *candidates]))
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
  """Returns the best placements with one part a stage; none if none fits."""
  chains = [
    partition.Chain(*costs)
    for costs in zip(model.costs, model.firsts, model.lasts)
  ]
  options = []  # (slowest stage, parts of each tower, most units of a part)
  for shares in model.shares():
    for most in _most_units(model, shares):
      each = (c.slowest(num, cap) for c, num, cap in zip(chains, shares, most))
      options.append((max(each), shares, most))
  bound = min((option[0] for option in options), default=0)
  placements = []
  for slowest, shares, most in options:
    if slowest == bound:
      ends = np.cumsum(shares)
      pieces = [
        chain.even(model.even_P[end - num : end], cap, bound)
        for chain, num, cap, end in zip(chains, shares, most, ends)
      ]
      placements.append(np.concatenate(pieces))
  return placements


def _most_units(
  model: CostModel, shares: Sequence[int]
) -> Iterator[tuple[int, ...]]:
  """Yields the most units that a part of each tower can have within the limit.

  The last tower gets the memory that the other towers leave.
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
  """Returns the best placement for each way to deal parts to towers."""
  placements = []
  for shares in model.shares():
    divisions = [
      [
        np.diff([0, *cuts, n])
        for cuts in itertools.combinations(range(1, n), k - 1)
      ]
      for n, k in zip(model.sizes, shares)
    ]
    units_CP = np.array(
      [np.concatenate(p) for p in itertools.product(*divisions)]
    )
    best = np.lexsort(model.ranks(units_CP, shares)[::-1])[0]
    placements.append(units_CP[best])
  return placements


def _filled(model: CostModel, shares: Sequence[int]) -> np.ndarray:
  """Gives one unit after another to the stage with the least load after it."""
  units_P = np.ones(model.table.num_parts, int)
  mean_P = np.repeat([costs.mean() for costs in model.costs], shares)
  load_S = (mean_P + model.extra_P(shares))[model.part_SV].sum(1)
  tower_P = np.repeat(np.arange(len(shares)), shares)
  remaining = np.array(model.sizes) - shares
  while remaining.any():
    open_P = remaining[tower_P] > 0
    then_P = np.where(open_P, load_S[model.stage_P] + mean_P, math.inf)
    # Of equal loads, the part that has the fewest units.
    p = np.lexsort((units_P, then_P))[0]
    units_P[p] += 1
    load_S[model.stage_P[p]] += mean_P[p]
    remaining[tower_P[p]] -= 1
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

"""How far the numbers of a layout are from those of one device.

The deviation of a tensor a from b is

  max|a - b| / max(max|b|, 1e-3 x the largest |entry| of b's whole tree):

the rounding of a tensor is that of its largest entries, and a tensor whose
exact value is zero (the gradient of a key's bias) has nothing but rounding, of
which the rest of the tree gives the scale.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import numpy as np

from t2x.multihost import processes
from t2x.parallel import sharding

FLOOR = 1e-3  # Of the largest entry of the tree; see above.
# A loss is a mean of terms of one sign, which loses next to nothing by
# rounding; and of an untrained model it is near log(V) whatever goes wrong.
LOSS_SHARE = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
  """One comparison at one step.

  Attributes:
    step: from 1; the weights as they are drawn have 0.
    name: `weights`, `loss`, `gradients`, `update` or `trajectory`.
    deviations: by dotted path of the parameter; of a loss, by ''.
  """

  step: int
  name: str
  deviations: Mapping[str, float]

  @property
  def of_loss(self) -> bool:
    return '' in self.deviations

  @property
  def worst(self) -> tuple[str, float]:
    """The path and size of the largest deviation."""
    return max(self.deviations.items(), key=lambda item: item[1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
  """All checks of a layout, in the order in which its numbers come about.

  Attributes:
    layout: as it was given.
    tolerance: largest deviation of a parameter; of a loss, `LOSS_SHARE` of it.
    checks: of all steps.
  """

  layout: str
  tolerance: float
  checks: tuple[Check, ...]

  @property
  def loss_tolerance(self) -> float:
    return LOSS_SHARE * self.tolerance

  @property
  def ok(self) -> bool:
    return not self.past

  @property
  def past(self) -> tuple[Check, ...]:
    """The checks that are past the tolerance; in the first, numbers part."""
    limit = lambda c: self.loss_tolerance if c.of_loss else self.tolerance
    return tuple(c for c in self.checks if not c.worst[1] <= limit(c))

  def largest(self, *, of_loss: bool) -> float:
    """Returns the largest deviation, of losses or else of parameters."""
    found = (c.worst[1] for c in self.checks if c.of_loss == of_loss)
    return max(found)

  def by_parameter(self) -> dict[str, float]:
    """Returns the largest deviation of each parameter, the worst first."""
    worst: dict[str, float] = {}
    for check in self.checks:
      for path, value in check.deviations.items():
        if path:
          worst[path] = max(value, worst.get(path, 0.0))
    return dict(sorted(worst.items(), key=lambda item: -item[1]))


def of_loss(loss: jax.Array, want: float) -> float:
  """Returns the relative deviation of a scalar, the worst of its copies."""
  return of_tree({'': loss}, {'': np.float32(want)})['']


def of_tree(
  tree: Any, want: Any, *, scale: Any = None, rounded: bool = False
) -> dict[str, float]:
  """Returns the deviation of each tensor, by dotted path.

  Every copy on every device counts, so that replicas that have parted are
  seen. Several processes look at their own devices and share the result.

  Args:
    tree: arrays on a mesh.
    want: the same tree, whole, on the host.
    scale: a tree whose entries take the place of those of `want` as the
      measure; default `want`.
    rounded: forgive the difference of one rounding to float32.
  """
  with np.errstate(all='ignore'):
    size = lambda b: float(np.max(np.abs(b, dtype=np.float32), initial=0.0))
    sizes = [size(b) for b in jax.tree.leaves(want if scale is None else scale)]
    floor = FLOOR * max(sizes, default=0.0)
    paths, distances = [], []
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for (path, a), b in zip(leaves, jax.tree.leaves(want), strict=True):
      paths.append(sharding.path_name(path).removesuffix('.value'))
      distances.append(_distance(a, np.asarray(b), rounded))
  distances = processes.largest(np.asarray(distances, np.float32))
  values = map(_ratio, distances, (max(s, floor) for s in sizes))
  return dict(zip(paths, values))


def _distance(a: jax.Array, b: np.ndarray, rounded: bool) -> float:
  """Returns the largest |a - b| of this process's devices."""
  worst = np.float32(0.0)
  for shard in a.addressable_shards:
    one = np.asarray(shard.data, np.float32)
    other = np.asarray(b[shard.index], np.float32)
    gap = np.abs(one - other)
    if rounded:
      step = np.spacing(np.maximum(np.abs(one), np.abs(other)))
      gap = np.maximum(gap - step, 0.0)
    worst = np.maximum(worst, gap.max(initial=0.0))
  return float(worst)


def _ratio(distance: np.float32, scale: float) -> float:
  """A NaN is infinitely far away; so is anything from nothing but zeros."""
  if distance == 0.0:
    return 0.0
  ratio = float(distance) / scale if scale else np.inf
  return ratio if np.isfinite(ratio) else np.inf

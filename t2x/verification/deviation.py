"""Deviations: the differences between a layout's numbers and one device's.

The deviation of a tensor a from b is

  max|a - b| / max(max|b|, 1e-3 x the largest |entry| of b's whole tree),

since the rounding errors of a tensor scale with its largest entries. A tensor
whose exact value is zero, such as the gradient of a key's bias, consists of
rounding errors only, and the rest of the tree gives their scale.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import numpy as np

from t2x.multihost import processes
from t2x.parallel import sharding

FLOOR = 1e-3  # Fraction of the largest entry of the tree; see above.
# A loss is a mean of terms of one sign, so its rounding error is small; and the
# loss of an untrained model is near log(V), whatever goes wrong.
LOSS_SHARE = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
  """One comparison at one step.

  Attributes:
    step: number of the step, from 1; 0 for the initial weights.
    name: `weights`, `loss`, `gradients`, `update` or `trajectory`.
    deviations: deviation of each tensor, by dotted path of the parameter; a
      loss has the path ''.
  """

  step: int
  name: str
  deviations: Mapping[str, float]

  @property
  def of_loss(self) -> bool:
    """Whether a loss was compared, rather than parameters."""
    return '' in self.deviations

  @property
  def worst(self) -> tuple[str, float]:
    """Path and size of the largest deviation."""
    return max(self.deviations.items(), key=lambda item: item[1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
  """All checks of a layout, in the order in which training computes them.

  Attributes:
    layout: text of the layout, as it was given.
    tolerance: largest deviation of a parameter that counts as rounding; for a
      loss it is `LOSS_SHARE` of that.
    checks: checks of all steps.
  """

  layout: str
  tolerance: float
  checks: tuple[Check, ...]

  @property
  def loss_tolerance(self) -> float:
    """Largest deviation of a loss that counts as rounding."""
    return LOSS_SHARE * self.tolerance

  @property
  def ok(self) -> bool:
    """Whether every deviation is within its tolerance."""
    return not self.past

  @property
  def past(self) -> tuple[Check, ...]:
    """The checks that exceed the tolerance, the earliest first."""
    limit = lambda c: self.loss_tolerance if c.of_loss else self.tolerance
    return tuple(c for c in self.checks if not c.worst[1] <= limit(c))

  def largest(self, *, of_loss: bool) -> float:
    """Returns the largest deviation of losses, or of parameters."""
    return max(c.worst[1] for c in self.checks if c.of_loss == of_loss)

  def by_parameter(self) -> dict[str, float]:
    """Returns the largest deviation of each parameter, the worst first."""
    worst: dict[str, float] = {}
    for check in self.checks:
      for path, value in check.deviations.items():
        if path:
          worst[path] = max(value, worst.get(path, 0.0))
    return dict(sorted(worst.items(), key=lambda item: -item[1]))


def of_loss(loss: jax.Array, want: float) -> float:
  """Returns the relative deviation of a scalar, the largest of its copies."""
  return of_tree({'': loss}, {'': np.float32(want)})['']


def of_tree(
  tree: Any, want: Any, *, scale: Any = None, rounded: bool = False
) -> dict[str, float]:
  """Returns the deviation of each tensor of a tree, by dotted path.

  Every copy on every device is compared, so that replicas which differ are
  noticed. Each process compares its own devices, and all share the result.

  Args:
    tree: tree of arrays on a mesh.
    want: tree of the expected arrays, whole, on the host.
    scale: tree whose entries replace those of `want` in the denominator; None
      is `want`.
    rounded: whether to ignore a difference of one rounding to float32.
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
  """Returns the largest |a - b| on this process's devices."""
  worst = np.float32(0.0)
  for shard in a.addressable_shards:
    a_part = np.asarray(shard.data, np.float32)
    b_part = np.asarray(b[shard.index], np.float32)
    gap = np.abs(a_part - b_part)
    if rounded:
      step = np.spacing(np.maximum(np.abs(a_part), np.abs(b_part)))
      gap = np.maximum(gap - step, 0.0)
    worst = np.maximum(worst, gap.max(initial=0.0))
  return float(worst)


def _ratio(distance: np.float32, scale: float) -> float:
  """Returns distance / scale; inf for NaN, and if only the scale is 0."""
  if distance == 0.0:
    return 0.0
  ratio = float(distance) / scale if scale else np.inf
  return ratio if np.isfinite(ratio) else np.inf

"""Sizes of a model's parameters, as one device keeps and uses them."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math
import re

import jax

from t2x.models import model as model_lib
from t2x.parallel import sharding
from t2x.pipeline import plan as plan_lib

_MEMBER = re.compile(r'\.layers\.(?:group|remainder)\.(\d+)\.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
  """A parameter.

  Attributes:
    path: dotted path within the model.
    axes: logical axis of each dimension; None for one that is never split.
    shape: shape of the shard that a device keeps.
    in_layers: True if it belongs to a stack of layers.
    cast: True if it is only used in the dtype of the activations.
    used: number of its elements that a device's products use. Dimensions that
      `embed` splits are gathered, and each stage has as many slots for layers
      as the stage with the most layers needs.
  """

  path: str
  axes: tuple[str | None, ...]
  shape: tuple[int, ...]
  in_layers: bool
  cast: bool
  used: float

  @property
  def tower(self) -> str:
    """Name of the tower of layers that it belongs to."""
    return self.path.partition('.')[0]

  @property
  def member(self) -> int:
    """Index of its layer in a unit of its tower."""
    match = _MEMBER.search(self.path)
    return int(match[1]) if match else 0


def weights_of(
  model: model_lib.Transformer,
  rules: sharding.Rules,
  sizes: Mapping[str, int],
  plan: plan_lib.PipelinePlan | None = None,
) -> tuple[Weight, ...]:
  """Returns the parameters of a model.

  Args:
    model: the model, with sharded shapes as its parameters.
    rules: mesh axes of each logical axis.
    sizes: number of devices along each mesh axis.
    plan: the pipeline's schedule; None without stages.
  """
  towers = tuple(f'{name}.layers.' for name in model.towers)
  weights = []
  leaves = jax.tree_util.tree_leaves_with_path(
    model, is_leaf=sharding.is_variable
  )
  for path, leaf in leaves:
    if not sharding.is_variable(leaf):
      continue
    array, name = leaf.get_value(), sharding.path_name(path)
    axes = sharding.axes_of(leaf, len(array.shape))
    weight = Weight(
      path=name,
      axes=axes,
      shape=array.sharding.shard_shape(array.shape),
      in_layers=name.startswith(towers),
      cast=bool(leaf.get_metadata().get('weight')),
      used=_used(array.shape, axes, rules, sizes),
    )
    used = weight.used * _share(weight, plan)
    weights.append(dataclasses.replace(weight, used=used))
  return tuple(weights)


def _share(weight: Weight, plan: plan_lib.PipelinePlan | None) -> float:
  """Returns a stage's slots over the number of layers with the parameter."""
  if plan is None or not weight.in_layers:
    return 1.0
  for tower, unit_SN in zip(plan.placement.towers, plan.placement.unit_SN):
    if tower.name == weight.tower:
      layers = len(range(weight.member, tower.num_layers, tower.group))
      return unit_SN.shape[1] / layers
  raise AssertionError(weight.path)


def _used(
  shape: tuple[int, ...],
  axes: Sequence[str | None],
  rules: sharding.Rules,
  sizes: Mapping[str, int],
) -> float:
  """Returns the elements that products use, of the layers of all stages."""
  split = [
    sharding.mesh_axes(getattr(rules, axis))
    for axis in axes
    if axis is not None and axis not in ('embed', 'layers')
  ]
  parts = math.prod(sizes[a] for names in split for a in names)
  return math.prod(shape) / parts

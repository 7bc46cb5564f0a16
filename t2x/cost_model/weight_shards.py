"""The parameters of a model, as one device keeps and uses them."""

from collections.abc import Mapping
import dataclasses
import math
import re
from typing import Any

import jax

from t2x.parallel import sharding
from t2x.pipeline import plan as plan_lib

_MEMBER = re.compile(r'\.layers\.(?:group|remainder)\.(\d+)\.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
  """A parameter.

  Attributes:
    path: dotted, within the model.
    axes: logical axis of each dimension.
    shape: of the part that a device keeps.
    in_layers: whether it belongs to a stack of layers.
    cast: whether it is used in the dtype of the activations alone.
    used: elements of it that a device's products use: what `embed` splits is
      gathered, and a stage has as many slots as the fullest one needs.
  """

  path: str
  axes: tuple[str | None, ...]
  shape: tuple[int, ...]
  in_layers: bool
  cast: bool
  used: float

  @property
  def tower(self) -> str:
    return self.path.partition('.')[0]

  @property
  def member(self) -> int:
    """Its layer's place in a unit of its tower."""
    found = _MEMBER.search(self.path)
    return int(found[1]) if found else 0


def weights_of(
  model: Any,
  rules: sharding.Rules,
  sizes: Mapping[str, int],
  plan: plan_lib.Plan | None = None,
) -> tuple[Weight, ...]:
  """Returns the parameters of a model.

  Args:
    model: its sharded shapes.
    rules: logical axis -> mesh axes.
    sizes: of the mesh axes.
    plan: of a pipeline.
  """
  towers = tuple(f'{name}.layers.' for name in model.towers)
  found = []
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
      used=_used(array, axes, rules, sizes),
    )
    used = weight.used * _share(weight, plan)
    found.append(dataclasses.replace(weight, used=used))
  return tuple(found)


def _share(weight: Weight, plan: plan_lib.Plan | None) -> float:
  """Returns a stage's slots over the layers that have the parameter."""
  if plan is None or not weight.in_layers:
    return 1.0
  for tower, unit_SN in zip(plan.place.towers, plan.place.unit_SN):
    if tower.name == weight.tower:
      layers = len(range(weight.member, tower.num_layers, tower.group))
      return unit_SN.shape[1] / layers
  raise AssertionError(weight.path)


def _used(array, axes, rules, sizes) -> float:
  """Elements as products use them, of all stages."""
  split = [
    sharding.mesh_axes(getattr(rules, axis))
    for axis in axes
    if axis is not None and axis not in ('embed', 'layers')
  ]
  parts = math.prod(sizes[a] for names in split for a in names)
  return math.prod(array.shape) / parts

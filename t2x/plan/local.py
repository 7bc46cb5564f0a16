"""What one device has of a step: of its weights, and of a microbatch.

Shape suffixes: none; letters are those of `flops`. A layer is described once
for all that are like it.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from t2x import experiment
from t2x import sharding
from t2x import train_step
from t2x.attention import mask as mask_lib
from t2x.layers import attention as attention_lib
from t2x.layers import embed
from t2x.layers import moe
from t2x.layers import position
from t2x.models import encoder
from t2x.models import encoder_decoder
from t2x.pipeline import instructions
from t2x.pipeline import plan as plan_lib


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
  """Layers that are alike.

  Attributes:
    tower: whose they are.
    num: how many of a device run without stages: all of them.
    kind: of their attention.
    mlp: of their feed-forward.
    queries: T of a whole row.
    causal: whether a position sees the later ones.
    encoded: S of what they look at besides; None for no cross-attention.
  """

  tower: str
  num: int
  kind: attention_lib.AttentionConfig
  mlp: moe.FeedForwardConfig
  queries: int
  causal: bool
  encoded: int | None

  @property
  def mask(self) -> mask_lib.Mask:
    return mask_lib.Mask(causal=self.causal, window=self.kind.mask_window)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Local:
  """One device's part.

  Attributes:
    config: the experiment.
    sizes: of the mesh axes.
    weights: all parameters.
    plan: of a pipeline, or None.
    stage: whose part it is, where there is a plan.
  """

  config: experiment.Experiment
  sizes: Mapping[str, int]
  weights: tuple[Weight, ...]
  plan: plan_lib.Plan | None
  stage: int = 0

  def of_stages(self) -> list['Local']:
    """Returns this of every stage that has other work than those before it."""
    if self.plan is None:
      return [self]
    towers = [tower.name for tower in self.plan.place.towers]
    found = {}
    for stage in range(self.plan.table.num_stages):
      own = dataclasses.replace(self, stage=stage)
      work = tuple(own.runs(n, t) for n in instructions.LOOPS for t in towers)
      found.setdefault(work, own)
    return [*found.values()]

  def runs(self, loop: str, tower: str) -> int:
    """Returns how often the stage runs a loop in a step.

    Args:
      loop: one of `instructions.LOOPS`: of a layer, it runs once for each of a
        tower's units and each microbatch.
      tower: its name; any for `leave`.
    """
    assert self.plan is not None
    trips_S = self.plan.told.trips(loop, self._place_of(tower))
    return self.config.train.accumulate * int(trips_S[self.stage])

  def slots(self, tower: str) -> int:
    """Returns for how many units of a tower each stage has room."""
    assert self.plan is not None
    return self.plan.place.unit_SN[self._place_of(tower)].shape[1]

  def _place_of(self, tower: str) -> int:
    assert self.plan is not None
    names = [t.name for t in self.plan.place.towers]
    return names.index(tower)

  def axes(self, *names: str) -> tuple[str, ...]:
    """Returns the mesh axes of more than one device of logical axes."""
    rules = self.config.rules
    found = [a for n in names for a in sharding.mesh_axes(getattr(rules, n))]
    return tuple(a for a in dict.fromkeys(found) if self.sizes[a] > 1)

  def size(self, axes: tuple[str, ...]) -> int:
    return math.prod(self.sizes[a] for a in axes)

  def over(self, *names: str) -> int:
    """Returns over how many devices logical axes are split."""
    return self.size(self.axes(*names))

  @property
  def itemsize(self) -> int:
    """Bytes of an activation's number."""
    return jnp.dtype(self.config.model.dtype).itemsize

  @property
  def by_hand(self) -> tuple[str, ...]:
    """Mesh axes over which gradients are reduced once, after all."""
    step = self.config.train.step_config
    names = train_step.axes_by_hand(step, self.plan is not None)
    return tuple(a for a in names if self.sizes[a] > 1)

  @property
  def num_microbatches(self) -> int:
    """How often layers run in a step."""
    own = self.plan.table.num_microbatches if self.plan else 1
    return own * self.config.train.accumulate

  @property
  def rows(self) -> float:
    """Rows of a microbatch."""
    batch = self.config.data.batch_size
    split = self.size(tuple(dict.fromkeys(self.axes('batch') + self.by_hand)))
    return batch / split / self.num_microbatches

  @property
  def length(self) -> int:
    """T of a whole row of what is predicted."""
    data = self.config.data
    return data.objective.target_length(data.length)

  @property
  def tokens(self) -> float:
    """Predicted tokens of a microbatch."""
    return self.rows * self.length / self.over('length')

  @property
  def vocab(self) -> float:
    """Rows of the table that a device has."""
    model = self.config.model
    whole = embed.padded(model.vocab_size, model.vocab_multiple)
    return whole / self.over('vocab')

  @property
  def layers(self) -> list[Layer]:
    """Every sort of layer of every tower, in order of depth."""
    model, data = self.config.model, self.config.data
    if isinstance(model, encoder_decoder.EncoderDecoderConfig):
      below = model.num_encoder_layers or model.num_layers
      source = data.length
      return [
        *_layers(model, 'encoder', below, source, False, None),
        *_layers(model, 'decoder', model.num_layers, self.length, True, source),
      ]
    causal = not isinstance(model, encoder.EncoderConfig)
    return _layers(model, 'tower', model.num_layers, self.length, causal, None)

  @property
  def num_layers(self) -> int:
    """Layers of all towers."""
    return sum(layer.num for layer in self.layers)

  @property
  def has_bias(self) -> bool:
    """Whether positions are a bias on the scores."""
    kinds = position.RelativeBuckets, position.Alibi
    return isinstance(self.config.model.position, kinds)


def _layers(model, tower, num, queries, causal, encoded) -> list[Layer]:
  group = model.group
  return [
    Layer(
      tower=tower,
      num=len(range(i, num, len(group))),
      kind=kind,
      mlp=mlp,
      queries=queries,
      causal=causal,
      encoded=encoded,
    )
    for i, (kind, mlp) in enumerate(group[:num])
  ]


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
  shares = _shares(plan)
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
    in_layers = name.startswith(towers)
    share = shares.get(name.partition('.')[0], 1.0) if in_layers else 1.0
    found.append(
      Weight(
        path=name,
        axes=axes,
        shape=array.sharding.shard_shape(array.shape),
        in_layers=in_layers,
        cast=bool(leaf.get_metadata().get('weight')),
        used=share * _used(array, axes, rules, sizes),
      )
    )
  return tuple(found)


def _shares(plan: plan_lib.Plan | None) -> dict[str, float]:
  """Returns the share of each tower's units for which a stage has slots."""
  if plan is None:
    return {}
  towers = zip(plan.place.towers, plan.place.unit_SN)
  return {t.name: unit_SN.shape[1] / t.num_units for t, unit_SN in towers}


def _used(array, axes, rules, sizes) -> float:
  """Elements as products use them, of all stages."""
  split = [
    sharding.mesh_axes(getattr(rules, axis))
    for axis in axes
    if axis is not None and axis not in ('embed', 'layers')
  ]
  parts = math.prod(sizes[a] for names in split for a in names)
  return math.prod(array.shape) / parts

"""One device's share of a step: of the weights, the layers and a microbatch.

Letters (T, S, D) are those of `executed_flops`. Layers that are alike are
described once.
"""

from collections.abc import Mapping
import dataclasses
import math

import jax.numpy as jnp

from t2x.attention import mask as mask_lib
from t2x.config import experiment
from t2x.cost_model import weight_shards
from t2x.data import config as data_config
from t2x.hlo import stage_trips
from t2x.layers import attention_config
from t2x.layers import attention_kinds
from t2x.layers import embed
from t2x.layers import moe
from t2x.models import encoder
from t2x.models import model as model_lib
from t2x.parallel import sharding
from t2x.pipeline import instructions
from t2x.pipeline import plan as plan_lib
from t2x.training import train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
  """Layers that are alike.

  Attributes:
    tower: name of the tower that they belong to.
    member: index of these layers in a unit of the tower, which repeats.
    num: number of these layers in the whole tower.
    kind: config of their attention.
    mlp: config of their feed-forward layer.
    queries: T, positions of a whole row.
    causal: True if no position attends to later ones.
    encoded: S, positions that cross-attention attends to; None for no
      cross-attention.
  """

  tower: str
  member: int
  num: int
  kind: attention_kinds.AttentionConfig
  mlp: moe.FeedForwardConfig
  queries: int
  causal: bool
  encoded: int | None

  @property
  def mask(self) -> mask_lib.Mask:
    """Mask of the self-attention."""
    pattern = attention_kinds.pattern_of(self.kind, self.queries, self.causal)
    return mask_lib.Mask(pattern=pattern)

  def softmax_of(self, cross: bool) -> attention_kinds.SoftmaxConfig | None:
    """Returns the config of a softmax attention; None for other mixers.

    Args:
      cross: True for the cross-attention, False for the self-attention.
    """
    kind = attention_kinds.for_cross(self.kind) if cross else self.kind
    return kind if isinstance(kind, attention_config.Softmax) else None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class DeviceShare:
  """One device's share of a step.

  Attributes:
    config: the experiment.
    sizes: number of devices along each mesh axis.
    weights: all parameters of the model.
    plan: the pipeline's schedule; None without stages.
    stage: index of the stage that the device belongs to, with a plan.
  """

  config: experiment.Experiment
  sizes: Mapping[str, int]
  weights: tuple[weight_shards.Weight, ...]
  plan: plan_lib.PipelinePlan | None
  stage: int = 0

  def of_stages(self) -> list[tuple['DeviceShare', int]]:
    """Returns shares of stages with different work, and the number of each."""
    if self.plan is None:
      return [(self, 1)]
    stages: dict[tuple, list[DeviceShare]] = {}
    for stage in range(self.plan.table.num_stages):
      local = dataclasses.replace(self, stage=stage)
      work = tuple(
        local.runs(loop, tower.name, member)
        for loop in instructions.LOOPS
        for tower in self.plan.placement.towers
        for member in range(tower.group)
      )
      stages.setdefault(work, []).append(local)
    return [(alike[0], len(alike)) for alike in stages.values()]

  def runs(self, loop: str, tower: str, member: int = 0) -> float:
    """Returns the number of times that the stage runs a loop in a step.

    Args:
      loop: one of `instructions.LOOPS`. A loop over layers runs once for each
        unit of the tower that the stage has, and each microbatch.
      tower: name of the tower; any for the loop `leave`.
      member: index of a layer in its unit; the last unit can have fewer.
    """
    assert self.plan is not None
    times = stage_trips.times(
      self.plan, self.stage, loop, self._place_of(tower), member
    )
    return self.config.train.accumulate * float(times)

  @property
  def heads(self) -> float:
    """Number of times that the head runs in a step."""
    if self.plan is None:
      return self.num_microbatches
    return self.runs('leave', self.plan.placement.towers[-1].name)

  def slots(self, tower: str) -> int:
    """Returns the number of units of a tower that each stage has room for."""
    assert self.plan is not None
    return self.plan.placement.unit_SN[self._place_of(tower)].shape[1]

  def _place_of(self, tower: str) -> int:
    assert self.plan is not None
    names = [t.name for t in self.plan.placement.towers]
    return names.index(tower)

  def axes(self, *names: str) -> tuple[str, ...]:
    """Returns the mesh axes, of more than one device, of logical axes."""
    rules = self.config.rules
    axes = [a for n in names for a in sharding.mesh_axes(getattr(rules, n))]
    return tuple(a for a in dict.fromkeys(axes) if self.sizes[a] > 1)

  def size(self, axes: tuple[str, ...]) -> int:
    """Returns the number of devices along mesh axes."""
    return math.prod(self.sizes[a] for a in axes)

  def over(self, *names: str) -> int:
    """Returns the number of devices over which logical axes are split."""
    return self.size(self.axes(*names))

  def split(self, weight: weight_shards.Weight) -> int:
    """Returns the number of devices over which `embed` splits a parameter."""
    return self.over('embed') if 'embed' in weight.axes else 1

  @property
  def itemsize(self) -> int:
    """Bytes of an element of the activations."""
    return jnp.dtype(self.config.model.dtype).itemsize

  @property
  def by_hand(self) -> tuple[str, ...]:
    """Mesh axes over which gradients are reduced after all microbatches."""
    step = self.config.step_config
    names = train_step.axes_by_hand(step, self.plan is not None)
    return tuple(a for a in names if self.sizes[a] > 1)

  @property
  def num_microbatches(self) -> int:
    """Number of times that each layer runs forward in a step."""
    num = self.plan.table.num_microbatches if self.plan else 1
    return num * self.config.train.accumulate

  @property
  def rows(self) -> float:
    """Rows of a microbatch on this device."""
    batch = self.config.data.batch_size
    split = self.size(tuple(dict.fromkeys(self.axes('batch') + self.by_hand)))
    return batch / split / self.num_microbatches

  @property
  def length(self) -> int:
    """Positions of a whole row of the sequence that is predicted."""
    return data_config.target_length(self.config.data)

  @property
  def tokens(self) -> float:
    """Tokens of a microbatch on this device, of the sequence predicted."""
    return self.rows * self.length / self.over('length')

  @property
  def targets(self) -> float:
    """Predicted tokens of a microbatch on this device, which reach the head."""
    data = self.config.data
    num = data_config.num_targets(data, data.length)
    return self.rows * num / self.over('length')

  @property
  def vocab(self) -> float:
    """Rows of the token table on this device."""
    model = self.config.model
    whole = embed.padded(model.vocab_size, model.vocab_multiple)
    return whole / self.over('vocab')

  @property
  def layers(self) -> list[Layer]:
    """Layers of all towers, in order of depth, those that are alike once."""
    model, data = self.config.model, self.config.data
    has_encoder = 'encoder' in model.depths
    causal = has_encoder or not isinstance(model, encoder.EncoderConfig)
    source = data.length if has_encoder else self.length
    num_targets = data_config.num_targets(data, data.length)
    length = self.length + num_targets * model.is_two_stream
    # Positions, whether attention is causal, positions of cross-attention.
    towers = {
      'encoder': (source, False, None),
      'tower': (length, causal, None),
      'decoder': (self.length, True, source),
      'queries': (num_targets, False, self.length),
    }
    layers = (
      _layers(model, name, num, *towers[name])
      for name, num in model.depths.items()
    )
    return sum(layers, [])

  @property
  def num_layers(self) -> int:
    """Number of layers of all towers that a device has room for."""
    if self.plan is None:
      return sum(layer.num for layer in self.layers)
    towers = self.plan.placement.towers
    return sum(self.slots(tower.name) * tower.group for tower in towers)


def _layers(
  model: model_lib.ModelConfig,
  tower: str,
  num: int,
  queries: int,
  causal: bool,
  encoded: int | None,
) -> list[Layer]:
  """Returns the layers of a tower of `num` layers; other arguments: `Layer`."""
  group = model.group
  return [
    Layer(
      tower=tower,
      member=i,
      num=len(range(i, num, len(group))),
      kind=kind,
      mlp=mlp,
      queries=queries,
      causal=causal,
      encoded=encoded,
    )
    for i, (kind, mlp) in enumerate(group[:num])
  ]

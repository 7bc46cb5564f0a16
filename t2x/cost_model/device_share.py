"""What one device has of a step: of its weights, and of a microbatch.

Shape suffixes: none; letters are those of `flops`. A layer is described once
for all that are like it.
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
from t2x.parallel import sharding
from t2x.pipeline import instructions
from t2x.pipeline import plan as plan_lib
from t2x.training import train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
  """Layers that are alike.

  Attributes:
    tower: whose they are.
    member: their place in a unit of the tower.
    num: how many of a device run without stages: all of them.
    kind: of their attention.
    mlp: of their feed-forward.
    queries: T of a whole row.
    causal: whether a position sees the later ones.
    encoded: S of what they look at besides; None for no cross-attention.
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
    pattern = attention_kinds.pattern_of(self.kind, self.queries, self.causal)
    return mask_lib.Mask(pattern=pattern)

  def looks_by(self, cross: bool) -> attention_config.Softmax | None:
    """Returns the softmax attention of a layer; None where there is none."""
    kind = attention_kinds.for_cross(self.kind) if cross else self.kind
    return kind if isinstance(kind, attention_config.Softmax) else None


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
  weights: tuple[weight_shards.Weight, ...]
  plan: plan_lib.Plan | None
  stage: int = 0

  def of_stages(self) -> list[tuple['Local', int]]:
    """Returns this of stages that have other work, and how many have it."""
    if self.plan is None:
      return [(self, 1)]
    found: dict[tuple, list[Local]] = {}
    for stage in range(self.plan.table.num_stages):
      own = dataclasses.replace(self, stage=stage)
      work = tuple(
        own.runs(loop, tower.name, member)
        for loop in instructions.LOOPS
        for tower in self.plan.place.towers
        for member in range(tower.group)
      )
      found.setdefault(work, []).append(own)
    return [(alike[0], len(alike)) for alike in found.values()]

  def runs(self, loop: str, tower: str, member: int = 0) -> float:
    """Returns how often the stage runs a loop in a step.

    Args:
      loop: one of `instructions.LOOPS`: of a layer, it runs once for each of a
        tower's units and each microbatch.
      tower: its name; any for `leave`.
      member: a layer's place in its unit; the last unit may have fewer.
    """
    assert self.plan is not None
    times = stage_trips.times(
      self.plan, self.stage, loop, self._place_of(tower), member
    )
    return self.config.train.accumulate * float(times)

  @property
  def heads(self) -> float:
    """How often the head runs in a step."""
    if self.plan is None:
      return self.num_microbatches
    return self.runs('leave', self.plan.place.towers[-1].name)

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

  def split(self, weight: weight_shards.Weight) -> int:
    """Returns over how many devices `embed` splits a parameter."""
    return self.over('embed') if 'embed' in weight.axes else 1

  @property
  def itemsize(self) -> int:
    """Bytes of an activation's number."""
    return jnp.dtype(self.config.model.dtype).itemsize

  @property
  def by_hand(self) -> tuple[str, ...]:
    """Mesh axes over which gradients are reduced once, after all."""
    step = self.config.step_config
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
    return data_config.target_length(self.config.data)

  @property
  def tokens(self) -> float:
    """Tokens of a microbatch, of what is predicted."""
    return self.rows * self.length / self.over('length')

  @property
  def targets(self) -> float:
    """Predicted tokens of a microbatch, which reach the head."""
    data = self.config.data
    num = data_config.num_targets(data, data.length)
    return self.rows * num / self.over('length')

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
    has_encoder = 'encoder' in model.depths
    causal = has_encoder or not isinstance(model, encoder.EncoderConfig)
    source = data.length if has_encoder else self.length
    asked = data_config.num_targets(data, data.length)
    own = self.length + asked * model.is_two_stream
    # Tokens, whether they see earlier ones alone, what else they look at.
    towers = {
      'encoder': (source, False, None),
      'tower': (own, causal, None),
      'decoder': (self.length, True, source),
      'queries': (asked, False, self.length),
    }
    layers = (
      _layers(model, name, num, *towers[name])
      for name, num in model.depths.items()
    )
    return sum(layers, [])

  @property
  def num_layers(self) -> int:
    """Layers of all towers for which a device has room."""
    if self.plan is None:
      return sum(layer.num for layer in self.layers)
    towers = self.plan.place.towers
    return sum(self.slots(tower.name) * tower.group for tower in towers)


def _layers(model, tower, num, queries, causal, encoded) -> list[Layer]:
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

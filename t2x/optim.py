"""Optimizers and learning rate schedules, from optax where it has them.

Dimensions added by stacking layers are batch dimensions to every optimizer:
a stacked parameter is updated as its layers would be, one by one.
"""

import dataclasses
from typing import Any
from typing import ClassVar
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from t2x import checks
from t2x import optim_state
from t2x import sharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """A linear warmup from 0 to the learning rate, then a shape.

  Attributes:
    shape: `constant`; `cosine` or `linear` down to `final` of the peak at the
      last step; `inverse_sqrt`, proportional to 1 / sqrt(step); `wsd`,
      constant, then linear to `final` over the last `decay` of the steps (Hu
      et al., 2024).
    warmup_steps: steps of the warmup.
    final: share of the peak at the end.
    decay: share of the steps that `wsd` decays for.
  """

  shape: Literal['constant', 'cosine', 'linear', 'inverse_sqrt', 'wsd'] = (
    'cosine'
  )
  warmup_steps: int = 0
  final: float = 0.1
  decay: float = 0.2

  def __post_init__(self):
    checks.least(self, 'optim.schedule.', warmup_steps=0, final=0.0)
    if not 0.0 < self.decay <= 1.0:
      raise ValueError(f'optim.schedule.decay={self.decay}; it is in (0, 1].')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
  """What every optimizer has.

  Attributes:
    learning_rate: peak of the schedule.
    schedule: its course.
    clip_norm: the gradients' global norm is cut to this; None does not.
  """

  learning_rate: float = 1e-3
  schedule: Schedule = Schedule()
  clip_norm: float | None = 1.0

  def __post_init__(self):
    checks.positive(self, 'optim.', 'learning_rate', 'clip_norm')
    names = {f.name for f in dataclasses.fields(self)}
    shares = names & {'b1', 'b2', 'beta', 'momentum'}
    checks.share(self, 'optim.', *sorted(shares))
    checks.least(
      self, 'optim.', **dict.fromkeys(names & {'weight_decay', 'eps'}, 0.0)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
  """Kingma and Ba, 2015; with decoupled weight decay it is `AdamW`."""

  kind: ClassVar[str] = 'adam'
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decayed(Optimizer):
  """An optimizer whose update also shrinks the weights.

  Attributes:
    weight_decay: decoupled, times the learning rate; never on biases and
      norm scales.
  """

  weight_decay: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Decayed):
  """Loshchilov and Hutter, 2019."""

  kind: ClassVar[str] = 'adamw'
  weight_decay: float = 0.1
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor(Decayed):
  """Shazeer and Stern, 2018: second moments as rows and columns.

  Attributes:
    min_factored: matrices with two dimensions of at least this are factored.
    decay_rate: exponent of the second moment's decay, 1 - step ** -rate.
    scale_by_parameter: multiply updates by the parameter's root mean square.
  """

  kind: ClassVar[str] = 'adafactor'
  min_factored: int = 128
  decay_rate: float = 0.8
  scale_by_parameter: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lion(Decayed):
  """Chen et al., 2023."""

  kind: ClassVar[str] = 'lion'
  b1: float = 0.9
  b2: float = 0.99


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(Decayed):
  """Jordan et al., 2024: orthogonalised momentum for the layers' matrices.

  Embeddings, heads, norms and biases take Adam. Updates are scaled to the
  size of Adam's (Liu et al., 2025), so both share the learning rate.
  """

  kind: ClassVar[str] = 'muon'
  weight_decay: float = 0.1
  beta: float = 0.95
  b1: float = 0.9
  b2: float = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sgd(Decayed):
  """Gradient descent with momentum."""

  kind: ClassVar[str] = 'sgd'
  momentum: float = 0.9
  nesterov: bool = False


OptimConfig = Adam | AdamW | Adafactor | Lion | Muon | Sgd


def make_schedule(config: Optimizer, num_steps: int) -> optax.Schedule:
  """Returns step -> learning rate over a run of `num_steps`."""
  s, peak = config.schedule, config.learning_rate
  rest = max(num_steps - s.warmup_steps, 1)
  if s.shape == 'cosine':
    after = optax.cosine_decay_schedule(peak, rest, alpha=s.final)
  elif s.shape == 'linear':
    after = optax.linear_schedule(peak, peak * s.final, rest)
  elif s.shape == 'wsd':
    steps = max(int(num_steps * s.decay), 1)
    after = optax.linear_schedule(
      peak, peak * s.final, steps, transition_begin=max(rest - steps, 0)
    )
  elif s.shape == 'inverse_sqrt':
    start = max(s.warmup_steps, 1)
    # optax asks during the warmup too, for steps before 0.
    after = lambda step: peak * (start / jnp.maximum(step + start, 1)) ** 0.5
  else:
    after = optax.constant_schedule(peak)
  if not s.warmup_steps:
    return after
  # The first step takes 1 / warmup_steps of the peak, not 0.
  warmup = lambda step: peak * (step + 1) / s.warmup_steps
  return optax.join_schedules([warmup, after], [s.warmup_steps])


def make(config: OptimConfig, num_steps: int) -> optax.GradientTransformation:
  """Returns the optimizer: clip, scale, decay, learning rate."""
  rate = make_schedule(config, num_steps)
  parts = []
  if config.clip_norm is not None:
    parts.append(_clip(config.clip_norm))
  parts.append(_scaling(config))
  if isinstance(config, Decayed) and config.weight_decay:
    parts.append(optax.add_decayed_weights(config.weight_decay, is_decayed))
  parts.append(optax.scale_by_learning_rate(rate))
  return optax.chain(*parts)


def _clip(max_norm: float) -> optax.GradientTransformationExtraArgs:
  """`optax.clip_by_global_norm`, where the norm of all may be given."""

  def update(updates, state, params=None, *, norm=None, **_):
    del params
    norm = optax.tree.norm(updates) if norm is None else norm
    cut = lambda u: jnp.where(
      norm < max_norm, u, u / norm.astype(u.dtype) * max_norm
    )
    return jax.tree.map(cut, updates), state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _scaling(config: OptimConfig) -> optax.GradientTransformation:
  if isinstance(config, (Adam, AdamW)):
    return optax.scale_by_adam(config.b1, config.b2, config.eps)
  if isinstance(config, Lion):
    return optax.scale_by_lion(config.b1, config.b2)
  if isinstance(config, Adafactor):
    parts = [
      optax.scale_by_factored_rms(
        decay_rate=config.decay_rate,
        min_dim_size_to_factor=config.min_factored,
      ),
      optax.clip_by_block_rms(1.0),
    ]
    if config.scale_by_parameter:
      parts.append(optax.scale_by_param_block_rms())
    return optim_state.per_layer(optax.chain(*parts))
  if isinstance(config, Muon):
    muon = optax.chain(
      contrib.scale_by_muon(
        beta=config.beta, weight_dimension_numbers=muon_dimensions
      ),
      optax.stateless(_scale_to_adam),
    )
    adam = optax.scale_by_adam(config.b1, config.b2)
    return optax.partition({'muon': muon, 'adam': adam}, _muon_labels)
  assert isinstance(config, Sgd), config
  return optax.trace(config.momentum, config.nesterov)


def is_decayed(params: Any) -> Any:
  """Returns, for each parameter, whether weight decay applies to it.

  Biases (relative position biases among them) and norm scales are told by the
  names on their path.
  """

  def leaf(path, p):
    name = sharding.path_name(path).removesuffix('.value')
    spared = 'bias' in name or name.rpartition('.')[2] == 'scale'
    return jax.tree.map(lambda _: not spared, p)

  return jax.tree_util.tree_map_with_path(
    leaf, params, is_leaf=sharding.is_variable
  )


_MATRIX_OUT = {'heads', 'kv_heads', 'mlp'}


def muon_dimensions(params: Any) -> Any:
  """Returns `MuonDimensionNumbers` for each of the layers' matrices.

  A projection into heads reduces `embed`; one out of them reduces all but
  `embed`. Stacked dimensions and experts belong to neither and so are batch
  dimensions.
  """

  def leaf(p):
    axes = p.get_metadata('axes')
    stacked = len(p.shape) - len(axes)
    matrix = [i for i, a in enumerate(axes) if a != 'experts']
    embed = [i + stacked for i in matrix if axes[i] == 'embed']
    other = [i + stacked for i in matrix if axes[i] != 'embed']
    into = axes[matrix[0]] == 'embed'
    spec = contrib.MuonDimensionNumbers(
      *((embed, other) if into else (other, embed))
    )
    return p.replace(spec)

  return jax.tree.map(
    lambda p: leaf(p) if optim_state.has_value(p) else p,
    params,
    is_leaf=sharding.is_variable,
  )


def _scale_to_adam(updates: Any, params: Any = None) -> Any:
  """Gives orthogonal updates the root mean square of Adam's, about 0.2.

  Liu et al., 2025, equation 4.
  """
  del params

  def scale(u, spec):
    sizes = [
      np.prod([u.shape[i] for i in axes])
      for axes in (spec.reduction_axis, spec.output_axis)
    ]
    return u * (0.2 * float(max(sizes)) ** 0.5)

  return jax.tree.map(scale, updates, muon_dimensions(updates))


def _muon_labels(params: Any) -> Any:
  def leaf(p):
    axes = p.get_metadata('axes')
    muon = 'embed' in axes and bool(_MATRIX_OUT & set(axes))
    return jax.tree.map(lambda _: 'muon' if muon else 'adam', p)

  return jax.tree.map(leaf, params, is_leaf=sharding.is_variable)

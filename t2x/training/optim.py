"""Optimizers and learning rate schedules, from optax where it has them.

Dimensions added by stacking layers are batch dimensions to every optimizer:
a stacked parameter is updated as its layers would be, one by one.
"""

import dataclasses
import functools
from typing import Any
from typing import ClassVar
from typing import Literal

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from t2x import field_checks
from t2x.parallel import sharding
from t2x.training import optim_state
from t2x.training import rate_scaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """A linear warmup to the learning rate, then a shape.

  Of a run of N updates, counted i = 0 to N - 1, the w of the warmup take
  peak * (i + 1) / w, so that i = w - 1 takes the peak; without warmup i = 0
  does. What follows depends on the shape:

  - constant: the peak.
  - inverse_sqrt: peak * sqrt(max(w, 1) / (i + 1)).
  - linear: peak * (1 - p * (1 - final)), where p, the progress, goes in equal
    parts from 0 at the peak to 1 at i = N - 1.
  - cosine: peak * (final + (1 - final) * (1 + cos(pi * p)) / 2).
  - wsd: the peak, then linear over the last max(round(N * decay), 1) updates
    (Hu et al., 2024).

  The last three take peak * final at the last update, and past it: a warmup
  that leaves it no room is cut to N - 1 updates. The first two know no end.

  Attributes:
    shape: `constant`, `cosine`, `linear`, `inverse_sqrt` or `wsd`.
    warmup_steps: updates of the warmup.
    final: share of the peak that the last update takes.
    decay: share of the updates that `wsd` decays for.
  """

  shape: Literal['constant', 'cosine', 'linear', 'inverse_sqrt', 'wsd'] = (
    'cosine'
  )
  warmup_steps: int = 0
  final: float = 0.1
  decay: float = 0.2

  def __post_init__(self) -> None:
    field_checks.least(self, 'optim.schedule.', warmup_steps=0, final=0.0)
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

  def __post_init__(self) -> None:
    field_checks.positive(self, 'optim.', 'learning_rate', 'clip_norm')
    names = {f.name for f in dataclasses.fields(self)}
    shares = names & {'b1', 'b2', 'beta', 'momentum'}
    field_checks.share(self, 'optim.', *sorted(shares))
    field_checks.least(
      self, 'optim.', **dict.fromkeys(names & {'weight_decay', 'eps'}, 0.0)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
  """Kingma and Ba, 2015; with decoupled weight decay it is `AdamW`.

  Attributes:
    b1: decay rate of the first moment (the mean of gradients).
    b2: decay rate of the second moment (the mean of squared gradients).
    eps: number added to the root of the second moment before dividing by it.
  """

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
  """Loshchilov and Hutter, 2019.

  Attributes:
    b1: decay rate of the first moment (the mean of gradients).
    b2: decay rate of the second moment (the mean of squared gradients).
    eps: number added to the root of the second moment before dividing by it.
  """

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
  """Chen et al., 2023.

  Attributes:
    b1: weight of the momentum in the update, the rest being the gradient.
    b2: decay rate of the momentum.
  """

  kind: ClassVar[str] = 'lion'
  b1: float = 0.9
  b2: float = 0.99


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(Decayed):
  """Jordan et al., 2024: orthogonalised momentum for the layers' matrices.

  Embeddings, heads, norms and biases take Adam. Updates are scaled to the
  size of Adam's (Liu et al., 2025), so both share the learning rate.

  Attributes:
    beta: decay rate of the matrices' momentum.
    b1: first decay rate of Adam, for all other parameters.
    b2: second decay rate of Adam, for all other parameters.
  """

  kind: ClassVar[str] = 'muon'
  weight_decay: float = 0.1
  beta: float = 0.95
  b1: float = 0.9
  b2: float = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sgd(Decayed):
  """Gradient descent with momentum.

  Attributes:
    momentum: decay rate of the momentum.
    nesterov: whether the update is Nesterov's, which looks one step ahead.
  """

  kind: ClassVar[str] = 'sgd'
  momentum: float = 0.9
  nesterov: bool = False


OptimConfig = Adam | AdamW | Adafactor | Lion | Muon | Sgd


def make_schedule(config: Optimizer, num_steps: int) -> optax.Schedule:
  """Returns update (from 0) -> learning rate; see `Schedule`.

  Updates that are skipped are not counted (`num_updates`).

  Args:
    config: settings of the optimizer.
    num_steps: updates of the run.
  """
  s, peak = config.schedule, config.learning_rate
  warmup, last = warmup_updates(s, num_steps), num_steps - 1
  start = max(warmup - 1, 0)  # Takes the peak.
  if s.shape == 'wsd':
    start = max(start, last - max(round(num_steps * s.decay), 1))

  def rate(count: Any) -> jax.Array:
    if s.shape == 'constant':
      value = peak
    elif s.shape == 'inverse_sqrt':
      value = peak * (max(warmup, 1) / jnp.maximum(count + 1, 1)) ** 0.5
    else:
      left = (last - count) / max(last - start, 1)
      if s.shape == 'cosine':
        left = (1 - jnp.cos(jnp.pi * left)) / 2
      value = peak * (s.final + (1 - s.final) * left)
      value = jnp.where(count <= start, peak, value)
      # Exactly so, whatever a device makes of the formula.
      value = jnp.where(count >= last, peak * s.final, value)
    rising = peak * ((count + 1) / max(warmup, 1))
    return jnp.where(count < warmup - 1, rising, value)

  return rate


def warmup_updates(config: Schedule, num_steps: int) -> int:
  """Returns the updates of a warmup, cut so that the last one has room."""
  if config.shape in ('constant', 'inverse_sqrt'):
    return config.warmup_steps
  return min(config.warmup_steps, num_steps - 1)


def num_updates(opt_state: Any) -> jax.Array:
  """Returns the updates that an optimizer of `make` has counted.

  It is what its schedule goes by. An update that a non-finite value skipped is
  none, so that a run with k of them ends k updates before its schedule does.
  """
  return opt_state[-1].count


Numbers = dict[str, Any]  # Arrays, on the host or traced.
_SHORTEST = 1024  # Learning rates, that short runs share their programs.


def numbers_shapes(num_steps: int) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of `numbers_of`, which runs of like lengths share."""
  length = max(1 << (num_steps - 1).bit_length(), _SHORTEST)
  return {
    'rates': jax.ShapeDtypeStruct((length,), jnp.float32),
    'weight_decay': jax.ShapeDtypeStruct((), jnp.float32),
  }


def numbers_of(config: OptimConfig, num_steps: int) -> Numbers:
  """Returns the numbers of an optimizer that its program is given as arrays.

  Runs that differ in them alone share one compiled program.

  Args:
    config: settings of the optimizer.
    num_steps: updates of the run.

  Returns:
    `rates`, the learning rate of each update, (N,), where N is the next power
    of two and at least 1,024, past the end that of the last; and
    `weight_decay`, 0 for an optimizer without any.
  """
  (length,) = numbers_shapes(num_steps)['rates'].shape
  schedule = make_schedule(config, num_steps)
  updates = np.arange(length)
  rates = jax.jit(lambda n: jnp.asarray(schedule(n), jnp.float32))(updates)
  decay = config.weight_decay if isinstance(config, Decayed) else 0.0
  return {
    'rates': rates,
    'weight_decay': np.float32(decay),
  }


def make(
  config: OptimConfig,
  num_steps: int,
  numbers: Numbers | None = None,
  scaling: rate_scaling.RateScaling | None = None,
) -> optax.GradientTransformation:
  """Returns the optimizer: clip, scale, decay, learning rate.

  Args:
    config: settings of the optimizer.
    num_steps: updates of the run.
    numbers: the numbers of `numbers_of`, traced or not, that replace those of
      `config`; None keeps these.
    scaling: factors of the learning rates of each parameter, by width and
      depth; None for none.

  Raises:
    ValueError: `scaling` is given, and the optimizer has no rule for it.
  """
  rate = make_schedule(config, num_steps)
  if numbers is not None:
    rates = numbers['rates']
    rate = lambda count: rates[jnp.minimum(count, rates.shape[0] - 1)]
  parts = []
  if config.clip_norm is not None:
    parts.append(_clip(config.clip_norm))
  parts.append(_scaling(config))
  if scaling is not None:
    rule = width_rule(config)
    parts.append(optax.stateless(functools.partial(scaling.by_width, rule)))
  if isinstance(config, Decayed) and config.weight_decay:
    decay = numbers['weight_decay'] if numbers else config.weight_decay
    parts.append(optax.add_decayed_weights(decay, is_decayed))
  if scaling is not None:
    parts.append(optax.stateless(scaling.by_depth))
  parts.append(optax.scale_by_learning_rate(rate))
  return optax.chain(*parts)


def width_rule(config: OptimConfig) -> rate_scaling.WidthPowers:
  """Returns the powers of the width by which an optimizer's rates scale.

  An update of Adam or Lion has entries of about the same size, whatever that of
  the gradient; those of a matrix add up over its inputs. Adafactor's follow the
  parameter's root mean square, itself smaller by the square root of the width;
  Muon's, of one singular value, grow with that root.

  Raises:
    ValueError: it is SGD, for which there is none.
  """
  if isinstance(config, Muon):
    return rate_scaling.WidthPowers(matrix=-1.0, orthogonal=-0.5)
  if isinstance(config, Adafactor) and config.scale_by_parameter:
    return rate_scaling.WidthPowers(matrix=-0.5)
  if isinstance(config, Sgd):
    raise ValueError(
      'optim=sgd with model.mup: its updates are as large as the gradients, so '
      'that rates scale otherwise for each kind of parameter, and no rule for '
      'that is here. Choose another optimizer, or set model.mup=none.'
    )
  return rate_scaling.WidthPowers(matrix=-1.0)


def _clip(max_norm: float) -> optax.GradientTransformationExtraArgs:
  """`optax.clip_by_global_norm`, where the norm of all may be given."""

  def update(
    updates: optax.Updates,
    state: Any,
    params: optax.Params | None = None,
    *,
    norm: jax.Array | None = None,
    **_: Any,
  ) -> tuple[optax.Updates, Any]:
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


def is_decayed(params: optax.Params) -> Any:
  """Returns, for each parameter, whether weight decay applies to it.

  Biases (relative position biases among them) and norm scales are told by the
  names on their path.
  """

  def leaf(path: jax.tree_util.KeyPath, p: nnx.Variable) -> Any:
    name = sharding.path_name(path).removesuffix('.value')
    spared = 'bias' in name or name.rpartition('.')[2] == 'scale'
    return jax.tree.map(lambda _: not spared, p)

  return jax.tree_util.tree_map_with_path(
    leaf, params, is_leaf=sharding.is_variable
  )


def muon_dimensions(params: optax.Params) -> Any:
  """Returns `MuonDimensionNumbers` for each of the layers' matrices.

  A projection into heads reduces `embed`; one out of them reduces all but
  `embed`. Stacked dimensions and experts belong to neither and so are batch
  dimensions.
  """

  def leaf(p: nnx.Variable) -> nnx.Variable:
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


def _scale_to_adam(
  updates: optax.Updates, params: optax.Params | None = None
) -> optax.Updates:
  """Gives orthogonal updates the root mean square of Adam's, about 0.2.

  Liu et al., 2025, equation 4.
  """
  del params

  def scale(u: jax.Array, spec: Any) -> jax.Array:
    sizes = [
      np.prod([u.shape[i] for i in axes])
      for axes in (spec.reduction_axis, spec.output_axis)
    ]
    return u * (0.2 * float(max(sizes)) ** 0.5)

  return jax.tree.map(scale, updates, muon_dimensions(updates))


def _muon_labels(params: optax.Params) -> Any:
  def leaf(p: nnx.Variable) -> Any:
    muon = rate_scaling.is_orthogonalised(p)
    return jax.tree.map(lambda _: 'muon' if muon else 'adam', p)

  return jax.tree.map(leaf, params, is_leaf=sharding.is_variable)

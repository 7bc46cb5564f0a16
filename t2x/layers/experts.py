"""The experts' feed-forward layers, across the devices that hold them.

Experts are split over the mesh axes of `rules.experts`, which may also split
the rows of a batch. With a capacity, a fixed number of slots is sent to their
experts and back by all-to-all exchanges (Lepikhin et al., 2021). Without a
capacity, all tokens of other devices may go to one device, and buffers for that
case are as large as an all-gather of the tokens. So tokens are gathered, each
device computes its own experts, and the outputs are summed and scattered.

Shape suffixes: B batch, T position, E experts, C slots of an expert, J choices
of a token, P pairs of token and choice, D embed, F feed-forward.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from t2x.layers import mlp
from t2x.layers import param
from t2x.layers import routing
from t2x.parallel import manual_sharding
from t2x.parallel import sharding

Weights = dict[str, jax.Array]
Routed = routing.Choices | routing.Slots


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Axes:
  """Mesh axes of more than one device, by the dimensions that they split.

  Attributes:
    batch: axes that split rows.
    length: axes that split positions.
    fine: axes that split positions between layers only
      (t2x/layers/sequence_parallel.py).
    exchanged: axes that split experts and rows; tokens are sent to their
      experts.
    experts_only: axes that split experts and no tokens; each device has the
      tokens that it needs.
    hidden: axes that split the experts' width F and no tokens.
  """

  batch: tuple[str, ...]
  length: tuple[str, ...]
  fine: tuple[str, ...]
  exchanged: tuple[str, ...]
  experts_only: tuple[str, ...]
  hidden: tuple[str, ...]


def check_axes(
  experts: Sequence[str], batch: Sequence[str], length: Sequence[str]
) -> None:
  """Checks that the axes of experts split either all of the batch or no tokens.

  Args:
    experts: mesh axes of more than one device that split the experts.
    batch: mesh axes of more than one device that split rows.
    length: mesh axes of more than one device that split positions.

  Raises:
    ShardingError: they split only some of the tokens.
  """
  shared = set(experts) & set(batch)
  if (shared and shared != set(experts)) or set(experts) & set(length):
    raise sharding.ShardingError(
      f'rules.experts={",".join(experts)} with rules.batch={",".join(batch)} '
      f'and rules.length={",".join(length)}: the axes of experts must either '
      'all split the batch or split no tokens at all. Set rules.experts=expert.'
    )


def _axes() -> _Axes:
  batch, length = map(manual_sharding.auto_axes, ('batch', 'length'))
  experts, hidden = map(manual_sharding.auto_axes, ('experts', 'mlp'))
  check_axes(experts, batch, length)
  return _Axes(
    batch=batch,
    length=length,
    fine=manual_sharding.fine_axes(),
    exchanged=tuple(a for a in experts if a in batch),
    experts_only=tuple(a for a in experts if a not in batch),
    hidden=tuple(a for a in hidden if a not in (*batch, *length)),
  )


def run(
  weights: dict[str, nnx.Variable],
  x_BTD: jax.Array,
  routed: Routed,
  config: mlp.MlpConfig,
) -> jax.Array:
  """Returns the weighted sum of the outputs of each token's experts.

  Args:
    weights: up_EDF, down_EFD, and where the layer has them gate_EDF,
      up_bias_EF and down_bias_ED; sharded by the active rules.
    x_BTD: input, whole or split along the sequence.
    routed: choices or slots of whole rows.
    config: config that gives the activation function.

  Raises:
    ShardingError: experts on mesh axes that split only some of the tokens.
  """
  axes, every = _axes(), manual_sharding.all_auto_axes()
  body = functools.partial(_local, axes=axes, config=config)
  values = {name: w[...] for name, w in weights.items()}
  if not every:
    return body(values, x_BTD, routed)
  # Kernels need a `shard_map` over all axes, those of one device too.
  specs = {n: manual_sharding.manual_spec(w, every) for n, w in weights.items()}
  x_spec = P(axes.batch, (*axes.length, *axes.fine))
  # The token of a slot may be anywhere in its row; a choice is with its token.
  whole = isinstance(routed, routing.Slots)
  routed_spec = P(axes.batch) if whole else P(axes.batch, axes.length)

  def local(parts: Weights, x_BTD: jax.Array, routed: Routed) -> jax.Array:
    gathered = {n: _gather(w, specs[n], axes, x_BTD) for n, w in parts.items()}
    return body(gathered, x_BTD, routed)

  return jax.shard_map(
    local,
    in_specs=(specs, x_spec, routed_spec),
    out_specs=x_spec,
    axis_names={*manual_sharding.free_axes()},
    check_vma=False,
  )(values, x_BTD, routed)


def _gather(
  weight: jax.Array, spec: P, axes: _Axes, x_BTD: jax.Array
) -> jax.Array:
  """Gathers a weight along all dimensions but experts and their width."""
  if not sharding.reduces_in_float32():
    weight = weight.astype(x_BTD.dtype)
  kept = {*axes.exchanged, *axes.experts_only, *axes.hidden}
  for dim, entry in enumerate(spec):
    split = tuple(a for a in sharding.mesh_axes(entry) if a not in kept)
    if split:
      weight = jax.lax.all_gather(weight, split, axis=dim, tiled=True)
  return weight


def _local(
  weights: Weights,
  x_BTD: jax.Array,
  routed: Routed,
  *,
  axes: _Axes,
  config: mlp.MlpConfig,
) -> jax.Array:
  """Computes the layer for one device's tokens."""
  if axes.fine:
    x_BTD = jax.lax.all_gather(x_BTD, axes.fine, axis=1, tiled=True)
  if axes.hidden and 'down_bias_ED' in weights:
    # The outputs of these devices are summed, and the bias counts once.
    first = jax.lax.axis_index(axes.hidden) == 0
    bias_ED = jnp.where(first, weights['down_bias_ED'], 0.0)
    weights = {**weights, 'down_bias_ED': bias_ED}
  if isinstance(routed, routing.Slots):
    out_BTD = _by_slots(weights, x_BTD, routed, axes, config)
  else:
    out_BTD = _by_choices(weights, x_BTD, routed, axes, config)
  out_BTD = out_BTD.astype(x_BTD.dtype)
  # Devices that split experts or their width have terms of one sum.
  parts = (*axes.experts_only, *axes.hidden)
  summed = tuple(a for a in parts if a not in axes.fine)
  if summed:
    out_BTD = jnp.asarray(manual_sharding.sum_parts(out_BTD, summed))
  if axes.fine:
    same = tuple(a for a in axes.fine if a not in parts)
    out_BTD = out_BTD / manual_sharding.size(same) if same else out_BTD
    out_BTD = jax.lax.psum_scatter(
      out_BTD, axes.fine, scatter_dimension=1, tiled=True
    )
  return out_BTD


def _by_slots(
  weights: Weights,
  x_BTD: jax.Array,
  slots: routing.Slots,
  axes: _Axes,
  config: mlp.MlpConfig,
) -> jax.Array:
  length = x_BTD.shape[1]
  if axes.experts_only:
    slots = routing.Slots(*(_part(a, axes.experts_only, 1) for a in slots))
  tokens_BEC, weights_BEC = slots
  num_slots = tokens_BEC.shape[-1]
  if axes.length:
    tokens_BEC = tokens_BEC - jax.lax.axis_index(axes.length) * length
  elsewhere = (tokens_BEC < 0) | (tokens_BEC >= length)
  tokens_BEC = jnp.where(elsewhere, length, tokens_BEC)
  take = lambda x_TD, i: x_TD.at[i].get(mode='fill', fill_value=0)
  x_BECD = jax.vmap(take)(x_BTD, tokens_BEC)
  if axes.length:
    # Each device has some tokens of a row, and computes some of its slots.
    padding = -num_slots % manual_sharding.size(axes.length)
    x_BECD = jnp.pad(x_BECD, ((0, 0), (0, 0), (0, padding), (0, 0)))
    x_BECD = jax.lax.psum_scatter(
      x_BECD, axes.length, scatter_dimension=2, tiled=True
    )
  if axes.exchanged:
    x_BECD = _all_to_all(x_BECD, axes.exchanged, 1, 0)
  out_BECD = _feed_forward(
    weights,
    x_BECD,
    param.project,
    ('BECD,EDF->BECF', 'BECF,EFD->BECD'),
    lambda bias_EF: bias_EF[None, :, None],
    config,
  )
  if axes.exchanged:
    out_BECD = _all_to_all(out_BECD, axes.exchanged, 0, 1)
  if axes.length:
    out_BECD = jax.lax.all_gather(out_BECD, axes.length, axis=2, tiled=True)
    out_BECD = out_BECD[:, :, :num_slots]
  out_BECD = out_BECD.astype(jnp.float32) * weights_BEC[..., None]
  zeros = jnp.zeros(x_BTD.shape, jnp.float32)
  add = lambda zeros_TD, i, out: zeros_TD.at[i].add(out, mode='drop')
  return jax.vmap(add)(zeros, tokens_BEC, out_BECD)


def _by_choices(
  weights: Weights,
  x_BTD: jax.Array,
  choices: routing.Choices,
  axes: _Axes,
  config: mlp.MlpConfig,
) -> jax.Array:
  experts_BTJ, weights_BTJ = choices
  if axes.exchanged:
    gather = functools.partial(
      jax.lax.all_gather, axis_name=axes.exchanged, axis=0, tiled=True
    )
    x_BTD, experts_BTJ, weights_BTJ = map(
      gather, (x_BTD, experts_BTJ, weights_BTJ)
    )
  first = 0
  num_experts, D, _ = weights['up_EDF'].shape
  if axes.exchanged or axes.experts_only:
    first = (
      jax.lax.axis_index((*axes.exchanged, *axes.experts_only)) * num_experts
    )
  top_k = experts_BTJ.shape[-1]
  # Numbers among this device's experts; experts of other devices become E.
  local = experts_BTJ.reshape(-1) - first
  local = jnp.where((local < 0) | (local >= num_experts), num_experts, local)
  # Sorted by expert, with those of other devices last. The length is that of
  # the largest possible number of choices of this device's experts.
  most = local.size // top_k * min(top_k, num_experts)
  order_P = jnp.argsort(local)[:most]
  experts_P = local[order_P]
  sizes_E = jnp.bincount(local, length=num_experts + 1)[:num_experts]
  # The mean over devices: each choice belongs to one of them.
  num_rows = local.size // manual_sharding.size(
    (*axes.exchanged, *axes.experts_only)
  )
  token_P = order_P // top_k
  x_ND = x_BTD.reshape(-1, D)
  out_PD = _feed_forward(
    weights,
    x_ND[token_P],
    lambda x, w, spec: param.project_groups(x, w, sizes_E, num_rows),
    ('', ''),
    lambda bias_EF: bias_EF[experts_P],
    config,
  )
  # Rows of no group are zeros to which a bias may have been added.
  used_P1 = (experts_P < num_experts)[:, None]
  weights_P1 = weights_BTJ.reshape(-1)[order_P][:, None]
  out_PD = jnp.where(used_P1, out_PD.astype(jnp.float32), 0.0) * weights_P1
  out_ND = jnp.zeros(x_ND.shape, jnp.float32).at[token_P].add(out_PD)
  out_BTD = out_ND.reshape(x_BTD.shape).astype(x_BTD.dtype)
  if axes.exchanged:
    out_BTD = jax.lax.psum_scatter(
      out_BTD, axes.exchanged, scatter_dimension=0, tiled=True
    )
  return out_BTD


def _feed_forward(
  weights: Weights,
  x: jax.Array,
  product: Callable[[jax.Array, jax.Array, str], jax.Array],
  specs: tuple[str, str],
  bias_of: Callable[[jax.Array], jax.Array],
  config: mlp.MlpConfig,
) -> jax.Array:
  """Returns act(x up) down of each expert, or act(x gate) * (x up) down.

  Args:
    weights: weights of the experts.
    x: input, in the layout of `product`.
    product: function of an input, a weight and a spec, that returns their
      product for each expert.
    specs: the specs of the first and of the last product.
    bias_of: function from a bias of each expert to one that broadcasts with a
      product.
    config: config that gives the activation function.
  """
  into, out = specs
  up = product(x, weights['up_EDF'], into)
  if 'up_bias_EF' in weights:
    up = up + bias_of(weights['up_bias_EF']).astype(up.dtype)
  up = checkpoint_name(up, 'mlp_up')
  if 'gate_EDF' in weights:
    gate = product(x, weights['gate_EDF'], into)
    gate = checkpoint_name(gate, 'mlp_gate')
    hidden = mlp.activation(config.activation, gate) * up
  else:
    hidden = mlp.activation(config.activation, up)
  y = product(hidden, weights['down_EFD'], out)
  if 'down_bias_ED' in weights:
    y = y + bias_of(weights['down_bias_ED']).astype(y.dtype)
  return y


def _all_to_all(
  x: jax.Array, axes: tuple[str, ...], split: int, concat: int
) -> jax.Array:
  return jax.lax.all_to_all(x, axes, split, concat, tiled=True)


def _part(x: jax.Array, axes: tuple[str, ...], dim: int) -> jax.Array:
  size = x.shape[dim] // manual_sharding.size(axes)
  start = jax.lax.axis_index(axes) * size
  return jax.lax.dynamic_slice_in_dim(x, start, size, dim)

"""Ring attention: keys and values travel round the devices of a sequence.

Each device of a mesh axis holds a piece of the sequence (in zigzag order an
early and a late piece). Keys and values go round by collective-permute, and a
device merges its results for each visiting piece by their log-sum-exp (Liu et
al., 2023, "Ring attention with blockwise transformers"). Pieces that no query
of a step sees are not computed and, past the reach of a window, not sent. The
backward pass goes round again with the gradients of keys and values beside
them, so that no device ever holds more than its own piece and a visiting one.

Shape suffixes: B batch, T query position, S key position, N query heads, K
key/value heads, H head dim, P pieces on a device. C is the number of devices.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
from typing import Any
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from t2x.attention import dense
from t2x.attention import mask as mask_lib
from t2x.attention import ring_plan
from t2x.parallel import sharding

BLOCK = 128  # Number of queries in a block, which fill a matrix unit.
RUNS = 4  # Number of key ranges along the diagonal.

Tree = TypeVar('Tree')
_QKV = tuple[jax.Array, jax.Array, jax.Array]
_Residuals = tuple[Any, ...]
# Segments and prefixes of keys.
_OfKeys = tuple[jax.Array | None, jax.Array | None]


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask: mask_lib.Mask,
  axis: str,
  options: dense.AttentionOptions = dense.AttentionOptions(),
) -> jax.Array:
  """Attends as `context.attend` in rows that a mesh axis splits.

  Args:
    q_BTNH: queries, split along the sequence.
    k_BSKH: keys, split along the sequence.
    v_BSKH: values, split along the sequence.
    mask: description of the keys that each query sees, without indices.
    axis: mesh axis that splits the sequence.
    options: the options of `dense.attend`.
  """
  assert mask.q_index_BT is None and mask.k_index_BS is None, 'a cache?'
  # With blocks of a fixed size, memory does not grow with the pieces.
  options = dataclasses.replace(
    options, block=options.block or BLOCK, runs=RUNS
  )
  return _attend(axis, (q_BTNH, k_BSKH, v_BSKH), options, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
  axis: str,
  qkv: _QKV,
  options: dense.AttentionOptions,
  mask: mask_lib.Mask,
) -> jax.Array:
  return _forward(axis, qkv, options, mask)[0]


def _forward(
  axis: str,
  qkv: _QKV,
  options: dense.AttentionOptions,
  mask: mask_lib.Mask,
) -> tuple[jax.Array, _Residuals]:
  split = P(None, axis)
  specs = (split, P(), mask_lib.specs(mask, axis))
  fn = _manual(_travel, axis, specs, (split, split))
  out, lse = fn(qkv, options, mask)
  return out, (qkv, options, mask, out, lse)


def _backward(
  axis: str, residuals: _Residuals, d_out: jax.Array
) -> tuple[_QKV, dense.AttentionOptions, None]:
  qkv, options, mask, out, lse = residuals
  split = P(None, axis)
  specs = (split, P(), mask_lib.specs(mask, axis), split, split, split)
  fn = _manual(_travel_back, axis, specs, (split, P()))
  d_qkv, d_bias = fn(qkv, options, mask, out, lse, d_out)
  return d_qkv, dataclasses.replace(options, bias=d_bias, dropout=None), None


_attend.defvjp(_forward, _backward)


def _manual(
  fn: Callable[..., Any], axis: str, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
  """Wraps `fn` in a `shard_map` over the axis of the ring alone."""
  return jax.shard_map(
    functools.partial(fn, axis),
    in_specs=in_specs,
    out_specs=out_specs,
    axis_names={axis},
    check_vma=False,
  )


class _Place:
  """A device's place in the ring: its own pieces, and those that visit it."""

  def __init__(
    self, axis: str, mask: mask_lib.Mask, num_queries: int, num_keys: int
  ):
    self.axis = axis
    self.size = jax.lax.axis_size(axis)
    self.rank = jax.lax.axis_index(axis)
    self.mask = mask
    T, S = num_queries * self.size, num_keys * self.size
    self.steps = ring_plan.plan(mask, T, S, self.size)
    self.q_starts, self.q_size = ring_plan.stretches(
      T, self.size, mask.q_zigzag
    )
    self.k_starts, self.k_size = ring_plan.stretches(
      S, self.size, mask.k_zigzag
    )

  def of(self, table_C: np.ndarray) -> jax.Array | int:
    """Returns this device's entry of a table; an int if all are the same."""
    if (table_C == table_C[0]).all():
      return int(table_C[0])
    return jnp.asarray(table_C)[self.rank]

  def hop(self, visitor: Tree, distance: int) -> Tree:
    """Sends visiting arrays `distance` devices on."""
    if distance % self.size == 0:
      return visitor
    pairs = [(i, (i + distance) % self.size) for i in range(self.size)]
    return jax.lax.ppermute(visitor, self.axis, pairs)

  def q_pieces(self, x: jax.Array) -> jax.Array:
    """Cuts arrays of queries, (B, T, ...), into pieces (B, P, T / P, ...)."""
    return _pieces(x, self.q_starts.shape[1])

  def k_pieces(self, x: jax.Array) -> jax.Array:
    """Cuts arrays of keys, (B, S, ...), into pieces (B, P, S / P, ...)."""
    return _pieces(x, self.k_starts.shape[1])

  @property
  def of_keys(self) -> _OfKeys:
    """Segments and prefixes of this device's keys, which travel with them."""
    return self.mask.k_segments_BS, self.mask.own_prefix_BS

  def mask_of(
    self, step: ring_plan.RingStep, slot: ring_plan.Slot, of_keys: _OfKeys
  ) -> mask_lib.Mask:
    """Returns the mask of one pair of pieces.

    Args:
      step: step of the ring.
      slot: pair of pieces.
      of_keys: segments and prefixes of the visiting keys, in pieces.
    """
    mask, devices = self.mask, np.arange(self.size)
    k_segments, prefix = of_keys
    segments = {}
    if mask.q_segments_BT is not None and k_segments is not None:
      q_segments = self.q_pieces(mask.q_segments_BT)
      segments['q_segments_BT'] = _get(q_segments, self.of(slot.q_C))
      segments['k_segments_BS'] = _get(k_segments, self.of(slot.k_C))
    q_start = self.of(self.q_starts[devices, slot.q_C])
    sources = (devices - step.shift) % self.size
    k_start = self.of(self.k_starts[sources, slot.k_C])
    order = {'pattern': mask.pattern, 'prefix_BS': mask.prefix_BS}
    if prefix is not None:
      order['prefix_BS'] = _get(prefix, self.of(slot.k_C))
    if slot.diagonal and mask.pattern.is_relative:
      return mask_lib.Mask(**order, **segments, start=jnp.asarray(q_start))
    index = {
      'q_index_BT': (jnp.arange(self.q_size) + q_start)[None],
      'k_index_BS': (jnp.arange(self.k_size) + k_start)[None],
    }
    if (slot.seen_C != ring_plan.SOME).all():
      return mask_lib.Mask(**index, **segments)
    return mask_lib.Mask(**order, **index, **segments)

  def where_seen(
    self,
    slot: ring_plan.Slot,
    fn: Callable[..., Any],
    args: Sequence[jax.Array],
    empty: Any,
  ) -> Any:
    """Returns fn(*args), or `empty` without computing if nothing is seen.

    Args:
      slot: pair of pieces.
      fn: function of `args`.
      args: arrays.
      empty: tree prefix of numbers that fill the result if nothing is seen.
    """
    if (slot.seen_C != ring_plan.NONE).all():
      return fn(*args)
    shapes = jax.eval_shape(fn, *args)
    fill = lambda value, part: jax.tree.map(
      lambda a: jnp.full(a.shape, value, a.dtype), part
    )
    nothing = lambda *args: jax.tree.map(fill, empty, shapes)
    seen = jnp.asarray(slot.seen_C != ring_plan.NONE)[self.rank]
    return jax.lax.cond(seen, fn, nothing, *args)


def _pieces(x: jax.Array, num: int) -> jax.Array:
  return x.reshape(x.shape[0], num, -1, *x.shape[2:])


def _whole(x: jax.Array) -> jax.Array:
  return x.reshape(x.shape[0], -1, *x.shape[3:])


def _get(x: jax.Array, piece: jax.Array | int) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(x, piece, 1, keepdims=False)


def _set(x: jax.Array, value: jax.Array, piece: jax.Array | int) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(x, value, piece, 1)


def _travel(
  axis: str,
  qkv: _QKV,
  options: dense.AttentionOptions,
  mask: mask_lib.Mask,
) -> dense.Part:
  """Returns the output and the log-sum-exp of this device's queries."""
  q, k, v = qkv
  place = _Place(axis, mask, q.shape[1], k.shape[1])
  q, visitor = place.q_pieces(q), (k, v, place.of_keys)
  out = jnp.zeros((*q.shape[:-1], v.shape[-1]), jnp.float32)
  lse = jnp.full(q.shape[:-1], dense.NEVER, jnp.float32)
  at = 0
  for step in place.steps:
    visitor, at = place.hop(visitor, step.shift - at), step.shift
    k, v, of_keys = jax.tree.map(place.k_pieces, visitor)
    for slot in step.slots:
      q_piece, k_piece = place.of(slot.q_C), place.of(slot.k_C)

      def attend_pair(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: mask_lib.Mask = place.mask_of(step, slot, of_keys),
      ) -> dense.Part:
        return dense.attend_part(q, k, v, mask, options)

      args = _get(q, q_piece), _get(k, k_piece), _get(v, k_piece)
      new = place.where_seen(slot, attend_pair, args, (0.0, dense.NEVER))
      old = _get(out, q_piece), _get(lse, q_piece)
      merged = dense.merge(old, new)
      out, lse = _set(out, merged[0], q_piece), _set(lse, merged[1], q_piece)
  return _whole(out).astype(q.dtype), _whole(lse)


def _travel_back(
  axis: str,
  qkv: _QKV,
  options: dense.AttentionOptions,
  mask: mask_lib.Mask,
  out: jax.Array,
  lse: jax.Array,
  d_out: jax.Array,
) -> tuple[_QKV, Any]:
  """Returns the gradients of this device's queries, keys and values, and bias.

  The gradient of the bias is the sum over all devices.
  """
  q, k, v = qkv
  place = _Place(axis, mask, q.shape[1], k.shape[1])
  d_out = d_out.astype(jnp.float32)
  delta = (d_out * out.astype(jnp.float32)).sum(-1)
  queries = jax.tree.map(place.q_pieces, (q, lse, d_out, delta))
  d_q = jnp.zeros(queries[0].shape, jnp.float32)
  d_bias = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), options.bias)
  visitor = k, v, place.of_keys
  dtype = jnp.float32 if sharding.reduces_in_float32() else k.dtype
  zeros = lambda a: jnp.zeros(place.k_pieces(a).shape, dtype)
  d_kv, at = (zeros(k), zeros(v)), 0
  for step in place.steps:
    moved = place.hop((visitor, d_kv), step.shift - at)
    (visitor, d_kv), at = moved, step.shift
    k, v, of_keys = jax.tree.map(place.k_pieces, visitor)
    d_kv = jax.tree.map(lambda a: a.astype(jnp.float32), d_kv)
    for slot in step.slots:
      q_piece, k_piece = place.of(slot.q_C), place.of(slot.k_C)

      def pair_gradients(
        q: jax.Array,
        lse: jax.Array,
        d_out: jax.Array,
        delta: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: mask_lib.Mask = place.mask_of(step, slot, of_keys),
      ) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
        fn = lambda q, k, v, bias: dense.weighted(
          q, k, v, lse, mask, dataclasses.replace(options, bias=bias)
        )
        return jax.vjp(fn, q, k, v, options.bias)[1]((d_out, -delta))

      args = [_get(a, q_piece) for a in queries]
      args += [_get(k, k_piece), _get(v, k_piece)]
      new_q, *new_kv, new_bias = place.where_seen(
        slot, pair_gradients, args, 0.0
      )
      add = lambda a, b, i: _set(a, _get(a, i) + b, i)
      d_q = add(d_q, new_q, q_piece)
      d_kv = [add(a, b, k_piece) for a, b in zip(d_kv, new_kv)]
      d_bias = jax.tree.map(jnp.add, d_bias, new_bias)
    d_kv = jax.tree.map(lambda a: a.astype(dtype), tuple(d_kv))
  d_k, d_v = place.hop(d_kv, -at)
  d_bias = jax.lax.psum(d_bias, axis)
  d_bias = jax.tree.map(lambda a, b: a.astype(b.dtype), d_bias, options.bias)
  d_k, d_v = (_whole(a).astype(k.dtype) for a in (d_k, d_v))
  return (_whole(d_q).astype(q.dtype), d_k, d_v), d_bias

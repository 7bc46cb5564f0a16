"""Attention over a sequence that is whole or split over a mesh axis."""

from typing import Protocol

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from t2x.attention import all_to_all
from t2x.attention import dense
from t2x.attention import kernels
from t2x.attention import mask as mask_lib
from t2x.attention import ring
from t2x.attention import splash
from t2x.parallel import manual_sharding
from t2x.parallel import sharding


class Mixer(Protocol):
  """Mixes values by queries and keys, in the place of softmax attention.

  A module; its kinds are in `t2x/layers/attention_kinds.py`.
  """

  def __call__(
    self,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    mask: mask_lib.Mask,
    heads_N: jax.Array,
  ) -> jax.Array:
    """Returns (B, T, N, H) of a sequence that attends to itself.

    Args:
      q_BTNH: queries.
      k_BTKH: keys.
      v_BTKH: values.
      mask: mask that is causal or shows everything, with segments or none.
      heads_N: numbers of the query heads among all of the layer.
    """
    ...


def mix(
  mixer: Mixer,
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  mask: mask_lib.Mask,
  heads_N: jax.Array,
) -> jax.Array:
  """Applies a mixer to whole rows, also where a mesh axis splits the rows.

  Args:
    mixer: the mixer.
    q_BTNH: queries.
    k_BTKH: keys.
    v_BTKH: values.
    mask: mask of a sequence that attends to itself.
    heads_N: numbers of the query heads among all of the layer.

  Returns:
    (B, T, N, H).

  Raises:
    ValueError: the mask has a prefix, ranks or indices.
    ShardingError: a mesh axis splits rows, and `rules.context_attention` is not
      all_to_all.
  """
  check_plain(mask)
  axes = manual_sharding.auto_axes('length')
  if not axes:
    return mixer(q_BTNH, k_BTKH, v_BTKH, mask, heads_N)
  axis = _one(axes)
  if sharding.active_rules().context_attention != 'all_to_all':
    raise sharding.ShardingError(NEEDS_EXCHANGE)

  def whole_rows(
    extra: tuple[Mixer, jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: mask_lib.Mask,
    heads_KG: jax.Array,
  ) -> jax.Array:
    mixer, heads_N = extra
    return mixer(q, k, v, mask, jnp.take(heads_N, heads_KG.reshape(-1)))

  extra = mixer, heads_N
  return all_to_all.apply(whole_rows, extra, q_BTNH, k_BTKH, v_BTKH, mask, axis)


def check_plain(mask: mask_lib.Mask) -> None:
  """Raises ValueError for a mask that attention without scores cannot apply."""
  given = [
    name
    for name in ('prefix_BS', 'q_ranks_BT', 'q_index_BT', 'k_index_BS')
    if getattr(mask, name) is not None
  ]
  if given:
    raise ValueError(
      f'A mask with {", ".join(given)}: kinds of attention without scores '
      '(linear, performer, regional, linformer, nystromformer, convolution) '
      'know the order of whole rows and their segments, no prefixes, ranks or '
      'places. Leave it out, or choose a softmax kind.'
    )


def _check_split(mask: mask_lib.Mask, axis: str) -> None:
  """Raises ShardingError for a mask that needs whole rows on each device."""
  placed = mask.q_index_BT is not None or mask.k_index_BS is not None
  if placed or mask.goes_by_rank:
    raise sharding.ShardingError(
      f'A mask with {"ranks" if mask.goes_by_rank else "places"} of tokens is '
      f'of whole rows, and mesh.{axis} splits them. Set rules.length=none.'
    )


NEEDS_EXCHANGE = (
  'a ring of devices passes keys of softmax attention on; of other kinds '
  '(linear, performer, regional, linformer, nystromformer, convolution) each '
  'device needs whole rows. Set rules.context_attention=all_to_all.'
)


def _one(axes: tuple[str, ...]) -> str:
  axis, *more = axes
  if more:
    raise sharding.ShardingError(
      f'rules.length={",".join(axes)}: attention splits a sequence over one '
      'mesh axis. Set rules.length=context.'
    )
  return axis


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask: mask_lib.Mask,
  options: dense.AttentionOptions = dense.AttentionOptions(),
) -> jax.Array:
  """Attends as `dense.attend`, across devices where `rules.length` splits rows.

  Args:
    q_BTNH: queries.
    k_BSKH: keys.
    v_BSKH: values.
    mask: description of the keys that each query sees.
    options: the options of `dense.attend`.

  Returns:
    (B, T, N, H) in the dtype of the queries.

  Raises:
    ValueError: `options.kernel` is `flash` in a ring of devices.
    ShardingError: two mesh axes split the sequence, the mask needs whole rows,
      or the heads cannot be exchanged.
  """
  axes = manual_sharding.auto_axes('length')
  if not axes:
    return kernels.attend(q_BTNH, k_BSKH, v_BSKH, mask, options)
  axis = _one(axes)
  _check_split(mask, axis)
  exchanged = sharding.active_rules().context_attention == 'all_to_all'
  if options.kernel == 'flash' and not exchanged:
    raise ValueError(
      'attention.kernel=flash: a ring of devices runs blocks. Set it to auto, '
      'or rules.context_attention=all_to_all.'
    )
  if exchanged:
    return all_to_all.attend(q_BTNH, k_BSKH, v_BSKH, mask, axis, options)
  out = ring.attend(q_BTNH, k_BSKH, v_BSKH, mask, axis, options)
  return checkpoint_name(out, splash.NAME)

"""Low-rank attention for encoders: Linformer and Nystromformer.

Both mix the keys of a whole row before queries attend to them. Padding (segment
0) is left out. Documents that are packed into one row would see each other, so
such rows raise an error, or, where segments are known only when the program
runs, give NaN.

Shape suffixes: B batch, T position, N query heads, K key/value heads, G query
heads per key/value head, H head dim, R rank or landmarks, W width.
"""

import dataclasses
import types
from typing import ClassVar
from typing import Literal

from flax import nnx
import jax
from jax import core
import jax.numpy as jnp
import numpy as np

from t2x import field_checks
from t2x.attention import dense
from t2x.attention import mask as mask_lib
from t2x.layers import attention_config
from t2x.layers import convolution
from t2x.layers import param
from t2x.parallel import manual_sharding

_TINY = 1e-30
_WHOLE_ROW = 'it mixes the keys of a whole row, later ones too'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linformer(attention_config.Heads):
  """Keys and values of a row are projected to `rank` of them (Wang et al.,
  2020).

  Attributes:
    rank: number of keys and values after the projection.
    length: number of tokens in the longest row; a shorter row uses the first of
      the weights.
    sharing: sharing of the projections: by all heads (`heads`), or by all heads
      and by keys and values too (`key_value`).
  """

  kind: ClassVar[str] = 'linformer'
  not_causal: ClassVar[str | None] = _WHOLE_ROW
  decoding: ClassVar[str | None] = None
  mixes_rows: ClassVar[bool] = True
  rank: int = 128
  length: int = 512
  sharing: Literal['heads', 'key_value'] = 'heads'

  def __post_init__(self) -> None:
    super().__post_init__()
    field_checks.least(self, 'attention.', rank=1, length=1)

  @property
  def limit(self) -> int:
    return self.length


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nystromformer(attention_config.Heads):
  """The matrix of weights, approximated from some rows and columns (Xiong et
  al., 2021).

  softmax(q k_l) pinv(softmax(q_l k_l)) softmax(q_l k) v, with landmarks q_l and
  k_l the means of neighbouring queries and keys, plus a depthwise convolution
  of the values.

  Attributes:
    landmarks: number of landmarks R.
    iterations: number of iterations of the pseudo-inverse (Razavi et al.,
      2014).
    conv_width: number of taps of the convolution, which is odd; None is no
      convolution.
  """

  kind: ClassVar[str] = 'nystromformer'
  not_causal: ClassVar[str | None] = _WHOLE_ROW
  decoding: ClassVar[str | None] = None
  mixes_rows: ClassVar[bool] = True
  landmarks: int = 64
  iterations: int = 6
  conv_width: int | None = 33

  def __post_init__(self) -> None:
    super().__post_init__()
    field_checks.least(
      self, 'attention.', landmarks=1, iterations=1, conv_width=1
    )
    if self.conv_width is not None and self.conv_width % 2 == 0:
      raise ValueError(
        f'attention.conv_width={self.conv_width}: it is odd, so that as many '
        'values count on both sides.'
      )

  def check_length(self, length: int) -> None:
    if self.landmarks > length:
      raise ValueError(
        f'attention.landmarks={self.landmarks} are more than the {length} '
        'tokens of a row. Lower it.'
      )


class LinformerMixer(nnx.Module):
  """Runs `Linformer`; see `context.Mixer`."""

  def __init__(self, config: Linformer, *, rngs: nnx.Rngs):
    self.config = config
    shape = config.length, config.rank
    make = lambda: param.param(
      rngs,
      shape,
      (None, None),
      param.make_initializer('normal', config.rank**-0.5),
    )
    self.key_TR = make()
    self.value_TR = make() if config.sharing == 'heads' else None

  def __call__(
    self,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    mask: mask_lib.Mask,
    heads_N: jax.Array,
  ) -> jax.Array:
    del heads_N  # All heads share the projections.
    T = k_BTKH.shape[1]
    real_BT = _is_real(mask, k_BTKH)
    value_TR = self.key_TR if self.value_TR is None else self.value_TR

    def project(x_BTKH: jax.Array, weight_TR: nnx.Param) -> jax.Array:
      x_BTKH = x_BTKH * real_BT[..., None, None].astype(x_BTKH.dtype)
      weight = weight_TR[...][:T].astype(x_BTKH.dtype)
      return jnp.einsum('BTKH,TR->BRKH', x_BTKH, weight)

    k_BRKH, v_BRKH = project(k_BTKH, self.key_TR), project(v_BTKH, value_TR)
    q_BTKGH = _grouped(q_BTNH, k_BTKH)
    weights = _softmax(q_BTKGH * q_BTNH.shape[-1] ** -0.5, k_BRKH)
    out = jnp.einsum('BKGTR,BRKH->BTKGH', weights.astype(v_BRKH.dtype), v_BRKH)
    return _of_one_document(out.reshape(*q_BTNH.shape[:3], -1), mask)


class NystromMixer(nnx.Module):
  """Runs `Nystromformer`; see `context.Mixer`."""

  def __init__(self, config: Nystromformer, *, rngs: nnx.Rngs):
    self.config = config
    self.conv_KW = (
      param.param(
        rngs,
        (config.kv_heads, config.conv_width),
        ('kv_heads', None),
        param.make_initializer('normal', config.conv_width**-0.5),
      )
      if config.conv_width
      else None
    )

  def __call__(
    self,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    mask: mask_lib.Mask,
    heads_N: jax.Array,
  ) -> jax.Array:
    T = q_BTNH.shape[1]
    R = min(self.config.landmarks, T)
    real_BT = _is_real(mask, k_BTKH)
    factor = q_BTNH.shape[-1] ** -0.25
    q = _grouped(q_BTNH, k_BTKH).astype(jnp.float32) * factor
    k, v = k_BTKH.astype(jnp.float32) * factor, v_BTKH.astype(jnp.float32)
    # Landmarks share a row's real tokens equally, up to one token.
    rank_BT = jnp.cumsum(real_BT, axis=1) - 1
    num_B1 = jnp.maximum(real_BT.sum(1, keepdims=True), 1)
    of_BTR = (rank_BT * R // num_B1)[..., None] == jnp.arange(R)[None, None]
    share_BTR = (of_BTR & real_BT[..., None]).astype(jnp.float32)
    num_BR = share_BTR.sum(1)
    share_BTR = share_BTR / jnp.maximum(num_BR, 1.0)[:, None]
    q_l = jnp.einsum('BTKGH,BTR->BRKGH', q, share_BTR)
    k_l = jnp.einsum('BTKH,BTR->BRKH', k, share_BTR)
    whole = _softmax(q, k_l, num_BR > 0)
    # A landmark without tokens is left out of the matrix that is inverted.
    there_BR = (num_BR > 0)[:, None, None, :, None]
    small = _softmax(q_l, k_l, num_BR > 0) * there_BR
    read = jnp.einsum('BKGRT,BTKH->BKGRH', _softmax(q_l, k, real_BT), v)
    inverse = pseudo_inverse(small, self.config.iterations)
    mixed = jnp.einsum('BKGRS,BKGSH->BKGRH', inverse, read)
    out = jnp.einsum('BKGTR,BKGRH->BTKGH', whole, mixed)
    if self.conv_KW is not None:
      v = v * real_BT[..., None, None]
      taps = self._filters(heads_N, v.shape[2])[None, None]
      convolved = convolution.convolve(v, taps, None, causal=False)
      out = out + convolved[..., None, :]
    out = out.reshape(*q_BTNH.shape[:3], -1).astype(v_BTKH.dtype)
    return _of_one_document(out, mask)

  def _filters(self, heads_N: jax.Array, num: int) -> jax.Array:
    """Returns the filters of `num` key heads, given their query heads."""
    config, conv_KW = self.config, self.conv_KW
    assert conv_KW is not None
    first = heads_N.reshape(num, -1)[:, 0] * config.kv_heads // config.num_heads
    start, _ = manual_sharding.manual_part('kv_heads', config.kv_heads)
    return jnp.take(conv_KW[...], first - start, axis=0)


def pseudo_inverse(matrix: jax.Array, iterations: int) -> jax.Array:
  """Approximates the Moore-Penrose inverse of stochastic matrices.

  Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4 (Razavi et al., 2014), from
  A^T divided by the largest sums of its columns and rows.

  Args:
    matrix: matrices A, (..., R, R).
    iterations: number of iterations.
  """
  one = jnp.eye(matrix.shape[-1]).reshape(
    (1,) * (matrix.ndim - 2) + matrix.shape[-2:]
  )
  largest = lambda axis: jnp.abs(matrix).sum(axis).max(-1)
  scale = jnp.maximum(largest(-2) * largest(-1), _TINY)  # 0 / 0 becomes 0.
  z = matrix.swapaxes(-1, -2) / scale[..., None, None]
  for _ in range(iterations):
    az = matrix @ z
    z = 0.25 * z @ (13 * one - az @ (15 * one - az @ (7 * one - az)))
  return z


def check_documents(kind: str, segments_BT: jax.Array | None) -> None:
  """Raises ValueError for rows of several documents, unless under a trace.

  Args:
    kind: name of a kind of attention that mixes whole rows.
    segments_BT: segment of each token, 0 for padding; None is one segment.
  """
  if segments_BT is None or isinstance(segments_BT, core.Tracer):
    return
  (rows,) = np.nonzero(_has_several(np.asarray(segments_BT), np))
  if len(rows):
    raise ValueError(
      f'model.attention={kind} mixes the keys of a whole row, and row '
      f'{rows[0]} has segments of several documents, which would see each '
      'other. Give each document a row.'
    )


def _has_several(
  segments_BT: jax.Array | np.ndarray, xp: types.ModuleType = jnp
) -> jax.Array | np.ndarray:
  """Returns whether each row has several documents, (B,)."""
  is_real_BT = segments_BT != 0
  first_B = xp.where(is_real_BT, segments_BT, 2**30).min(1)
  return is_real_BT.any(1) & (first_B != segments_BT.max(1))


def _of_one_document(out_BTNH: jax.Array, mask: mask_lib.Mask) -> jax.Array:
  """Sets rows of several documents, which these kinds cannot compute, to NaN.

  Where segments are known only when the program runs, it cannot raise an error.
  """
  segments_BT = mask.k_segments_BS
  if segments_BT is None:
    return out_BTNH
  wrong_B = _has_several(segments_BT)[:, None, None, None]
  return jnp.where(wrong_B, jnp.nan, out_BTNH)


def _is_real(mask: mask_lib.Mask, k_BTKH: jax.Array) -> jax.Array:
  segments_BT = mask.k_segments_BS
  if segments_BT is None:
    return jnp.ones(k_BTKH.shape[:2], bool)
  return segments_BT != 0


def _grouped(q_BTNH: jax.Array, k_BTKH: jax.Array) -> jax.Array:
  B, T, _, H = q_BTNH.shape
  return q_BTNH.reshape(B, T, k_BTKH.shape[2], -1, H)


def _softmax(
  q_BTKGH: jax.Array, k_BRKH: jax.Array, seen_BR: jax.Array | None = None
) -> jax.Array:
  """Returns the softmax of scores, float32 (B, K, G, T, R)."""
  scores = jnp.einsum(
    'BTKGH,BRKH->BKGTR', q_BTKGH, k_BRKH, preferred_element_type=jnp.float32
  )
  if seen_BR is not None:
    scores = jnp.where(seen_BR[:, None, None, None], scores, dense.NEVER)
  return jax.nn.softmax(scores, axis=-1)


def num_flops(config: Linformer | Nystromformer, length: int) -> int:
  """Returns the FLOPs of a row's attention, as they are computed.

  Args:
    config: config of the layer.
    length: number of tokens in the row.
  """
  N, K, H, T = config.num_heads, config.kv_heads, config.head_dim, length
  if isinstance(config, Linformer):
    return 4 * T * config.rank * H * (N + K)
  R = config.landmarks
  landmarks = 2 * T * R * H * (N + K)
  factors = 2 * N * H * (2 * T * R + R * R) + 2 * N * H * (T * R + R * R)
  inverse = 2 * N * R**3 * 4 * config.iterations
  return landmarks + factors + 2 * N * H * T * R + inverse

"""Linear attention by feature maps: sums over keys, shared by all queries.

With weights phi(q) . phi(k) for a feature map phi, the sum over keys of
phi(k) v^T is all that a query needs (Katharopoulos et al., 2020). Causal
attention is a scan over chunks whose state is that sum over the chunks before;
in rows of packed documents the sum starts again at each segment.

Shape suffixes: B batch, T position, N query heads, K key/value heads, G query
heads per key/value head, F features, H head dim of values, C chunks.
"""

import dataclasses

import jax
import jax.numpy as jnp

CHUNK = 128
_TINY = 1e-30  # Where the weights' sum is below, the output is about 0.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearState:
  """Sums over the keys of earlier positions, float32.

  Attributes:
    sum_BKFH: sum over keys of features times values; the last column of H is
      the sum of the features themselves.
    segment_B: segment of the latest key; the sum is over its keys alone.
  """

  sum_BKFH: jax.Array
  segment_B: jax.Array


def empty(batch: int, num_heads: int, features: int, dim: int) -> LinearState:
  """Returns the state of no keys.

  Args:
    batch: number of rows.
    num_heads: number of key/value heads K.
    features: number of features F.
    dim: head dim H of the values.
  """
  return LinearState(
    sum_BKFH=jnp.zeros((batch, num_heads, features, dim + 1), jnp.float32),
    segment_B=jnp.zeros((batch,), jnp.int32),
  )


def attend(
  q_BTNF: jax.Array,
  k_BTKF: jax.Array,
  v_BTKH: jax.Array,
  segments_BT: jax.Array | None,
  *,
  causal: bool,
  chunk: int = CHUNK,
) -> jax.Array:
  """Returns the mean of values, weighted by the products of features.

  Args:
    q_BTNF: features of queries; no product with features of keys is negative.
    k_BTKF: features of keys.
    v_BTKH: values.
    segments_BT: segment of each token, which sees its own segment alone; the
      tokens of a segment are neighbours. None is one segment.
    causal: whether a token sees only itself and earlier tokens.
    chunk: number of tokens whose weights exist at a time.

  Returns:
    (B, T, N, H) in the dtype of the values.
  """
  q, k, v = _parts(q_BTNF, k_BTKF, v_BTKH)
  if causal or segments_BT is not None:
    segments_BT = _segments(segments_BT, q)
    start = empty(q.shape[0], k.shape[2], k.shape[3], v.shape[-1] - 1)
    sums, _ = _scan(q, k, v, segments_BT, start, chunk, inclusive=True)
    if not causal:
      flip = lambda a: jnp.flip(a, 1)
      q, k, v, segments_BT = (flip(a) for a in (q, k, v, segments_BT))
      later, _ = _scan(q, k, v, segments_BT, start, chunk, inclusive=False)
      sums = sums + flip(later)
  else:
    state = jnp.einsum('BSKF,BSKH->BKFH', k, v)
    sums = jnp.einsum('BTKGF,BKFH->BTKGH', q, state)
  return _mean(sums, v_BTKH.dtype)


def step(
  q_BTNF: jax.Array,
  k_BTKF: jax.Array,
  v_BTKH: jax.Array,
  is_real_BT: jax.Array,
  state: LinearState,
  chunk: int = CHUNK,
) -> tuple[jax.Array, LinearState]:
  """Attends causally to the keys of a state and to the given keys.

  Args:
    q_BTNF: features of queries.
    k_BTKF: features of keys, of the same segment as the state.
    v_BTKH: values.
    is_real_BT: False for padding, whose keys are ignored.
    state: sums over the earlier keys.
    chunk: number of tokens whose weights exist at a time.

  Returns:
    (B, T, N, H), and the state that includes the given keys.
  """
  q, k, v = _parts(q_BTNF, k_BTKF, v_BTKH)
  k = k * is_real_BT[..., None, None]
  segments_BT = jnp.broadcast_to(state.segment_B[:, None], q.shape[:2])
  sums, state = _scan(q, k, v, segments_BT, state, chunk, inclusive=True)
  return _mean(sums, v_BTKH.dtype), state


def _parts(
  q_BTNF: jax.Array, k_BTKF: jax.Array, v_BTKH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Casts to float32, groups queries by key heads, appends 1 to the values."""
  q, k, v = (a.astype(jnp.float32) for a in (q_BTNF, k_BTKF, v_BTKH))
  (B, T, _, F), K = q.shape, k.shape[2]
  v = jnp.concatenate([v, jnp.ones((*v.shape[:-1], 1), v.dtype)], axis=-1)
  return q.reshape(B, T, K, -1, F), k, v


def _segments(segments_BT: jax.Array | None, q: jax.Array) -> jax.Array:
  if segments_BT is None:
    return jnp.zeros(q.shape[:2], jnp.int32)
  return segments_BT


def _mean(sums: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
  B, T, K, G, H = sums.shape
  total = sums[..., -1:]
  # Scaled to 1 first: the square of a small sum, which its gradient divides by,
  # would be 0.
  scale = jax.lax.stop_gradient(1.0 / jnp.where(total > _TINY, total, 1.0))
  mean = sums[..., :-1] * scale / jnp.where(total > _TINY, total * scale, 1.0)
  return mean.reshape(B, T, K * G, H - 1).astype(dtype)


def _scan(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segments_BT: jax.Array,
  state: LinearState,
  chunk: int,
  *,
  inclusive: bool,
) -> tuple[jax.Array, LinearState]:
  """Scans over chunks of tokens.

  Args:
    q: features of queries (B, T, K, G, F).
    k: features of keys (B, T, K, F).
    v: values, with a 1 at the end (B, T, K, H + 1).
    segments_BT: segment of each token.
    state: sums over the keys before the first.
    chunk: number of tokens in a step.
    inclusive: whether a query sees its own key; else only keys before it.

  Returns:
    Sums (B, T, K, G, H + 1) over the keys that each query sees, and the last
    state.
  """
  T = q.shape[1]
  chunk = min(chunk, T)
  num = -(-T // chunk)

  def cut(a: jax.Array, mode: str = 'constant') -> jax.Array:
    width = [(0, 0), (0, num * chunk - T)] + [(0, 0)] * (a.ndim - 2)
    a = jnp.pad(a, width, mode=mode)
    return jnp.moveaxis(a.reshape(a.shape[0], num, chunk, *a.shape[2:]), 1, 0)

  before_TS = jnp.tril(jnp.ones((chunk, chunk), bool), 0 if inclusive else -1)

  # The backward pass computes chunks again: only the states between them are
  # kept.
  @jax.checkpoint
  def body(
    state: LinearState, part: tuple[jax.Array, jax.Array, jax.Array, jax.Array]
  ) -> tuple[LinearState, jax.Array]:
    q, k, v, segments_BT = part
    goes_on_BT = segments_BT == state.segment_B[:, None]
    sums = jnp.einsum('BTKGF,BKFH->BTKGH', q, state.sum_BKFH)
    sums = sums * goes_on_BT[..., None, None, None]
    weights = jnp.einsum('BTKGF,BSKF->BKGTS', q, k)
    seen = segments_BT[:, :, None] == segments_BT[:, None, :]
    seen = seen & before_TS[None]
    weights = weights * seen[:, None, None]
    sums = sums + jnp.einsum('BKGTS,BSKH->BTKGH', weights, v)
    last_B = segments_BT[:, -1]
    k = k * (segments_BT == last_B[:, None])[..., None, None]
    old = state.sum_BKFH * (last_B == state.segment_B)[:, None, None, None]
    new = old + jnp.einsum('BSKF,BSKH->BKFH', k, v)
    return LinearState(sum_BKFH=new, segment_B=last_B), sums

  parts = cut(q), cut(k), cut(v), cut(segments_BT, 'edge')
  state, sums = jax.lax.scan(body, state, parts)
  sums = jnp.moveaxis(sums, 0, 1)
  return sums.reshape(sums.shape[0], -1, *sums.shape[3:])[:, :T], state

"""Linear attention and Performers: attention by feature maps.

Shape suffixes: B batch, T position, N query heads, K key/value heads, F
features, H head dim.
"""

import dataclasses
import itertools
from typing import ClassVar
from typing import Literal
from typing import TypeVar

from flax import nnx
import jax
import jax.numpy as jnp

from t2x import field_checks
from t2x.attention import linear as linear_lib
from t2x.attention import mask as mask_lib
from t2x.attention import patterns
from t2x.layers import attention_config

Model = TypeVar('Model')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(attention_config.Heads):
  """Weights phi(q) . phi(k) with phi = elu + 1 (Katharopoulos et al., 2020).

  Time and memory are linear in the length, and a decoder needs a state of
  constant size only. A query cannot attend to one key alone.
  """

  kind: ClassVar[str] = 'linear'
  decoding: ClassVar[str | None] = 'a state of constant size'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Performer(attention_config.Heads):
  """Random features whose products approximate a kernel (Choromanski et al.,
  2021).

  With w ~ N(0, 1), and x divided by H^(1/4), the feature of each function, and
  the kernel that is the mean of its products:
    softmax     exp(w . x - |x|^2 / 2), for exp(q . k): FAVOR+, always positive;
    gaussian    exp(w . x - |x|^2), for exp(-|q - k|^2 / 2);
    relu        max(w . x, 0), for the arc-cosine kernel (Cho and Saul, 2009);
    polynomial  (w . x)^2, for |q|^2 |k|^2 + 2 (q . k)^2.

  The error falls as 1 / sqrt(num_features), and grows with |q|^2 and |k|^2. If
  scores have a standard deviation above about 5, `qk_norm` helps.

  Attributes:
    num_features: number of features F; the paper takes about H log H.
    function: one of the functions above.
    orthogonal: whether the w of each H features are orthogonal, which reduces
      the error.
    redraw_every: number of training steps after which the w are drawn again; 0
      never does. In the paper, models otherwise adapt to a single draw.
  """

  kind: ClassVar[str] = 'performer'
  decoding: ClassVar[str | None] = 'a state of constant size'
  num_features: int = 256
  function: Literal['softmax', 'gaussian', 'relu', 'polynomial'] = 'softmax'
  orthogonal: bool = True
  redraw_every: int = 1000

  def __post_init__(self) -> None:
    super().__post_init__()
    field_checks.least(self, 'attention.', num_features=1, redraw_every=0)


class FeatureMapMixer(nnx.Module):
  """Attention by feature maps; subclasses define the features."""

  def features(self, x: jax.Array, *, of_keys: bool) -> jax.Array:
    """Returns float32 features (..., F) of queries or keys (..., H)."""
    raise NotImplementedError

  @property
  def num_features(self) -> int:
    """Number of features F."""
    raise NotImplementedError

  def __call__(
    self,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    mask: mask_lib.Mask,
    heads_N: jax.Array,
  ) -> jax.Array:
    """Returns (B, T, N, H); see `context.Mixer`."""
    del heads_N  # All heads have the same features.
    assert mask.has_static_order
    return linear_lib.attend(
      self.features(q_BTNH, of_keys=False),
      self.features(k_BTKH, of_keys=True),
      v_BTKH,
      mask.q_segments_BT,
      causal=patterns.has(mask.pattern, patterns.Causal),
    )

  def step(
    self,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    index_BT: jax.Array,
    cache: 'StateCache',
  ) -> tuple[jax.Array, 'StateCache']:
    """Continues from a cache.

    Args:
      q_BTNH: queries.
      k_BTKH: keys of the same tokens.
      v_BTKH: values of the same tokens.
      index_BT: index of each token in its row.
      cache: the cache.

    Returns:
      (B, T, N, H), and the new cache.
    """
    is_real_BT = jnp.broadcast_to(index_BT < cache.capacity, q_BTNH.shape[:2])
    out, state = linear_lib.step(
      self.features(q_BTNH, of_keys=False),
      self.features(k_BTKH, of_keys=True),
      v_BTKH,
      is_real_BT,
      cache.state,
    )
    return out, dataclasses.replace(cache, state=state)

  def empty_cache(
    self,
    batch: int,
    capacity: int,
    num_heads: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
  ) -> 'StateCache':
    """Returns the cache before any key.

    Args:
      batch: number of rows.
      capacity: number of positions in a row.
      num_heads: number of key/value heads K.
      head_dim: head dim H of the values.
      dtype: dtype of the activations, which is not used.
    """
    del dtype  # Sums over many keys are float32.
    state = linear_lib.empty(batch, num_heads, self.num_features, head_dim)
    return StateCache(state=state, capacity=capacity)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StateCache:
  """A cache of constant size.

  Attributes:
    state: sums over the keys.
    capacity: number of positions in a row; tokens with an index at or past it
      are padding.
  """

  state: linear_lib.LinearState
  capacity: int = dataclasses.field(metadata={'static': True})


class LinearMixer(FeatureMapMixer):
  """Linear attention with the features elu(x) + 1."""

  def __init__(self, config: Linear):
    self.config = config

  @property
  def num_features(self) -> int:
    """Number of features F, which is H."""
    return self.config.head_dim

  def features(self, x: jax.Array, *, of_keys: bool) -> jax.Array:
    del of_keys
    return jax.nn.elu(x.astype(jnp.float32)) + 1.0


class Projection(nnx.Variable):
  """The w of random features, which is drawn at random and never trained."""


class PerformerMixer(FeatureMapMixer):
  """Performer attention; all heads use the same random features."""

  def __init__(self, config: Performer, *, rngs: nnx.Rngs):
    self.config = config
    self.w_HF = Projection(
      draw(
        rngs.params(), config.head_dim, config.num_features, config.orthogonal
      ),
      axes=(None, None),
      every=config.redraw_every,
      orthogonal=config.orthogonal,
    )

  @property
  def num_features(self) -> int:
    """Number of features F."""
    return self.config.num_features

  def features(self, x: jax.Array, *, of_keys: bool) -> jax.Array:
    w_HF = self.w_HF[...]
    return random_features(x, w_HF, self.config.function, of_keys=of_keys)


def random_features(
  x: jax.Array, w_HF: jax.Array, function: str, *, of_keys: bool
) -> jax.Array:
  """Returns the random features of queries or keys; see `Performer`.

  Args:
    x: queries or keys, (..., H).
    w_HF: random directions.
    function: name of the function, as `Performer.function`.
    of_keys: whether `x` are keys; the features of each query are scaled by a
      factor of its own.

  Returns:
    float32 (..., F).
  """
  H, F = w_HF.shape
  x = x.astype(jnp.float32) * H**-0.25
  products = jnp.einsum('...H,HF->...F', x, w_HF)
  if function == 'relu':
    return jax.nn.relu(products) * F**-0.5
  if function == 'polynomial':
    return products**2 * F**-0.5
  squared = (x**2).sum(-1, keepdims=True)
  power = products - (squared if function == 'gaussian' else squared / 2)
  if not of_keys:
    # A factor of a query cancels in the mean. A factor of keys would have to be
    # the same for all keys, and so depend on keys that a query must not see.
    power = power - jax.lax.stop_gradient(power.max(-1, keepdims=True))
  return jnp.exp(power) * F**-0.5


def draw(key: jax.Array, dim: int, num: int, orthogonal: bool) -> jax.Array:
  """Draws w of shape (dim, num), each column from N(0, 1).

  Args:
    key: random key.
    dim: head dim H.
    num: number of features F.
    orthogonal: whether each `dim` columns are orthogonal to each other.
  """
  if not orthogonal:
    return jax.random.normal(key, (dim, num))
  key, length_key = jax.random.split(key)
  blocks = jax.random.normal(key, (-(-num // dim), dim, dim))
  q, r = jnp.linalg.qr(blocks)
  # With R's signs all directions are equally likely (Mezzadri, 2007).
  q = q * jnp.sign(jnp.diagonal(r, axis1=1, axis2=2))[:, None]
  directions = q.reshape(-1, dim)[:num]
  lengths = jnp.linalg.norm(jax.random.normal(length_key, (num, dim)), axis=1)
  return (directions * lengths[:, None]).T


def redraw(model: Model, step: jax.Array) -> Model:
  """Draws the random features of a model again where their time has come.

  Args:
    model: the whole model, or its part that is not trained.
    step: number of training steps so far.
  """
  place = itertools.count()

  def redrawn(x: object) -> object:
    if not isinstance(x, Projection):
      return x
    every, orthogonal = (x.get_metadata(n) for n in ('every', 'orthogonal'))
    value, number = x.get_value(), next(place)
    if not every:
      return x
    # Layers of one kind are stacked: (R, H, F).
    dims, num = value.shape[-2:]
    layers = value.size // (dims * num)

    def drawn(step: jax.Array) -> jax.Array:
      # Later draws depend on the first draw, and so on the model's seed.
      bits = jax.lax.bitcast_convert_type(value.ravel()[0], jnp.uint32)
      key = jax.random.fold_in(jax.random.key(number), bits)
      key = jax.random.fold_in(key, step)
      make = lambda key: draw(key, dims, num, orthogonal)
      new = jax.vmap(make)(jax.random.split(key, layers))
      return new.reshape(value.shape).astype(value.dtype)

    new = jax.lax.cond(step % every == 0, drawn, lambda _: value, step)
    return x.replace(new)

  is_leaf = lambda x: isinstance(x, nnx.Variable)
  return jax.tree.map(redrawn, model, is_leaf=is_leaf)


def num_flops(config: Linear | Performer, length: int, causal: bool) -> int:
  """Returns the FLOPs of a row's attention, as they are computed.

  These are the features of queries and keys, the sums of each chunk (used by
  queries and extended by keys), and within a chunk the weights and their
  product with the values. Without causal order there are sums alone.

  Args:
    config: config of the layer.
    length: number of tokens in the row.
    causal: whether the model's mask is causal.
  """
  N, K, H = config.num_heads, config.kv_heads, config.head_dim
  F = config.num_features if isinstance(config, Performer) else H
  made = 2 * length * (N + K) * H * F if isinstance(config, Performer) else 0
  sums = 2 * length * (N + K) * F * (H + 1)
  inside = 2 * length * min(linear_lib.CHUNK, length) * N * (F + H + 1)
  return made + sums + (inside if causal else 0)

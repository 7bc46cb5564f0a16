"""Linear attention and Performers: kinds of attention by feature maps.

Shape suffixes: B batch, T position, N query heads, K key/value heads, F
features, H head dim.
"""

import dataclasses
import itertools
from typing import Any
from typing import ClassVar
from typing import Literal

from flax import nnx
import jax
import jax.numpy as jnp

from t2x import field_checks
from t2x.attention import linear as linear_lib
from t2x.attention import mask as mask_lib
from t2x.attention import patterns
from t2x.layers import attention_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(attention_config.Heads):
  """Weights phi(q) . phi(k) with phi = elu + 1 (Katharopoulos et al., 2020).

  Time and memory grow with the length; a decoder goes on from a state of
  constant size. It cannot look at one key and no other.
  """

  kind: ClassVar[str] = 'linear'
  decoding: ClassVar[str | None] = 'a state of constant size'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Performer(attention_config.Heads):
  """Random features whose products are the weights' mean (Choromanski et al.,
  2021).

  With w ~ N(0, 1), and x divided by H^(1/4):
    softmax     exp(w . x - |x|^2 / 2), of exp(q . k): FAVOR+, always positive;
    gaussian    exp(w . x - |x|^2), of exp(-|q - k|^2 / 2);
    relu        max(w . x, 0), of the arc-cosine kernel (Cho and Saul, 2009);
    polynomial  (w . x)^2, of |q|^2 |k|^2 + 2 (q . k)^2.

  The error falls as 1 / sqrt(num_features), and grows with |q|^2 and |k|^2:
  where scores have a deviation beyond 5 or so, `qk_norm` helps.

  Attributes:
    num_features: F; about H log H is the paper's.
    function: which of those above.
    orthogonal: the w of each H features are orthogonal, which errs less.
    redraw_every: training steps after which the w are drawn anew; 0 keeps
      them. The paper's models fix themselves to one draw otherwise.
  """

  kind: ClassVar[str] = 'performer'
  decoding: ClassVar[str | None] = 'a state of constant size'
  num_features: int = 256
  function: Literal['softmax', 'gaussian', 'relu', 'polynomial'] = 'softmax'
  orthogonal: bool = True
  redraw_every: int = 1000

  def __post_init__(self):
    super().__post_init__()
    field_checks.least(self, 'attention.', num_features=1, redraw_every=0)


class Mixer(nnx.Module):
  """Mixes values by products of features: of linear attention, Performers."""

  def features(self, x: jax.Array, *, of_keys: bool) -> jax.Array:
    """Returns float32 features (..., F) of queries or keys (..., H)."""
    raise NotImplementedError

  @property
  def num_features(self) -> int:
    raise NotImplementedError

  def __call__(self, q_BTNH, k_BTKH, v_BTKH, mask: mask_lib.Mask, heads_N):
    """Returns (B, T, N, H); see `attention_kinds.Mixer`."""
    del heads_N  # All heads have the same features.
    assert mask.has_static_order
    return linear_lib.attend(
      self.features(q_BTNH, of_keys=False),
      self.features(k_BTKH, of_keys=True),
      v_BTKH,
      mask.q_segments_BT,
      causal=patterns.has(mask.pattern, patterns.Causal),
    )

  def step(self, q_BTNH, k_BTKH, v_BTKH, index_BT, cache: 'StateCache'):
    """Goes on from a cache: returns (B, T, N, H), and the new one."""
    is_real_BT = jnp.broadcast_to(index_BT < cache.capacity, q_BTNH.shape[:2])
    out, state = linear_lib.step(
      self.features(q_BTNH, of_keys=False),
      self.features(k_BTKH, of_keys=True),
      v_BTKH,
      is_real_BT,
      cache.state,
    )
    return out, dataclasses.replace(cache, state=state)

  def empty_cache(self, batch, capacity, num_heads, head_dim, dtype):
    """Returns the state of no keys."""
    del dtype  # Sums of many keys are float32.
    state = linear_lib.empty(batch, num_heads, self.num_features, head_dim)
    return StateCache(state=state, capacity=capacity)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StateCache:
  """A state of constant size; indices at or past the capacity are padding."""

  state: linear_lib.State
  capacity: int = dataclasses.field(metadata={'static': True})


class LinearMixer(Mixer):
  """elu(x) + 1."""

  def __init__(self, config: Linear):
    self.config = config

  @property
  def num_features(self) -> int:
    return self.config.head_dim

  def features(self, x, *, of_keys):
    del of_keys
    return jax.nn.elu(x.astype(jnp.float32)) + 1.0


class Projection(nnx.Variable):
  """The w of random features: drawn, and drawn anew, never trained."""


class PerformerMixer(Mixer):
  """Random features of one draw for all heads."""

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
    return self.config.num_features

  def features(self, x, *, of_keys):
    w_HF = self.w_HF[...]
    return random_features(x, w_HF, self.config.function, of_keys=of_keys)


def random_features(
  x: jax.Array, w_HF: jax.Array, function: str, *, of_keys: bool
) -> jax.Array:
  """Returns float32 features (..., F) of x (..., H); see `Performer`."""
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
    # A factor of a query's own cancels. One of keys would have to be the same
    # for all, and would tell a query of keys that it must not see.
    power = power - jax.lax.stop_gradient(power.max(-1, keepdims=True))
  return jnp.exp(power) * F**-0.5


def draw(key: jax.Array, dim: int, num: int, orthogonal: bool) -> jax.Array:
  """Returns w (dim, num), each column N(0, 1) in every direction."""
  if not orthogonal:
    return jax.random.normal(key, (dim, num))
  key, own = jax.random.split(key)
  blocks = jax.random.normal(key, (-(-num // dim), dim, dim))
  q, r = jnp.linalg.qr(blocks)
  # With R's signs all directions are as likely (Mezzadri, 2007).
  q = q * jnp.sign(jnp.diagonal(r, axis1=1, axis2=2))[:, None]
  directions = q.reshape(-1, dim)[:num]
  lengths = jnp.linalg.norm(jax.random.normal(own, (num, dim)), axis=1)
  return (directions * lengths[:, None]).T


def redraw(model: Any, step: jax.Array) -> Any:
  """Returns a model whose random features are drawn anew where it is time.

  Args:
    model: whole, or the part that is not trained.
    step: updates so far.
  """
  place = itertools.count()

  def moved(x):
    if not isinstance(x, Projection):
      return x
    every, orthogonal = (x.get_metadata(n) for n in ('every', 'orthogonal'))
    value, number = x.get_value(), next(place)
    if not every:
      return x
    # Layers of one kind are stacked: (R, H, F).
    dims, num = value.shape[-2:]
    layers = value.size // (dims * num)

    def drawn(step):
      # Another seed's first draw has others after it.
      bits = jax.lax.bitcast_convert_type(value.ravel()[0], jnp.uint32)
      key = jax.random.fold_in(jax.random.key(number), bits)
      key = jax.random.fold_in(key, step)
      make = lambda key: draw(key, dims, num, orthogonal)
      new = jax.vmap(make)(jax.random.split(key, layers))
      return new.reshape(value.shape).astype(value.dtype)

    new = jax.lax.cond(step % every == 0, drawn, lambda _: value, step)
    return x.replace(new)

  is_leaf = lambda x: isinstance(x, nnx.Variable)
  return jax.tree.map(moved, model, is_leaf=is_leaf)


def num_flops(config: Linear | Performer, length: int, causal: bool) -> int:
  """Returns the FLOPs of a row's weights and values, as they are computed.

  Features of queries and keys; sums of each chunk read and made; within a
  chunk the weights and their product. Without order the sums are made once.
  """
  N, K, H = config.num_heads, config.kv_heads, config.head_dim
  F = config.num_features if isinstance(config, Performer) else H
  made = 2 * length * (N + K) * H * F if isinstance(config, Performer) else 0
  sums = 2 * length * (N + K) * F * (H + 1)
  inside = 2 * length * min(linear_lib.CHUNK, length) * N * (F + H + 1)
  return made + sums + (inside if causal else 0)

"""Multi-head, multi-query and grouped-query attention layers.

Shape suffixes: B batch, T query position, S key position, M memory, D embed, N
query heads, K key/value heads, H head dim.
"""

import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from t2x.attention import cache as cache_lib
from t2x.attention import dense
from t2x.attention import mask as mask_lib
from t2x.attention import paged
from t2x.layers import attention_kinds
from t2x.layers import attention_variants
from t2x.layers import convolution
from t2x.layers import param
from t2x.layers import position
from t2x.layers import sequence_parallel
from t2x.parallel import sharding
from t2x.parallel import zigzag


class Attention(attention_variants.Variants):
  """Attention over the sequence itself, or over another one (cross-attention).

  Args:
    config: config of the layer, of any kind but a convolution.
    embed: width D of the activations.
    init: initialisation of the weights.
    out_factor: factor of the std of the output projection's weights.
    rngs: random keys of the parameters.

  >>> from t2x.layers import attention_config
  >>> layer = Attention(
  ...     attention_config.Dense(num_heads=4, num_kv_heads=2, head_dim=8), 32,
  ...     init=param.Init(), out_factor=1.0, rngs=nnx.Rngs(0))
  >>> x = jax.numpy.ones((2, 5, 32))
  >>> layer(x, mask_lib.make(causal=True)).shape
  (2, 5, 32)
  """

  def __call__(
    self,
    x_BTD: jax.Array,
    mask: mask_lib.Mask,
    *,
    positions_BT: jax.Array | None = None,
    types_BT: jax.Array | None = None,
    rotary: position.Rotary | None = None,
    bias: dense.Bias | None = None,
    keys_B: jax.Array | None = None,
    encoded_BSD: jax.Array | None = None,
    num_keys: int | None = None,
  ) -> jax.Array:
    """Attends to the sequence itself, or to `encoded_BSD`.

    Args:
      x_BTD: sequence of the queries, and of the keys unless `encoded_BSD` is
        set.
      mask: description of the keys that each query sees; the layer adds its own
        pattern.
      positions_BT: positions of the tokens; None is 0, 1, 2, ...
      types_BT: token type (sentence) of each token, for kinds whose scores
        depend on it; None is none.
      rotary: rotary encoding of queries and keys; None is none.
      bias: bias of the scores; None is none.
      keys_B: dropout key of each row; None means no dropout.
      encoded_BSD: another sequence to attend to; None is self-attention.
      num_keys: number of tokens, the first ones, that have keys; None is all.

    Returns:
      (B, T, D).
    """
    x_BTD = sequence_parallel.gather(x_BTD)
    q_BTNH = self.queries(x_BTD)
    if encoded_BSD is not None:
      # With this constraint the gradients by keys and by values are added
      # before they are summed over devices with other heads.
      encoded_BSD = sharding.constrain(
        encoded_BSD, 'batch', 'length', 'act_embed'
      )
      k_BSKH, v_BSKH = self.keys_and_values(encoded_BSD)
      return self.attend(q_BTNH, k_BSKH, v_BSKH, mask, bias, keys_B)
    k_BSKH, v_BSKH = self.keys_and_values(x_BTD[:, :num_keys])
    if positions_BT is None:
      index_T = zigzag.index(x_BTD.shape[1], mask.q_zigzag)
      positions_BT = jnp.asarray(index_T)[None]
    types_BS = None if types_BT is None else types_BT[:, :num_keys]
    q_BTNH = self._placed_queries(q_BTNH, positions_BT, rotary, types_BT)
    positions_BS = positions_BT[:, :num_keys]
    k_BSKH = self._placed_keys(k_BSKH, positions_BS, rotary, types_BS)
    length = num_keys or x_BTD.shape[1]
    self.config.check_limit(length)
    if self.mixer is not None:
      return self._out(self._mixed(q_BTNH, k_BSKH, v_BSKH, mask))
    parts = q_BTNH, k_BSKH, v_BSKH, self._narrowed(mask, length)
    out_BTNH = self._attend(*parts, bias, keys_B, None)
    if self.global_tokens is not None:
      out_BTNH = self._with_globals(out_BTNH, x_BTD, mask, keys_B)
    return self._out(out_BTNH)

  def recall(
    self,
    x_BTD: jax.Array,
    mask: mask_lib.Mask,
    memory: cache_lib.MemoryCache,
    *,
    positions_BT: jax.Array,
    rotary: position.Rotary | None = None,
    bias: dense.Bias | None = None,
    keys_B: jax.Array | None = None,
    num_keys: int | None = None,
  ) -> tuple[jax.Array, cache_lib.MemoryCache]:
    """Attends to a memory of the previous rows and to the sequence itself.

    The keys of the memory come before those of the sequence, also in `mask`.

    Args:
      x_BTD: the sequence.
      mask: description of the keys that each query sees.
      memory: keys and values of the previous rows.
      positions_BT: positions of the tokens; the memory ends at -1.
      rotary: rotary encoding of queries and keys; None is none.
      bias: bias of the scores; None is none.
      keys_B: dropout key of each row; None means no dropout.
      num_keys: number of tokens, the first ones, that have keys; None is all.

    Returns:
      (B, T, D), and the memory for the next rows.
    """
    length = memory.k_BMKH.shape[1]
    before_BM = jnp.broadcast_to(
      jnp.arange(-length, 0)[None], (len(positions_BT), length)
    )
    positions_BS = jnp.concatenate([before_BM, positions_BT[:, :num_keys]], 1)
    new = self.keys_and_values(x_BTD[:, :num_keys])
    k_BSKH, v_BSKH, memory = memory.followed_by(*new)
    q_BTNH = self._placed_queries(self.queries(x_BTD), positions_BT, rotary)
    k_BSKH = self._placed_keys(k_BSKH, positions_BS, rotary)
    mask = self._narrowed(mask, num_keys or x_BTD.shape[1])
    return self.attend(q_BTNH, k_BSKH, v_BSKH, mask, bias, keys_B), memory

  def empty_memory(
    self, batch: int, length: int, dtype: jax.typing.DTypeLike
  ) -> cache_lib.MemoryCache:
    """Returns the memory with which `recall` starts, of zeros.

    Args:
      batch: number of rows.
      length: number of tokens M in the memory.
      dtype: dtype of keys and values.
    """
    shape = batch, length, self.config.kv_heads, self.config.head_dim
    zeros = jnp.zeros(shape, dtype)
    return cache_lib.MemoryCache(k_BMKH=zeros, v_BMKH=zeros)

  def step(
    self,
    x_BTD: jax.Array,
    mask: mask_lib.Mask,
    cache: Any,
    *,
    positions_BT: jax.Array | None = None,
    rotary: position.Rotary | None = None,
    bias: dense.Bias | None = None,
  ) -> tuple[jax.Array, Any]:
    """Adds keys and values to a cache, and attends to all that it has.

    Args:
      x_BTD: new tokens of each row.
      mask: description of the keys that each query sees; `mask.q_index_BT` is
        the index of each token in its row.
      cache: cache of the layer, from `empty_cache` or `empty_pages`.
      positions_BT: positions of the tokens; None is their index.
      rotary: rotary encoding of queries and keys; None is none.
      bias: bias of the scores; None is none.

    Returns:
      (B, T, D), and the new cache.
    """
    assert mask.q_index_BT is not None, 'the queries of a step need an index'
    if positions_BT is None:
      positions_BT = mask.q_index_BT
    q_BTNH = self.queries(x_BTD)
    k_BTKH, v_BTKH = self.keys_and_values(x_BTD)
    q_BTNH = self._placed_queries(q_BTNH, positions_BT, rotary)
    if rotary is not None:
      k_BTKH = position.rotate(k_BTKH, positions_BT, rotary)
    if self.mixer is not None:
      index_BT = mask.q_index_BT
      out_BTNH, cache = self.mixer.step(q_BTNH, k_BTKH, v_BTKH, index_BT, cache)
      return self._out(out_BTNH), cache
    if isinstance(cache, paged.PagedCache):
      cache = cache.extend(k_BTKH, v_BTKH, mask.q_index_BT)
      return self._step_paged(q_BTNH, mask, cache, bias), cache
    k_BSKH, v_BSKH, index_BS, cache = cache.extend(
      k_BTKH, v_BTKH, mask.q_index_BT
    )
    if self.distances is not None:  # The cache has keys that are not widened.
      positions_BS = jnp.arange(k_BSKH.shape[1])[None]
      k_BSKH = self.distances.keys(k_BSKH, positions_BS)
    mask = dataclasses.replace(mask, k_index_BS=index_BS)
    mask = self._narrowed(mask, cache.capacity)
    # No kernel supports a cache.
    out_BTD = self.attend(q_BTNH, k_BSKH, v_BSKH, mask, bias, kernel='blocks')
    return out_BTD, cache

  def _step_paged(
    self,
    q_BTNH: jax.Array,
    mask: mask_lib.Mask,
    cache: paged.PagedCache,
    bias: dense.Bias | None,
  ) -> jax.Array:
    with jax.named_scope('scores'):
      out_BTNH = paged.attend(
        q_BTNH,
        cache,
        self._narrowed(mask, cache.capacity),
        options=self._options(bias=bias),
        reach=self.config.reach,
        keys=lambda k_BSKH, index_BS: self._placed_keys(k_BSKH, index_BS, None),
      )
    return self._out(out_BTNH)

  def empty_pages(
    self, num_pages: int, size: int, dtype: jax.typing.DTypeLike
  ) -> paged.PagedCache:
    """Returns empty pages for `step`.

    Args:
      num_pages: number of pages.
      size: number of positions in a page.
      dtype: dtype of keys and values.
    """
    config = self.config
    return paged.empty(num_pages, size, config.kv_heads, config.head_dim, dtype)

  def empty_cache(
    self, batch: int, capacity: int, dtype: jax.typing.DTypeLike, slack: int = 0
  ) -> Any:
    """Returns an empty cache for `step`.

    Args:
      batch: number of rows.
      capacity: number of positions in a row.
      dtype: dtype of keys and values.
      slack: largest number of tokens written in one step that may be rejected
        later; see `cache.empty`.

    Raises:
      ValueError: the kind cannot generate token by token.
    """
    config = self.config
    K, H = config.kv_heads, config.head_dim
    if config.decoding is None:
      raise ValueError(attention_kinds.no_decoding(config))
    if self.mixer is not None:
      return self.mixer.empty_cache(batch, capacity, K, H, dtype)
    reach = config.reach
    return cache_lib.empty(batch, capacity, K, H, H, dtype, reach, slack)


def make(
  config: attention_kinds.AttentionConfig,
  embed: int,
  *,
  init: param.Init,
  out_factor: float,
  rngs: nnx.Rngs,
) -> Attention | convolution.Convolve:
  """Builds the layer of a config; arguments as for `Attention`."""
  draw: Any = {'init': init, 'out_factor': out_factor, 'rngs': rngs}
  if isinstance(config, convolution.Convolution):
    return convolution.Convolve(config, embed, **draw)
  return Attention(config, embed, **draw)

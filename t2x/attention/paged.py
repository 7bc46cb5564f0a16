"""Paged key/value caches, for batches whose rows come and go.

The entries of a row are in pages of a common pool, and a table gives the page
of each of its blocks (Kwon et al., 2023, PagedAttention). Attention goes
through the blocks of all rows in a loop and merges their results by a running
maximum and sum. So the keys of a row are never copied together, one program
serves every length, and a step costs what its longest row needs.

Shape suffixes: B batch, T query position, P pages, O slot in a page, N blocks
of a row, S keys of a step, L layers, N query heads where it stands before H, K
key/value heads, G query heads per key/value head, H head dim.
"""

from collections.abc import Callable
import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp

from t2x.attention import cache as cache_lib
from t2x.attention import dense
from t2x.attention import mask as mask_lib
from t2x.parallel import sharding

# Number of keys of a row that one step of the loop reads. With fewer the loop
# itself costs more; more do not fit into the processor's caches.
STEP = 64

Caches = TypeVar('Caches')  # A tree of caches.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedCache:
  """The pages of one layer, for all rows.

  Attributes:
    k: keys, (P, K, O, H).
    v: values, (P, K, O, H).
    pages_BN: page of each block of a row; None between steps, each of which
      sets it by `with_tables`.
  """

  k: cache_lib.Entries
  v: cache_lib.Entries
  pages_BN: jax.Array | None = None

  @property
  def capacity(self) -> int:
    """Number of positions in a row."""
    assert self.pages_BN is not None
    return self.pages_BN.shape[1] * self.k.size

  def extend(
    self, k_BTKH: jax.Array, v_BTKH: jax.Array, index_BT: jax.Array
  ) -> 'PagedCache':
    """Adds keys and values at given indices, in the pages of their rows.

    Args:
      k_BTKH: keys to add.
      v_BTKH: values to add.
      index_BT: index of each in its row; those at or past the capacity are
        dropped.
    """
    assert self.pages_BN is not None
    index_BT = jnp.broadcast_to(index_BT, k_BTKH.shape[:2])
    block_BT, place_BT = jnp.divmod(index_BT, self.k.size)
    pages_BN, num_pages = self.pages_BN, self.k.data_BKSH.shape[0]
    page_BT = jnp.take_along_axis(pages_BN, block_BT, axis=1, mode='clip')
    page_BT = jnp.where(index_BT < self.capacity, page_BT, num_pages)
    put = lambda entries, new: entries.put_at(new, page_BT, place_BT)
    return dataclasses.replace(
      self, k=put(self.k, k_BTKH), v=put(self.v, v_BTKH)
    )


def attend(
  q_BTNH: jax.Array,
  cache: PagedCache,
  mask: mask_lib.Mask,
  *,
  options: dense.AttentionOptions,
  reach: int | None = None,
  keys: Callable[[jax.Array, jax.Array], jax.Array] = lambda k, index: k,
) -> jax.Array:
  """Attends as `dense.attend`, over the pages of a cache.

  Args:
    q_BTNH: queries.
    cache: cache that already has the queries' own entries, and a table.
    mask: description of the keys that each query sees, with `q_index_BT`; an
      index at or past the capacity is padding, whose result is undefined.
    options: scale, cap and bias, without dropout.
    reach: number of tokens from a query back to its farthest key, both
      included; None is all.
    keys: function applied to the keys (B, S, K, H) as they are read, given
      their indices (B, S); for example rotary positions.
  """
  B, T, N, H = q_BTNH.shape
  size, K = cache.k.size, cache.k.data_BKSH.shape[1]
  assert cache.pages_BN is not None and mask.q_index_BT is not None
  index_BT = jnp.broadcast_to(mask.q_index_BT, (B, T))
  is_real_BT = index_BT < cache.capacity
  step = max(STEP // size, 1) * size
  last_B = jnp.where(is_real_BT, index_BT, 0).max(1) // step
  first_B = jnp.zeros_like(last_B)
  if reach is not None:
    nearest_B = jnp.where(is_real_BT, index_BT, cache.capacity).min(1)
    first_B = jnp.clip(nearest_B - reach + 1, 0) // step
    first_B = jnp.minimum(first_B, last_B)
  q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
  q_BTKGH = q_BTKGH * dense.scale_of(options, q_BTKGH)

  def add(number: jax.Array, sums: dense.Sums) -> dense.Sums:
    start_B = (first_B + number) * step
    index_BS = start_B[:, None] + jnp.arange(step)[None]
    pages = _pages(cache, index_BS[:, ::size] // size)
    k_BSKH, v_BSKH = pages(cache.k, q_BTNH.dtype), pages(cache.v, q_BTNH.dtype)
    scores = jnp.einsum(
      'BTKGH,BSKH->BKGTS',
      q_BTKGH,
      keys(k_BSKH, index_BS),
      preferred_element_type=jnp.float32,
    )
    step_mask = dataclasses.replace(
      mask, q_index_BT=index_BT, k_index_BS=index_BS
    )
    whole = slice(0, T), slice(0, step)
    scores = dense.finish_scores(scores, step_mask, options, *whole)
    product = lambda w: jnp.einsum(
      'BKGTS,BSKH->BKGTH',
      w.astype(v_BSKH.dtype),
      v_BSKH,
      preferred_element_type=jnp.float32,
    )
    return dense.add_to_sums(sums, scores, product)

  # The mask hides keys past a row's last block, which may be of any page.
  num = (last_B - first_B).max() + 1
  start = dense.empty_sums((B, K, N // K, T), cache.v.data_BKSH.shape[-1])
  out, _, total = jax.lax.fori_loop(0, num, add, start)
  out = out / jnp.maximum(total, 1e-37)[..., None]
  return jnp.moveaxis(out, 3, 1).reshape(B, T, N, -1).astype(q_BTNH.dtype)


def _pages(
  cache: PagedCache, blocks_BN: jax.Array
) -> Callable[[cache_lib.Entries, jax.typing.DTypeLike], jax.Array]:
  """Returns a function that reads some blocks of each row, (B, S, K, H)."""
  assert cache.pages_BN is not None
  page_BN = jnp.take_along_axis(cache.pages_BN, blocks_BN, axis=1, mode='clip')

  def join(a: jax.Array) -> jax.Array:
    a = jnp.moveaxis(a[page_BN], 1, 2)  # (B, K, N, O, ...)
    return a.reshape(*a.shape[:2], -1, *a.shape[4:])

  def read(
    entries: cache_lib.Entries, dtype: jax.typing.DTypeLike
  ) -> jax.Array:
    return jax.tree.map(join, entries).read(dtype)

  return read


def empty(
  num_pages: int,
  size: int,
  num_heads: int,
  dim: int,
  dtype: jax.typing.DTypeLike,
) -> PagedCache:
  """Returns pages of zeros, which the mask hides by their indices.

  Args:
    num_pages: number of pages P.
    size: number of slots O in a page, a power of two.
    num_heads: number of key/value heads K.
    dim: head dim H.
    dtype: dtype of the entries; int8 keeps a scale for each vector too.
  """
  zeros = lambda: cache_lib.zeros((num_pages, num_heads, size, dim), dtype)
  return PagedCache(k=zeros(), v=zeros())


def placed(caches: Caches) -> Caches:
  """Constrains the sharding of pages: heads split by `rules.kv_heads`."""

  def place(cache: Caches) -> Caches:
    if not isinstance(cache, PagedCache):
      return cache
    axes = None, 'kv_heads', None, None
    place = lambda a, n: sharding.constrain(
      a, *[None] * (a.ndim - n), *axes[:n]
    )
    entries = lambda e: cache_lib.Entries(
      data_BKSH=place(e.data_BKSH, 4),
      scale_BKS=None if e.scale_BKS is None else place(e.scale_BKS, 3),
    )
    return dataclasses.replace(cache, k=entries(cache.k), v=entries(cache.v))

  return jax.tree.map(place, caches, is_leaf=_is_paged)


def with_tables(caches: Caches, pages_BN: jax.Array | None) -> Caches:
  """Returns caches with a table of pages in each layer.

  Args:
    caches: tree of caches.
    pages_BN: page of each block of a row; None removes the tables.
  """

  def place(cache: Caches) -> Caches:
    if not isinstance(cache, PagedCache):
      return cache
    table = pages_BN
    layers = cache.k.data_BKSH.shape[:-4]  # Dimensions of a stack of layers.
    if table is not None and layers:
      table = jnp.broadcast_to(table, (*layers, *table.shape))
    return dataclasses.replace(cache, pages_BN=table)

  return jax.tree.map(place, caches, is_leaf=_is_paged)


def _is_paged(x: object) -> bool:
  return isinstance(x, PagedCache)

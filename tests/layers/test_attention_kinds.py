"""Kinds of attention against loops, caches and leaks."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seen

from t2x.attention import mask as mask_lib
from t2x.attention import patterns
from t2x.layers import attention_config
from t2x.layers import attention_layer
from t2x.layers import convolution
from t2x.layers import linear
from t2x.layers import low_rank
from t2x.layers import param
from t2x.layers import regional
from t2x.layers import sparse
from t2x.layers import transformer_xl

B, T, D = 2, 32, 24
_HEADS = {'num_heads': 4, 'head_dim': 6}
_BLOCKS = ('11000000', '11100001', '01110000', '00111000') + ('11111111',) * 4
KINDS = {
  'dense': attention_config.Dense(**_HEADS, num_kv_heads=2),
  'transformer_xl': transformer_xl.TransformerXL(**_HEADS, num_kv_heads=2),
  'local': attention_config.Local(**_HEADS, window=5),
  'dilated': sparse.Dilated(**_HEADS, window=4, dilation=3),
  'block_sparse': sparse.BlockSparse(**_HEADS, sparse_block=4, rows=_BLOCKS),
  'random': sparse.Random(**_HEADS, sparse_block=4, num_random=2),
  'bigbird': sparse.BigBird(
    **_HEADS, window=4, num_global=2, sparse_block=4, num_random=1
  ),
  'longformer': sparse.Longformer(**_HEADS, window=3, dilation=2, num_global=2),
  'regional': regional.Regional(**_HEADS, region=8),
  'linear': linear.Linear(**_HEADS, num_kv_heads=2),
  'performer': linear.Performer(**_HEADS, num_features=16),
  'linformer': low_rank.Linformer(**_HEADS, rank=8, length=T),
  'nystromformer': low_rank.Nystromformer(**_HEADS, landmarks=4, conv_width=3),
  'convolution': convolution.Convolution(**_HEADS, width=5),
  'dynamic convolution': convolution.Convolution(
    **_HEADS, width=5, dynamic=True, bias=True
  ),
}
CAUSAL = [name for name, kind in KINDS.items() if kind.not_causal is None]
DECODING = [name for name in CAUSAL if KINDS[name].decoding is not None]


def make(config, seed=0):
  init = param.Init(std=0.3)
  rngs = nnx.Rngs(seed)
  return attention_layer.make(config, D, init=init, out_factor=1.0, rngs=rngs)


def inputs(seed=1, length=T):
  return jax.random.normal(jax.random.key(seed), (B, length, D))


@jax.jit
def run(layer, x, mask):
  return layer(x, mask)


def heads(layer, x):
  """Queries, keys and values (B, T, N, H) in float64, keys repeated."""
  of = lambda weight: np.einsum(
    'btd,dnh->btnh', *(np.asarray(a, np.float64) for a in (x, weight[...]))
  )
  q, k, v = of(layer.q_DNH), of(layer.k_DKH), of(layer.v_DKH)
  group = q.shape[2] // k.shape[2]
  return q, np.repeat(k, group, 2), np.repeat(v, group, 2)


def out(layer, heads_BTNH):
  weight = np.asarray(layer.o_NHD[...], np.float64)
  return np.einsum('btnh,nhd->btd', heads_BTNH, weight)


def softmax(scores):
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True)


def masked(layer, x, visible):
  q, k, v = heads(layer, x)
  scores = np.einsum('btnh,bsnh->bnts', q, k) * q.shape[-1] ** -0.5
  weights = softmax(np.where(visible, scores, -np.inf))
  return out(layer, np.einsum('bnts,bsnh->btnh', weights, v))


# --- Softmax kinds see what they say. ---

WORDS = {
  'local': lambda i, j: abs(i - j) < 5,
  'dilated': lambda i, j: abs(i - j) < 12 and (i - j) % 3 == 0,
  'block_sparse': lambda i, j: _BLOCKS[i // 4][j // 4] == '1',
  'longformer': lambda i, j: (
    min(i, j) < 2 or (abs(i - j) <= 4 and (i - j) % 2 == 0)
  ),
}


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('name', WORDS)
def test_a_pattern_shows_what_the_kind_says(name, causal):
  layer, x = make(KINDS[name]), inputs()
  visible = np.array(
    [
      [WORDS[name](i, j) and (j <= i or not causal) for j in range(T)]
      for i in range(T)
    ]
  )
  got = run(layer, x, mask_lib.make(causal=causal))
  np.testing.assert_allclose(got, masked(layer, x, visible), atol=2e-5)


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('name', ['random', 'bigbird'])
def test_random_blocks_besides_the_window_and_the_global_tokens(name, causal):
  kind = KINDS[name]
  pattern = kind.pattern(T, causal=causal)
  visible = np.array(
    [[seen.by_place(pattern, i, j) for j in range(T)] for i in range(T)]
  )
  drawn = kind.num_random * kind.sparse_block
  for i, row in enumerate(visible):
    known = lambda j, i=i: (
      i // 4 == j // 4
      if name == 'random'
      else abs(i - j) < kind.window or min(i, j) < kind.num_global
    )
    others = [j for j in range(T) if row[j] and not known(j)]
    assert all(row[j] for j in range(T) if known(j))
    assert len(others) <= drawn
    assert not causal or not others or max(others) <= i // 4 * 4 + 3
  if causal:
    visible &= np.tri(T, dtype=bool)
  layer, x = make(kind), inputs()
  got = run(layer, x, mask_lib.make(causal=causal))
  np.testing.assert_allclose(got, masked(layer, x, visible), atol=2e-5)


# --- Other kinds. ---


def test_regional_is_dense_where_each_region_is_alike():
  kind = KINDS['regional']
  layer = make(kind)
  x = jnp.repeat(inputs(length=T // kind.region), kind.region, axis=1)
  dense = make(attention_config.Dense(**_HEADS))
  for causal in (True, False):
    mask = mask_lib.make(causal=causal)
    got, want = run(layer, x, mask), run(dense, x, mask)
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize('causal', [True, False])
def test_regional_against_loops(causal):
  kind = KINDS['regional']
  layer, x = make(kind), inputs()
  ids = np.array([[1] * 13 + [2] * 19, [1] * 20 + [2] * 7 + [0] * 5])
  q, k, v = heads(layer, x)
  want = np.zeros_like(q)
  L = kind.region
  for b, t in np.ndindex(B, T):
    keys, values, counts = [], [], []
    for r in range(T // L):
      place = np.arange(r * L, r * L + L)
      if r == t // L:
        near = [
          s for s in place if ids[b, s] == ids[b, t] and (s <= t or not causal)
        ]
        keys += [k[b, s] for s in near]
        values += [v[b, s] for s in near]
        counts += [1] * len(near)
      elif not causal or r < t // L:
        own = place[ids[b, place] == ids[b, place].max()]
        if ids[b, own[0]] == ids[b, t]:
          keys.append(k[b, own].mean(0))
          values.append(v[b, own].mean(0))
          counts.append(len(own))
    scores = np.einsum('nh,snh->ns', q[b, t], keys) * q.shape[-1] ** -0.5
    weights = softmax(scores + np.log(counts))
    want[b, t] = np.einsum('ns,snh->nh', weights, values)
  segments = jnp.asarray(ids)
  got = run(layer, x, mask_lib.self_attention(segments, causal=causal))
  np.testing.assert_allclose(got, out(layer, want), atol=2e-5)


@pytest.mark.parametrize('length', [T, 600])
def test_transformer_xl_against_its_formula(length):
  """With R(i - j) written out, also in rows that are scanned."""
  layer = make(KINDS['transformer_xl'])
  x = inputs(length=length)
  got = run(layer, x, mask_lib.make(causal=True))
  own = jax.device_get(layer)
  q = np.einsum('btd,dnh->btnh', x, own.q_DNH[...])
  k, v = (
    np.repeat(np.einsum('btd,dkh->btkh', x, w[...]), 2, axis=2)
    for w in (own.k_DKH, own.v_DKH)
  )
  distance = np.arange(length)[:, None] - np.arange(length)
  frequency = 1 / 10000 ** (np.arange(0, D, 2) / D)
  angle = distance[..., None] * frequency
  waves = np.concatenate([np.sin(angle), np.cos(angle)], -1)
  r = np.einsum('tsd,dnh->tsnh', waves, own.distances.r_DNH[...])
  u = own.distances.content_bias_NH[...]
  w = own.distances.position_bias_NH[...]
  scores = np.einsum('btnh,bsnh->bnts', q + u, k)
  scores += np.einsum('btnh,tsnh->bnts', q + w, r)
  scores = np.where(distance >= 0, scores / 6**0.5, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  want = np.einsum('bnts,bsnh->btnh', weights, v)
  want = np.einsum('btnh,nhd->btd', want, own.o_NHD[...])
  np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


def test_linformer_of_full_rank_is_dense():
  config = low_rank.Linformer(**_HEADS, rank=T, length=T)
  layer, x = make(config), inputs()
  layer.mixer.key_TR = nnx.Param(jnp.eye(T))
  layer.mixer.value_TR = nnx.Param(jnp.eye(T))
  want = masked(layer, x, np.ones((T, T), bool))
  np.testing.assert_allclose(run(layer, x, mask_lib.Mask()), want, atol=2e-5)


@pytest.mark.parametrize('sharing', ['heads', 'key_value'])
def test_linformer_against_its_formula(sharing):
  config = dataclasses.replace(KINDS['linformer'], sharing=sharing)
  layer, x = make(config), inputs()
  short = x[:, :20]
  q, k, v = heads(layer, short)
  weight = lambda w: np.asarray(w[...], np.float64)[:20]
  e = weight(layer.mixer.key_TR)
  f = e if sharing == 'key_value' else weight(layer.mixer.value_TR)
  k, v = np.einsum('btnh,tr->brnh', k, e), np.einsum('btnh,tr->brnh', v, f)
  weights = softmax(np.einsum('btnh,brnh->bntr', q, k) * q.shape[-1] ** -0.5)
  want = out(layer, np.einsum('bntr,brnh->btnh', weights, v))
  got = run(layer, short, mask_lib.Mask())
  np.testing.assert_allclose(got, want, atol=3e-5)


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('name', ['convolution', 'dynamic convolution'])
def test_convolutions_against_loops(name, causal):
  layer, x = make(KINDS[name]), inputs()
  ids = np.array([[1] * 13 + [2] * 19, [1] * 20 + [2] * 7 + [0] * 5])
  of = lambda w, b: (
    np.einsum('btd,dnh->btnh', np.asarray(x), np.asarray(w[...]))
    + (0 if b is None else np.asarray(b[...]))
  )
  gate = of(layer.gate_DNH, layer.gate_bias_NH)
  v = of(layer.v_DNH, layer.v_bias_NH) / (1 + np.exp(-gate))
  taps = np.asarray(layer.taps[...])
  if name == 'convolution':
    taps = np.broadcast_to(softmax(taps), (B, T, 4, 5))
  else:
    taps = softmax(np.einsum('btd,dnw->btnw', np.asarray(x), taps))
  want = np.zeros_like(v)
  for b, t, i in np.ndindex(B, T, 5):
    s = t + i - (4 if causal else 2)
    if 0 <= s < T and ids[b, s] == ids[b, t]:
      want[b, t] += taps[b, t, :, i, None] * v[b, s]
  mask = mask_lib.self_attention(jnp.asarray(ids), causal=causal)
  np.testing.assert_allclose(run(layer, x, mask), out(layer, want), atol=2e-5)


# --- Caches and leaks. ---


@pytest.mark.parametrize('name', DECODING)
def test_a_cache_goes_on_as_the_whole_row_does(name):
  """A chunk longer than the window, one of two, then token by token."""
  layer, x = make(KINDS[name]), inputs()
  want = run(layer, x, mask_lib.make(causal=True))

  @jax.jit
  def step(x, index, cache):
    return layer.step(x, mask_lib.make(causal=True, q_index_BT=index), cache)

  cache = layer.empty_cache(B, T, jnp.float32)
  outs, start = [], 0
  for size in (14, 2, *(1,) * 16):
    index = jnp.arange(start, start + size)[None]
    part, cache = step(x[:, start : start + size], index, cache)
    outs.append(part)
    start += size
  np.testing.assert_allclose(jnp.concatenate(outs, 1), want, atol=3e-5)


@pytest.mark.parametrize('name', DECODING)
def test_padding_in_a_prompt_leaves_no_trace(name):
  layer, x = make(KINDS[name]), inputs()
  lengths = jnp.asarray([[7], [12]])
  index = jnp.where(jnp.arange(12)[None] < lengths, jnp.arange(12)[None], T)
  step = jax.jit(
    lambda x, index, cache: layer.step(
      x, mask_lib.make(causal=True, q_index_BT=index), cache
    )
  )
  empty = lambda rows: layer.empty_cache(rows, T, jnp.float32)
  _, padded = step(x[:, :12], index, empty(B))
  together, _ = step(x[:, 20:21], lengths, padded)
  _, cache = step(x[:1, :7], jnp.arange(7)[None], empty(1))
  alone, _ = step(x[:1, 20:21], lengths[:1], cache)
  np.testing.assert_allclose(together[:1], alone, atol=3e-5)


def test_windows_and_states_take_no_more_room_in_longer_rows():
  size = lambda name, capacity: sum(
    a.size
    for a in jax.tree.leaves(
      make(KINDS[name]).empty_cache(B, capacity, jnp.float32)
    )
  )
  for name in DECODING:
    grows = size(name, 4000) > size(name, 1000)
    says = KINDS[name].decoding == 'keys and values of all positions'
    assert grows == says, name


@pytest.mark.parametrize('name', [n for n in CAUSAL if n not in DECODING])
def test_no_cache_where_there_is_no_incremental_decoding(name):
  with pytest.raises(ValueError, match=f'{name} has no incremental decoding'):
    make(KINDS[name]).empty_cache(B, T, jnp.float32)


@pytest.mark.parametrize('name', CAUSAL)
def test_later_tokens_change_no_bit(name):
  layer, x = make(KINDS[name]), inputs()
  mask = mask_lib.make(causal=True)
  for place in (T - 1, 17, 1):
    changed = x.at[:, place].add(3.0)
    before, after = run(layer, x, mask), run(layer, changed, mask)
    np.testing.assert_array_equal(before[:, :place], after[:, :place])
    assert (before[:, place] != after[:, place]).any()


@pytest.mark.parametrize('name', KINDS)
def test_other_documents_and_padding_change_no_bit(name):
  kind = KINDS[name]
  layer, x = make(kind), inputs()
  # Of kinds that mix whole rows, padding alone.
  ids = [1] * 20 + [0] * 12 if kind.mixes_rows else [1] * 11 + [2] * 21
  own = np.array(ids) == 1
  mask = mask_lib.self_attention(jnp.asarray([ids] * B), causal=False)
  changed = jnp.where(own[None, :, None], x, x + 3.0)
  before, after = run(layer, x, mask), run(layer, changed, mask)
  np.testing.assert_array_equal(before[:, own], after[:, own])
  assert (before[:, ~own] != after[:, ~own]).any()


@pytest.mark.parametrize('name', KINDS)
def test_gradients_against_differences(name):
  layer, x, step = make(KINDS[name]), inputs(), inputs(seed=2)
  weights = inputs(seed=3)
  mask = mask_lib.Mask()
  f = jax.jit(lambda layer, x: (layer(x, mask) * weights).sum())
  by_layer, by_x = jax.jit(jax.grad(f, (0, 1), allow_int=True))(layer, x)
  found = (f(layer, x + 1e-2 * step) - f(layer, x - 1e-2 * step)) / 2e-2
  np.testing.assert_allclose(found, (by_x * step).sum(), rtol=3e-2)
  for leaf in jax.tree.leaves(nnx.state(by_layer, nnx.Param)):
    assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0


@pytest.mark.parametrize('landmarks', [4, 23])
def test_landmarks_without_tokens_are_no_landmarks(landmarks):
  kind = dataclasses.replace(KINDS['nystromformer'], landmarks=landmarks)
  _padding_leaves_no_trace(make(kind))


# Of the others, what is seen depends on the length.
@pytest.mark.parametrize(
  'name', [n for n in KINDS if n not in ('block_sparse', 'random', 'bigbird')]
)
def test_padding_leaves_no_trace(name):
  _padding_leaves_no_trace(make(KINDS[name]))


def _padding_leaves_no_trace(layer):
  x = inputs()
  ids = jnp.asarray([[1] * 20 + [0] * 12] * B)
  padded = run(layer, x, mask_lib.self_attention(ids, causal=False))
  alone = run(layer, x[:, :20], mask_lib.Mask())
  # Outputs of Nystromformer are up to 6 here.
  np.testing.assert_allclose(padded[:, :20], alone, rtol=1e-5, atol=1e-5)


def test_features_are_drawn_anew_when_it_is_time():
  config = dataclasses.replace(KINDS['performer'], redraw_every=3)
  first, second = make(config, seed=0), make(config, seed=1)
  redraw = jax.jit(linear.redraw)
  kept = redraw(first, jnp.asarray(4))
  w = lambda layer: layer.mixer.w_HF[...]
  np.testing.assert_array_equal(w(kept), w(first))
  new = redraw(first, jnp.asarray(6))
  assert (w(new) != w(first)).all()
  np.testing.assert_array_equal(new.q_DNH[...], first.q_DNH[...])
  # Others at the next time, and of another seed.
  assert (w(redraw(new, jnp.asarray(9))) != w(new)).all()
  assert (w(redraw(second, jnp.asarray(6))) != w(new)).all()
  blocks = np.asarray(w(new)).T[:6]
  products = blocks @ blocks.T
  assert abs(products - np.diag(np.diag(products))).max() < 1e-4


def test_patterns_are_checked_against_lengths():
  with pytest.raises(ValueError, match='num_global=2 tokens lie outside'):
    dataclasses.replace(KINDS['longformer'], window=1).check_length(1)
  with pytest.raises(ValueError, match='window=4 reaches 10 tokens, more than'):
    KINDS['dilated'].check_length(9)
  KINDS['local'].check_length(4)  # As that of a checkpoint of others.
  with pytest.raises(ValueError, match='num_random=2 blocks cannot be drawn'):
    KINDS['random'].check_length(4)
  for name in ('block_sparse', 'linformer'):
    with pytest.raises(ValueError, match=f'{name} is made for 32 tokens .* 40'):
      make(KINDS[name])(inputs(length=40), mask_lib.Mask())
    with pytest.raises(ValueError, match=f'{name} is made for 32 tokens .* 33'):
      KINDS[name].check_length(T + 1)
  with pytest.raises(ValueError, match='not all 0'):
    sparse.BlockSparse(rows=('00', '00'))
  with pytest.raises(ValueError, match='num_global=0, qk_norm=False with'):
    sparse.Longformer(num_global=0, global_projections=True)
  with pytest.raises(ValueError, match='square matrix of 0 and 1'):
    sparse.BlockSparse(rows=('10', '1'))
  with pytest.raises(ValueError, match='a convolution has no keys'):
    convolution.Convolution(num_heads=4, num_kv_heads=2)
  assert patterns.sees_itself(KINDS['bigbird'].pattern(T, causal=False), T)

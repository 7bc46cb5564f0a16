"""XLNet against the other library's, weight by weight, in both streams."""

import dataclasses
import functools

import extras
from flax import nnx
import jax
import numpy as np

from t2x.models import encoder
from t2x.models import forward
from t2x.models import presets
from t2x.models import segment_memory
from t2x.objectives import masking
from t2x.objectives import noise
from t2x.objectives import permutation
from t2x.objectives import rows as rows_lib
from t2x.objectives import vocab as vocab_lib

torch = extras.need('torch', extra='reference')
transformers = extras.need('transformers', extra='reference')
VOCAB, B, T, D, N, LAYERS = 120, 3, 24, 32, 4, 3


def both():
  """The same weights in both libraries."""
  preset = presets.xlnet_base()
  config = dataclasses.replace(
    preset,
    vocab_size=VOCAB,
    vocab_multiple=8,
    num_layers=LAYERS,
    embed_dim=D,
    attention=dataclasses.replace(preset.attention, num_heads=N, head_dim=8),
    mlp=dataclasses.replace(preset.mlp, hidden=64),
    init=dataclasses.replace(preset.init, std=0.2),
  )
  ours = jax.jit(lambda: encoder.Encoder(config, rngs=nnx.Rngs(0)))()
  theirs = transformers.XLNetLMHeadModel(
    transformers.XLNetConfig(
      vocab_size=VOCAB, d_model=D, n_layer=LAYERS, n_head=N, d_inner=64
    )
  ).eval()
  copy(jax.device_get(ours), theirs)
  return ours, theirs


def copy(ours, theirs):
  put = lambda to, a: to.copy_(torch.tensor(np.array(a)))
  model = theirs.transformer
  with torch.no_grad():
    put(model.word_embedding.weight, ours.embeddings.tokens.table_VD[...])
    put(theirs.lm_loss.weight, ours.embeddings.tokens.table_VD[...])
    put(theirs.lm_loss.bias, ours.output_bias_V[...])
    put(model.mask_emb[0, 0], ours.query_D[...])
    for i, layer in enumerate(model.layer):
      own = jax.tree.map(lambda a, i=i: a[i], ours.tower.layers.group[0])
      attention, to = own.attention, layer.rel_attn
      put(to.q, attention.q_DNH[...])
      put(to.k, attention.k_DKH[...])
      put(to.v, attention.v_DKH[...])
      put(to.o, np.moveaxis(np.array(attention.o_NHD[...]), -1, 0))
      put(to.r, attention.distances.r_DNH[...])
      put(to.r_w_bias, attention.distances.content_bias_NH[...])
      put(to.r_r_bias, attention.distances.position_bias_NH[...])
      put(to.r_s_bias, attention.distances.type_bias_NH[...])
      put(to.seg_embed, attention.distances.types_ZNH[...])
      put(to.layer_norm.weight, own.attention_norm.scale[...])
      put(to.layer_norm.bias, own.attention_norm.bias[...])
      put(layer.ff.layer_norm.weight, own.mlp_norm.scale[...])
      put(layer.ff.layer_norm.bias, own.mlp_norm.bias[...])
      put(layer.ff.layer_1.weight, own.mlp.up_DF[...].T)
      put(layer.ff.layer_1.bias, own.mlp.up_bias_F[...])
      put(layer.ff.layer_2.weight, own.mlp.down_FD[...].T)
      put(layer.ff.layer_2.bias, own.mlp.down_bias_D[...])


def batch_of(seed=0):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(105, VOCAB, (B, T)).astype(np.int32)
  objective = permutation.Permutation(rate=0.4, masking=masking.Tokens())
  return objective.examples(
    rows_lib.Rows(tokens, np.ones((B, T), np.int32)),
    keys=noise.keys(seed, np.arange(B)),
    vocab=vocab_lib.Vocab(size=VOCAB),
    length=T,
  )


def test_one_stream():
  ours, theirs = both()
  tokens = batch_of()['inputs']
  # Sentences A and B, and the last token of a kind of its own, as released.
  types = np.sort(np.random.default_rng(1).integers(0, 2, (B, T)))
  types[:, -1] = 2
  fn = jax.jit(lambda model, **more: model(tokens, **more))
  found = []
  for more in ({}, {'token_types': types}):
    theirs_more = {'token_type_ids': torch.tensor(types)} if more else {}
    with torch.no_grad():
      want = theirs(torch.tensor(tokens).long(), **theirs_more).logits.numpy()
    found.append(np.asarray(fn(ours, **more)))
    np.testing.assert_allclose(found[-1], want, rtol=1e-4, atol=1e-4)
  assert np.abs(found[0] - found[1]).max() > 0.1


def masks_of(batch):
  """Their masks, which say pair by pair what the ranks say."""
  ranks, asked = batch['ranks'], batch['weights'] > 0
  num = asked.shape[1]
  # 1 where i does not see j; in their first stream each sees itself too.
  hidden = np.ones((B, T, T), np.float32)
  target = np.zeros((B, num, T), np.float32)
  for row in range(B):
    for i, j in np.ndindex(T, T):
      before = ranks[row, j] < ranks[row, i]
      if before or ranks[row, i] == ranks[row, j] == 0:
        hidden[row, i, j] = 0
    for m in np.flatnonzero(asked[row]):
      target[row, m, batch['query_places'][row, m]] = 1
  return {
    'perm_mask': torch.tensor(hidden),
    'target_mapping': torch.tensor(target),
  }


def test_two_streams():
  ours, theirs = both()
  batch = batch_of()
  asked = batch['weights'] > 0
  tokens = torch.tensor(batch['inputs']).long()
  with torch.no_grad():
    want = theirs(tokens, **masks_of(batch)).logits.numpy()
  names = set(batch) - {'targets', 'weights'}
  fn = jax.jit(lambda model: model(**{name: batch[name] for name in names}))
  got = np.asarray(fn(ours))
  np.testing.assert_allclose(got[asked], want[asked], rtol=1e-4, atol=1e-4)


def test_memory():
  """A second row after the first: their states, our keys and values."""
  ours, theirs = both()
  config = dataclasses.replace(ours.config, memory=2 * T)
  rows = batch_of(), batch_of(seed=1)
  found = []
  mems = None
  with torch.no_grad():
    for batch in rows:
      asked = masks_of(batch)
      tokens = torch.tensor(batch['inputs']).long()
      seen = theirs(tokens, mems=mems, use_mems=True, **asked)
      mems = seen.mems
      found.append(seen.logits.numpy())
  model = encoder.Encoder(config, rngs=nnx.Rngs(0))
  model = jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves(ours))
  kept = segment_memory.empty(model, B, config.memory)

  @jax.jit
  def run(model, batch, memory):
    x, _, memory = forward.recall(model, batch, memory)
    return model.head(model.leave(x, batch)), memory

  for number, (batch, want) in enumerate(zip(rows, found)):
    goes_on = np.full((B, 1), int(number > 0))
    got, kept = run(model, {**batch, 'continues': goes_on}, kept)
    asked = batch['weights'] > 0
    got = np.asarray(got)[asked]
    np.testing.assert_allclose(got, want[asked], rtol=1e-4, atol=1e-4)
  alone, _ = run(model, {**rows[1], 'continues': 0 * goes_on}, kept)
  assert np.abs(np.asarray(alone)[asked] - got).max() > 0.01


def test_sizes():
  """As the other library counts."""
  for preset, size in (
    (presets.xlnet_base, (768, 12, 12, 3072)),
    (presets.xlnet_large, (1024, 24, 16, 4096)),
  ):
    width, layers, heads, inner = size
    config = transformers.XLNetConfig(
      d_model=width, n_layer=layers, n_head=heads, d_inner=inner
    )
    with torch.device('meta'):
      theirs = transformers.XLNetLMHeadModel(config)
    num = sum(p.numel() for p in theirs.parameters())
    make = functools.partial(encoder.Encoder, preset())
    shapes = jax.eval_shape(lambda make=make: make(rngs=nnx.Rngs(0)))
    ours = sum(x.size for x in jax.tree.leaves(shapes))
    assert ours == num

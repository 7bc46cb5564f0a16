"""Arguments that are given alone count; padding leaves no trace in a model."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2x.attention import context
from t2x.attention import dense
from t2x.attention import mask as mask_lib
from t2x.decode import generate
from t2x.decode import sampling
from t2x.layers import attention_config
from t2x.layers import convolution
from t2x.layers import linear
from t2x.layers import low_rank
from t2x.layers import mlp
from t2x.layers import moe
from t2x.layers import position
from t2x.layers import routing
from t2x.layers import transformer_xl
from t2x.models import decoder
from t2x.models import encoder
from t2x.models import encoder_decoder
from t2x.models import forward
from t2x.models import segment_memory
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding

HEADS = {'num_heads': 4, 'head_dim': 8}
BOTH = {
  'vocab_size': 50,
  'num_layers': 2,
  'embed_dim': 32,
  'attention': attention_config.Dense(**HEADS),
  'mlp': mlp.MlpConfig(hidden=48),
}
EXPERTS = moe.MoeConfig(
  hidden=24, num_experts=4, router=routing.TokenChoice(capacity=1.25)
)
CHOSEN = dataclasses.replace(EXPERTS, router=routing.ExpertChoice())
OF_BOTH = {
  'learned': {},
  'buckets': {'position': position.RelativeBuckets()},
  'convolution': {'attention': convolution.Convolution(width=3, **HEADS)},
  'experts': {'mlp': EXPERTS},
}
OF_ENCODERS = {
  'learned': {},
  'experts': {'mlp': EXPERTS},
  'transformer_xl': {
    'attention': transformer_xl.TransformerXL(**HEADS),
    'position': None,
  },
  'experts that choose': {'mlp': CHOSEN},
}
LENGTH, T = 5, 12  # Of the first of two rows; the second is whole.


@functools.cache
def two_sided(name):
  config = encoder_decoder.EncoderDecoderConfig(**BOTH | OF_BOTH[name])
  return make(encoder_decoder.EncoderDecoder, config)


def make(kind, config):
  return jax.jit(lambda: kind(config, rngs=nnx.Rngs(0)))()


def of(kind, config, **fields):
  return make(kind, config(**BOTH | fields))


def ids(rows, length, seed=0):
  return np.random.default_rng(seed).integers(1, 50, (rows, length))


def segments():
  return (np.arange(T) < np.array([[LENGTH], [T]])).astype(np.int32)


@pytest.mark.parametrize('name', OF_BOTH)
def test_segments_of_the_source_alone_hide_its_padding(name):
  source, targets = ids(2, T), ids(2, 6, seed=1)

  @jax.jit
  def fn(model):
    first = targets[:1]
    return (
      model(targets, encoder_inputs=source, encoder_segments=segments()),
      model(targets, encoder_inputs=source),
      model(first, encoder_inputs=source[:1, :LENGTH]),
    )

  padded, seen, alone = fn(two_sided(name))
  np.testing.assert_allclose(padded[0], alone[0], atol=3e-5)
  np.testing.assert_allclose(padded[1], seen[1], atol=3e-5)
  assert np.abs(seen - padded)[0].max() > 1e-3  # The padding would count.


@pytest.mark.parametrize('name', [n for n in OF_BOTH if n != 'experts'])
def test_segments_of_the_targets_alone_keep_them_apart(name):
  source, first, second = ids(1, 5), ids(1, 6, seed=1), ids(1, 3, seed=2)
  row = np.concatenate([first, second, 0 * second], 1)
  own = np.array([[1] * 6 + [2] * 3 + [0] * 3])
  places = np.array([[*range(6), *range(3), *range(3)]])

  @jax.jit
  def fn(model):
    call = functools.partial(model, encoder_inputs=source)
    packed = call(row, segments=own, positions=places)
    return packed, call(first), call(second)

  packed, *apart = fn(two_sided(name))
  np.testing.assert_allclose(packed[:, :6], apart[0], atol=3e-5)
  np.testing.assert_allclose(packed[:, 6:9], apart[1], atol=3e-5)


def test_a_packed_source_alone_is_one_source():
  """Targets without segments see all its documents, and no padding."""
  own = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0]])
  mask = mask_lib.cross_attention(ids(1, 4), None, own)
  q, k = (np.array(a) for a in (mask.q_segments_BT, mask.k_segments_BS))
  assert ((q[:, :, None] == k[:, None]) == (own != 0)[:, None]).all()


@pytest.mark.parametrize('how', ['ring', 'all_to_all'])
def test_segments_of_the_source_alone_where_rows_are_split(how):
  model, source = two_sided('learned'), ids(2, 8)
  own = np.array([[1] * 5 + [0] * 3, [1] * 8])
  fn = lambda m: m(source, encoder_inputs=source, encoder_segments=own)
  whole = jax.jit(fn)(model)
  mesh = mesh_lib.make(mesh_lib.MeshConfig(context=2), jax.devices()[:2])
  with sharding.use(mesh, sharding.Rules(context_attention=how)):
    split = jax.jit(lambda m: fn(m))(model)
  np.testing.assert_allclose(split, whole, atol=3e-5)


def test_answers_of_a_padded_batch_are_those_of_its_rows():
  model = two_sided('buckets')
  rows = [list(ids(2, T)[0, :LENGTH]), list(ids(2, T)[1])]
  found = generate.generate(
    model,
    rows,
    num_tokens=4,
    start_id=1,
    sampling=sampling.SamplingConfig(temperature=0.0),
  ).tokens
  for row, tokens in zip(rows, found):
    # Greedy: each is the likeliest after those before it, of one pass.
    inputs = np.array([[1, *tokens[:-1]]])
    logits = jax.jit(model)(inputs, encoder_inputs=np.array([row]))
    assert list(tokens) == logits[0].argmax(-1).tolist()


@pytest.mark.parametrize('name', OF_ENCODERS)
def test_padding_leaves_no_trace_in_an_encoder(name):
  fields = OF_ENCODERS[name] | {'pooler': True}
  model = of(encoder.Encoder, encoder.EncoderConfig, **fields)
  tokens = ids(2, T)
  other = np.where(segments(), tokens, 7)

  @jax.jit
  def fn(model):
    both = np.concatenate([tokens, other])
    padded = model.encode(both, segments=np.concatenate([segments()] * 2))
    alone = model.encode(tokens[:1, :LENGTH])
    return padded, alone, model.pool(padded), model.pool(alone)

  padded, alone, pooled, pooled_alone = fn(model)
  np.testing.assert_allclose(padded[0, :LENGTH], alone[0], atol=5e-5)
  np.testing.assert_allclose(pooled[0], pooled_alone[0], atol=5e-5)
  np.testing.assert_array_equal(padded[0, :LENGTH], padded[2, :LENGTH])


def test_a_row_of_padding_has_numbers_and_gradients():
  model = of(
    encoder.Encoder,
    encoder.EncoderConfig,
    attention=low_rank.Nystromformer(landmarks=7, **HEADS),
  )
  own = np.array([[0] * 9, [1] * 4 + [0] * 5])

  @jax.jit
  def fn(model):
    x_BTD = model.encode(ids(2, 9), segments=own)
    return (x_BTD * own[..., None]).sum()

  for leaf in jax.tree.leaves(jax.grad(fn, allow_int=True)(model)):
    assert np.isfinite(leaf).all()


def test_a_prefix_needs_no_segments():
  model = of(decoder.Decoder, decoder.DecoderConfig)
  tokens, ends = ids(2, 8), np.array([[3] * 8, [6] * 8])
  ones = np.ones_like(tokens)

  @jax.jit
  def fn(model):
    found = model(tokens, prefix_ends=ends)
    return found, model(tokens, prefix_ends=ends, segments=ones), model(tokens)

  found, both, without = fn(model)
  np.testing.assert_allclose(found, both, atol=3e-5)
  assert np.abs(found - without)[:, 0].max() > 1e-3


@pytest.mark.parametrize(
  'kind', [linear.Linear(**HEADS), convolution.Convolution(width=3, **HEADS)]
)
def test_kinds_without_scores_refuse_a_prefix(kind):
  model = of(decoder.Decoder, decoder.DecoderConfig, attention=kind)
  tokens = ids(1, 8)
  with pytest.raises(ValueError, match='prefix_BS: kinds of attention without'):
    jax.eval_shape(lambda m: m(tokens, prefix_ends=np.full((1, 8), 3)), model)


MIXING = {
  'linformer': low_rank.Linformer(rank=4, length=16, **HEADS),
  'nystromformer': low_rank.Nystromformer(landmarks=7, **HEADS),
}


@pytest.mark.parametrize('name', MIXING)
def test_kinds_that_mix_rows_refuse_several_documents(name):
  model = of(encoder.Encoder, encoder.EncoderConfig, attention=MIXING[name])
  tokens, own = ids(2, 8), np.array([[1] * 8, [1] * 4 + [2] * 4])
  with pytest.raises(ValueError, match=f'{name} mixes the .* row 1 has segm'):
    model(tokens, segments=own)
  fn = jax.jit(lambda m, own: m(tokens, segments=own))
  found = fn(model, own)
  assert np.isfinite(found[0]).all() and np.isnan(found[1]).all()
  # A row whose one document has another number is as good.
  own = np.array([[3] * 8, [2] * 4 + [0] * 4])
  assert np.isfinite(fn(model, own)).all()


ENCODER = {'vocab_size': 50, 'num_layers': 1, 'embed_dim': 32}
DROPPED = ('places', 'query_inputs', 'query_segments', 'query_positions')


@pytest.mark.parametrize(
  ('fields', 'given', 'message'),
  [
    ({}, {'attention_mask'}, 'takes no attention_mask; what it takes'),
    ({}, {'prefix_ends'}, 'takes no prefix_ends'),
    ({}, {'token_types'}, 'num_token_types=0: the model has no vectors'),
    ({}, {'places'}, 'places without positions, segments'),
    ({}, {'ranks', 'segments'}, 'ranks: here no second stream'),
    ({'two_stream': True}, {'ranks'}, 'positions, query_places, .* missing'),
    ({'query_layers': 1}, DROPPED, 'positions, query_places, segments missing'),
    ({'query_layers': 1}, {'target_positions'}, 'target_positions not read'),
  ],
)
def test_arrays_that_would_be_ignored_or_are_missing(fields, given, message):
  config = encoder.EncoderConfig(**ENCODER, **fields)
  model = encoder.Encoder(config, rngs=nnx.Rngs(0))
  tokens = ids(1, 8)
  with pytest.raises(ValueError, match=message):
    model(tokens, **{name: np.ones_like(tokens) for name in given})


def test_none_is_as_good_as_missing():
  config = encoder.EncoderConfig(**ENCODER)
  model = encoder.Encoder(config, rngs=nnx.Rngs(0))
  nothing = {'segments': None, 'token_types': None, 'query_inputs': None}
  shape = jax.eval_shape(lambda m: m(ids(1, 8), **nothing), model).shape
  assert shape == (1, 8, 50)


def test_a_memory_needs_no_segments_and_asks_for_the_rest():
  config = decoder.DecoderConfig(
    **BOTH | {'num_layers': 1, 'position': position.Rotary()}, memory=8
  )
  model, tokens = make(decoder.Decoder, config), ids(1, 16)
  rows = [
    {'inputs': tokens[:, 8 * i : 8 * i + 8], 'continues': np.full((1, 1), i)}
    for i in range(2)
  ]

  @jax.jit
  def fn(model):
    before, found = segment_memory.empty(model, 1, 8), []
    for row in rows:
      x_BTD, _, before = forward.recall(model, row, before)
      found.append(model.leave(x_BTD, row))
    return jnp.concatenate(found, 1), model.hidden(tokens), before

  found, whole, before = fn(model)
  np.testing.assert_allclose(found, whole, atol=3e-5)
  with pytest.raises(ValueError, match="no 'continues'"):
    forward.recall(model, {'inputs': tokens[:, :8]}, before)
  more = {**rows[1], 'prefix_ends': np.ones((1, 8), int)}
  with pytest.raises(ValueError, match="'prefix_ends' beside a memory"):
    forward.recall(model, more, before)


def test_a_mask_of_one_side():
  one = jnp.ones((1, 4), jnp.int32)
  with pytest.raises(ValueError, match='k_segments_BS without q_segments_BT'):
    mask_lib.Mask(k_segments_BS=one)
  with pytest.raises(ValueError, match='q_ranks_BT without k_ranks_BS'):
    mask_lib.Mask(q_ranks_BT=one)
  with pytest.raises(ValueError, match='prefix_BS with pattern=Causal'):
    dataclasses.replace(mask_lib.make(causal=True), prefix_BS=one)


def test_masks_of_whole_rows_where_rows_are_split():
  q = jnp.ones((1, 8, 2, 4))
  ranks = jnp.arange(8)[None]
  mask = mask_lib.Mask(q_ranks_BT=ranks, k_ranks_BS=ranks)
  assert dense.attend(q, q, q, mask).shape == q.shape
  mesh = mesh_lib.make(mesh_lib.MeshConfig(context=2), jax.devices()[:2])
  with sharding.use(mesh, sharding.Rules()):
    with pytest.raises(sharding.ShardingError, match='mask with ranks'):
      jax.jit(lambda: context.attend(q, q, q, mask))()

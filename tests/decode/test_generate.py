"""Generation: the cache against recomputing, rows against each other."""

import dataclasses
import functools
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2x.decode import decode_loop
from t2x.decode import decoding_weights
from t2x.decode import generate
from t2x.decode import prefill
from t2x.decode import sampling
from t2x.layers import attention_config
from t2x.layers import convolution
from t2x.layers import linear
from t2x.layers import mlp
from t2x.layers import moe
from t2x.layers import norm
from t2x.layers import param
from t2x.layers import position
from t2x.layers import regional
from t2x.layers import routing
from t2x.layers import sparse
from t2x.models import decoder
from t2x.models import encoder
from t2x.models import encoder_decoder
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding

VOCAB = 50
GREEDY = sampling.SamplingConfig(temperature=0)
PROMPTS = [[7, 3, 9], list(range(1, 18)), [5] * 10 + list(range(20, 30))]

HEADS = attention_config.Dense(num_heads=4, head_dim=8)
GROUPED = attention_config.Dense(
  num_heads=4, num_kv_heads=2, head_dim=8, bias=True
)
WINDOW = attention_config.Local(num_heads=4, head_dim=8, window=5)
# Weights large enough that positions and neighbours change the next token.
SHARED = {
  'vocab_size': VOCAB,
  'num_layers': 2,
  'embed_dim': 32,
  'attention': HEADS,
  'mlp': mlp.MlpConfig(hidden=48),
  'init': param.Init(std=0.3),
}
LEARNED = position.Learned(max_length=96, std=0.5)
ROTARY = position.Rotary()
DECODERS = {
  'learned': {'position': LEARNED},
  'sinusoidal_post_norm': {
    'position': position.Sinusoidal(),
    'residual': 'post_norm',
  },
  'rotary_half': {'position': ROTARY, 'norm': norm.RMSNorm()},
  'rotary_interleaved': {
    'position': position.Rotary(style='interleaved', fraction=0.5)
  },
  'relative': {
    'position': position.RelativeBuckets(num_buckets=8, max_distance=20)
  },
  'alibi': {'position': position.Alibi()},
  'grouped_query': {'attention': GROUPED, 'position': ROTARY},
  'dense_and_local': {
    'attention_pattern': (HEADS, WINDOW),
    'num_layers': 5,
    'position': LEARNED,
  },
  'parallel': {'residual': 'parallel', 'position': ROTARY},
  'sandwich': {  # As Gemma 2, with layers that are not turned.
    'attention_pattern': (
      dataclasses.replace(WINDOW, soft_cap=2.0, scale=0.7),
      dataclasses.replace(HEADS, soft_cap=2.0, qk_norm=True, rotary=False),
    ),
    'num_layers': 3,
    'norm': norm.RMSNorm(unit_offset=True),
    'residual': 'sandwich',
    'position': ROTARY,
    'embed_scale': True,
    'logit_soft_cap': 3.0,
  },
  'kinds': {
    'attention_pattern': (
      linear.Performer(num_heads=4, head_dim=8, num_features=16),
      convolution.Convolution(num_heads=4, head_dim=8, width=4),
      sparse.BigBird(
        num_heads=4,
        head_dim=8,
        window=4,
        num_global=2,
        sparse_block=8,
        num_random=1,
      ),
      sparse.Dilated(num_heads=4, head_dim=8, window=3, dilation=2),
    ),
    'num_layers': 4,
    'position': ROTARY,
  },
  'experts': {
    'mlp': moe.MoeConfig(
      hidden=24,
      num_experts=4,
      # Room for all that comes, where there is a limit.
      router=routing.TokenChoice(capacity=4.0),
    ),
    'position': ROTARY,
  },
}
# Whole rows would drop half of the choices.
TIGHT = routing.TokenChoice(capacity=0.5)
T5 = {
  'position': position.RelativeBuckets(num_buckets=8, max_distance=20),
  'norm': norm.RMSNorm(),
  'tied_head': 'tied_scaled',
}


@functools.cache
def make(name='learned'):
  rngs = nnx.Rngs(0)
  if name == 't5':
    config = encoder_decoder.EncoderDecoderConfig(**(SHARED | T5))
    return encoder_decoder.EncoderDecoder(config, rngs=rngs)
  config = decoder.DecoderConfig(**(SHARED | DECODERS[name]))
  return decoder.Decoder(config, rngs=rngs)


run = functools.partial(generate.generate, sampling=GREEDY, chunk=16)


@jax.jit
def forward(model, tokens, extra):
  return model(tokens, **extra)


def recompute(model, prompt, num_tokens, extra=None, length=40):
  """Greedy tokens and their log-probs, the whole sequence at every step.

  `length` pads on the right, which a causal model does not see; None really
  computes each length, and compiles each.
  """
  tokens, log_probs = list(prompt), []
  for _ in range(num_tokens):
    row = np.zeros((1, length or len(tokens)), np.int32)
    row[0, : len(tokens)] = tokens
    logits = forward(model, row, extra or {})[0, len(tokens) - 1]
    tokens.append(int(logits.argmax()))
    log_probs.append(float(jax.nn.log_softmax(logits)[tokens[-1]]))
  return tokens[len(prompt) :], log_probs


@jax.jit
def step_by_step(model, tokens):
  """Logits (B, T, V), one token at a time through the cache."""
  num_rows, length = tokens.shape
  caches = model.empty_caches(num_rows, length)

  def step(caches, part):
    token, index = part
    x, caches = model.step(token[:, None], index[:, None], caches)
    return caches, model.head(x)[:, 0]

  index = jnp.broadcast_to(jnp.arange(length)[:, None], (length, num_rows))
  return jnp.swapaxes(jax.lax.scan(step, caches, (tokens.T, index))[1], 0, 1)


@pytest.mark.parametrize('name', DECODERS)
def test_cache_equals_recomputing(name):
  model = make(name)
  result = run(model, PROMPTS, num_tokens=8)
  for row, prompt in enumerate(PROMPTS):
    tokens, log_probs = recompute(model, prompt, 8)
    assert result.tokens[row] == tokens
    np.testing.assert_allclose(result.log_probs[row], log_probs, atol=1e-5)
  assert len({tuple(tokens) for tokens in result.tokens}) == len(PROMPTS)
  # All logits, not only those of the tokens taken.
  whole = np.array([PROMPTS[2] + result.tokens[2]], np.int32)
  whole = np.pad(whole, ((0, 0), (0, 40 - whole.shape[1])))
  expected = forward(model, whole, {})
  assert expected.shape[-1] == VOCAB
  np.testing.assert_allclose(step_by_step(model, whole), expected, atol=1e-5)


def test_cache_equals_recomputing_every_length():
  model = make()
  expected = recompute(model, PROMPTS[1], 3, length=None)
  result = run(model, PROMPTS, num_tokens=3)
  assert result.tokens[1] == expected[0]
  np.testing.assert_allclose(result.log_probs[1], expected[1], atol=1e-5)


def test_encoder_decoder_equals_recomputing():
  model = make('t5')
  result = run(model, PROMPTS, num_tokens=8)
  for row, prompt in enumerate(PROMPTS):
    # The source alone and unpadded; the target begins with the pad token.
    extra = {'encoder_inputs': np.array([prompt], np.int32)}
    tokens, log_probs = recompute(model, [0], 8, extra)
    assert result.tokens[row] == tokens
    np.testing.assert_allclose(result.log_probs[row], log_probs, atol=1e-5)
  assert len({tuple(tokens) for tokens in result.tokens}) == len(PROMPTS)


def test_encoder_decoder_start_id():
  model = make('t5')
  extra = {'encoder_inputs': np.array([PROMPTS[0]], np.int32)}
  result = run(model, PROMPTS[:1], num_tokens=6, start_id=11)
  assert result.tokens[0] == recompute(model, [11], 6, extra)[0]


@pytest.mark.parametrize('name', ['learned', 'dense_and_local', 't5'])
@pytest.mark.parametrize('temperature', [0.0, 0.8])
def test_batched_rows_equal_each_alone(name, temperature):
  model = make(name)
  config = sampling.SamplingConfig(temperature=temperature, top_p=0.95)
  keys = jax.random.split(jax.random.key(3), len(PROMPTS))
  settings = {'num_tokens': 8, 'sampling': config}
  together = run(model, PROMPTS, keys_B=keys, **settings)
  for row, prompt in enumerate(PROMPTS):
    own = keys[row : row + 1]
    alone = run(model, [prompt], keys_B=own, **settings)
    assert alone.tokens[0] == together.tokens[row]
    np.testing.assert_allclose(
      alone.log_probs[0], together.log_probs[row], atol=1e-5
    )


def test_generation_drops_no_token():
  """What an expert has room for would depend on what runs beside a row."""
  mlp = dataclasses.replace(DECODERS['experts']['mlp'], router=TIGHT)
  config = dataclasses.replace(make('experts').config, mlp=mlp)
  tight = decoder.Decoder(config, rngs=nnx.Rngs(0))
  result = run(tight, PROMPTS, num_tokens=6)
  assert result.tokens == run(make('experts'), PROMPTS, num_tokens=6).tokens
  logits = (
    tight(jnp.asarray([PROMPTS[1]])),
    make('experts')(jnp.asarray([PROMPTS[1]])),
  )
  assert np.abs(logits[0] - logits[1]).max() > 0.1


def test_seed():
  model = make()
  draw = functools.partial(
    run, model, num_tokens=8, sampling=sampling.SamplingConfig()
  )
  first = draw(PROMPTS, seed=1).tokens
  assert draw(PROMPTS, seed=1).tokens == first
  assert draw(PROMPTS, seed=2).tokens != first
  # Row 0 does not see who is beside it; equal prompts still draw differently.
  assert draw([PROMPTS[0], [4], [4]], seed=1).tokens[0] == first[0]
  same = draw([[4], [4], [4]], seed=1).tokens
  assert len({tuple(tokens) for tokens in same}) == 3
  # More tokens go on from the same text.
  longer = run(
    model, PROMPTS, num_tokens=12, seed=1, sampling=sampling.SamplingConfig()
  )
  assert [tokens[:8] for tokens in longer.tokens] == first


def test_two_compilations_whatever_the_lengths():
  config = decoder.DecoderConfig(**(SHARED | {'position': ROTARY}))
  model = decoder.Decoder(config, rngs=nnx.Rngs(1))
  programs = lambda: (
    decode_loop.prefill._cache_size(),
    decode_loop.decode._cache_size(),
  )
  before = programs()
  lengths = [[3, 17, 60], [5, 100], [1], [64, 65, 128, 2]]
  for number, row_lengths in enumerate(lengths):
    prompts = [[1] * length for length in row_lengths]
    settings = {'num_tokens': 5 + number, 'eos_id': [None, 3][number % 2]}
    own = sampling.SamplingConfig(
      temperature=0.5 + number, top_k=5 + number, top_p=0.9 - number / 10
    )
    generate.generate(model, prompts, seed=number, sampling=own, **settings)
  assert np.subtract(programs(), before).tolist() == [1, 1]


def test_end_token_cuts_a_row_and_stops_the_loop():
  model = make()
  whole = run(model, PROMPTS, num_tokens=12)
  eos = whole.tokens[0][3]
  result = run(model, PROMPTS, num_tokens=12, eos_id=eos)
  for row, tokens in enumerate(whole.tokens):
    cut = tokens.index(eos) if eos in tokens else len(tokens)
    assert result.tokens[row] == tokens[:cut]
    assert len(result.log_probs[row]) == cut
    assert result.ended[row] == (eos in tokens)
  assert whole.ended == [False] * 3


def test_loop_stops_when_every_row_has_ended():
  model = make()
  prompt = np.array([PROMPTS[0] + [0] * 61], np.int32)
  eos = run(model, PROMPTS[:1], num_tokens=4).tokens[0][3]
  settings = {
    'token_B': prompt[:, 2],
    'index_B': np.array([2], np.int32),
    'ended_B': np.zeros(1, bool),
    'keys_B': jax.random.split(jax.random.key(0), 1),
    'num_tokens': np.int32(60),
    'pad_id': np.int32(0),
    'capacity': 64,
    'settings': sampling.rows([GREEDY], 1, VOCAB),
    'history': sampling.History(),
  }
  caches = decode_loop.prefill(model, prompt, np.array([2]), chunk=16)
  ends_BE = np.array([[eos]], np.int32)
  state = decode_loop.decode(model, caches, ends_BE=ends_BE, **settings)
  assert int(state.number) <= 4
  assert int(state.count_B[0]) == int(state.number) - 1


def test_empty_prompt_takes_the_start_token():
  model = make()
  result = run(model, [[], [4, 5]], num_tokens=4, start_id=2)
  assert result.tokens[0] == run(model, [[2]], num_tokens=4).tokens[0]


def test_a_full_context_is_used_to_its_last_position():
  model = make()
  prompt = [1 + i % 40 for i in range(90)]
  result = run(model, [prompt], num_tokens=6)
  tokens, _ = recompute(model, prompt, 6, length=96)
  assert result.tokens[0] == tokens


exhaustive = functools.partial(pytest.param, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize(
  'name',
  ['grouped_query', 't5', 'experts', *map(exhaustive, ['learned', 'sandwich'])],
)
@pytest.mark.skipif(jax.device_count() < 8, reason='needs 8 devices')
def test_sharded_equals_one_device(name):
  model = make(name)
  rows = 'expert' if name == 'experts' else 'data'
  mesh = mesh_lib.make(
    mesh_lib.MeshConfig(**{'data': 1, rows: 2}, fsdp=2, tensor=2),
    jax.devices()[:8],
  )
  rules = sharding.Rules()
  config = sampling.SamplingConfig(temperature=0.9, top_k=30)
  settings = {'num_tokens': 8, 'sampling': config, 'eos_id': 13}
  # Five prompts: eight rows, two to each of the four parts.
  prompts = [*PROMPTS, [1], [2, 3]]
  expected = run(model, prompts, **settings)
  with sharding.use(mesh, rules):
    split = jax.device_put(model, sharding.shardings(model, mesh, rules))
    result = run(split, prompts, **settings)
  assert result.tokens == expected.tokens
  assert result.ended == expected.ended
  for a, b in zip(result.log_probs, expected.log_probs):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.skipif(jax.device_count() < 8, reason='needs 8 devices')
def test_rows_are_padded_to_what_the_rules_split():
  config = mesh_lib.MeshConfig(data=4, tensor=2)
  mesh = mesh_lib.make(config, jax.devices()[:8])
  assert prefill.row_parts() == 1
  with sharding.use(mesh, sharding.Rules()):
    assert prefill.row_parts() == 4
  with sharding.use(mesh, sharding.Rules(batch=('data', 'tensor'))):
    assert prefill.row_parts() == 8


@pytest.mark.parametrize(
  'prompts, settings, message',
  [
    ([], {}, r'prompts=\[\]; give a list with at least one prompt'),
    ('abc', {}, "prompts='abc'; give a list"),
    (['abc'], {}, "Prompt 0 is 'abc', not a sequence of token ids; encode"),
    ([[1], []], {}, 'Prompt 1 is empty.*give start_id'),
    ([[1], [3, 50]], {}, 'Prompt 1 has the token id 50.* 50 tokens, 0 to'),
    ([[-1]], {}, 'Prompt 0 has the token id -1'),
    ([[1]], {'num_tokens': 0}, 'num_tokens=0; it must be 1 or more'),
    ([[1]], {'chunk': 0}, 'chunk=0; it must be 1 or more'),
    ([[1]], {'eos_id': 50}, 'eos_id=50 is not in the vocabulary of 50'),
    ([[1]], {'capacity': 5}, 'capacity=5, and the longest prompt.* 9'),
    ([[1], [2]], {'num_rows': 1}, 'num_rows=1, and there are 2 prompts'),
    (
      [[1], [1] * 90],
      {},
      'Prompt 1 has 90 tokens; with num_tokens=8 new ones that makes 98, '
      'and a sequence may hold 96. Either lower num_tokens to at most 6, '
      'or cut the prompt to at most 88 tokens, or use',
    ),
    ([[1] * 97], {}, 'Prompt 0 has 97 tokens.*Either cut the prompt to'),
    ([[1] * 20], {'max_length': 24}, 'makes 28, and a sequence may hold 24'),
    (
      [[1], [2]],
      {'keys_B': jax.random.split(jax.random.key(0), 3)},
      r'keys_B has the shape \(3,\) and there are 2 prompts',
    ),
  ],
)
def test_messages_before_compiling(prompts, settings, message):
  before = decode_loop.prefill._cache_size(), decode_loop.decode._cache_size()
  with pytest.raises(ValueError, match=message):
    run(make(), prompts, **({'num_tokens': 8} | settings))
  after = decode_loop.prefill._cache_size(), decode_loop.decode._cache_size()
  assert before == after


def test_encoder_decoder_messages():
  with pytest.raises(ValueError, match='Prompt 0 has 20 tokens, and a source'):
    run(make('t5'), [[1] * 20], num_tokens=8, max_length=16)
  with pytest.raises(ValueError, match='num_tokens=20, and an answer may hold'):
    run(make('t5'), [[1] * 9], num_tokens=20, max_length=16)


def test_an_encoder_cannot_generate():
  config = encoder.EncoderConfig(**SHARED)
  model = encoder.Encoder(config, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='Encoder cannot generate: only a Dec'):
    run(model, PROMPTS, num_tokens=8)


def test_a_kind_that_cannot_go_on():
  kind = regional.Regional(num_heads=4, head_dim=8, region=8)
  config = decoder.DecoderConfig(**(SHARED | {'attention': kind}))
  model = decoder.Decoder(config, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='regional has no incremental decoding'):
    run(model, PROMPTS, num_tokens=2)


@pytest.mark.parametrize('name', ['learned', 'sandwich', 't5'])
def test_a_prepared_model_writes_the_same(name):
  model = make(name)
  apart = decoding_weights.prepare(model)
  stacks = [getattr(apart, tower).layers for tower in apart.towers]
  assert all(
    len(stack.remainder) == stack.num_layers and not stack.group
    for stack in stacks
  )
  assert getattr(model, model.towers[0]).layers.group, 'It is left as it was.'
  ours = run(model, PROMPTS, num_tokens=6)
  again = run(apart, PROMPTS, num_tokens=6)
  assert ours.tokens == again.tokens
  for one, other in zip(ours.log_probs, again.log_probs):
    np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize('name', ['grouped_query', 'dense_and_local', 't5'])
def test_int8_caches_are_small_and_close(name):
  model = make(name)
  whole = run(model, PROMPTS, num_tokens=4)
  small = run(model, PROMPTS, num_tokens=4, cache_dtype='int8')
  first = lambda result: [row[0] for row in result.log_probs]
  np.testing.assert_allclose(first(small), first(whole), atol=0.05)
  assert small.log_probs != whole.log_probs
  encoded = (jnp.ones((2, 8, 32)),) if name == 't5' else ()
  sizes = [
    sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
    for dtype in ('int8', 'float32')
    for caches in [model.empty_caches(2, 64, *encoded, dtype=dtype)]
  ]
  # One byte instead of four, and four more for each vector of eight.
  assert sizes[0] < 0.45 * sizes[1]


@pytest.mark.parametrize('rows', [1, 4])
@pytest.mark.usefixtures('compiled_as_by_users')
def test_no_step_copies_a_cache(rows):
  """A step writes one position; a copy would cost as much as reading all."""
  model = decoding_weights.prepare(make())
  lowered = decode_loop.decode.lower(
    model,
    model.empty_caches(rows, 64),
    token_B=jnp.zeros(rows, jnp.int32),
    index_B=jnp.zeros(rows, jnp.int32),
    ended_B=jnp.zeros(rows, bool),
    keys_B=jax.random.split(jax.random.key(0), rows),
    num_tokens=jnp.int32(8),
    ends_BE=jnp.zeros((rows, 0), jnp.int32),
    pad_id=jnp.int32(0),
    capacity=64,
    settings=sampling.rows([GREEDY], rows, VOCAB),
    history=sampling.History(),
  )
  text = lowered.compile().as_text()
  assert f'f32[{rows},4,64,8]' in text
  copies = re.findall(rf'= f32\[(?:{rows},)?4,64,8\]\S* copy\(', text)
  assert not copies

"""The models compute what `transformers` computes, from the same weights."""

import dataclasses

import extras
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2x.interop import configs
from t2x.interop import names

pytestmark = pytest.mark.reference

torch = extras.need('torch', extra='reference')
transformers = extras.need('transformers', extra='reference')

# Odd sizes: nothing fits by accident, and the table gets padding rows.
VOCAB = 101
LENGTHS = (9, 6)
ENCODER = dict(
  vocab_size=VOCAB,
  hidden_size=24,
  num_hidden_layers=3,
  num_attention_heads=3,
  intermediate_size=40,
  max_position_embeddings=16,
  hidden_dropout_prob=0.0,
  attention_probs_dropout_prob=0.0,
)
T5 = dict(
  vocab_size=VOCAB,
  d_model=24,
  d_kv=5,
  d_ff=40,
  num_layers=3,
  num_decoder_layers=2,
  num_heads=3,
  relative_attention_num_buckets=8,
  relative_attention_max_distance=12,
  dropout_rate=0.0,
)
LLAMA = dict(
  vocab_size=VOCAB,
  hidden_size=24,
  intermediate_size=40,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=64,
  rms_norm_eps=1e-5,
  tie_word_embeddings=False,
)


def bert():
  return transformers.BertForPreTraining(transformers.BertConfig(**ENCODER))


def roberta():
  config = transformers.RobertaConfig(
    type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1, **ENCODER
  )
  return transformers.RobertaForMaskedLM(config)


def gpt2():
  config = transformers.GPT2Config(
    vocab_size=VOCAB,
    n_embd=24,
    n_layer=3,
    n_head=3,
    n_positions=16,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
  )
  return transformers.GPT2LMHeadModel(config)


def t5():
  return transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))


def t5_v1_1():
  config = transformers.T5Config(
    feed_forward_proj='gated-gelu', tie_word_embeddings=False, **T5
  )
  model = transformers.T5ForConditionalGeneration(config)
  # transformers 5 ties a new model's head; released 1.1 weights are not tied.
  model.lm_head.weight = torch.nn.Parameter(torch.zeros(VOCAB, 24))
  return model


def llama():
  return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


def llama3():
  rope = dict(
    rope_type='llama3',
    rope_theta=1000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
  )
  config = transformers.LlamaConfig(
    **{**LLAMA, 'tie_word_embeddings': True, 'num_attention_heads': 2},
    rope_parameters=rope,
  )
  return transformers.LlamaForCausalLM(config)


def mixtral():
  config = transformers.MixtralConfig(
    num_local_experts=5, num_experts_per_tok=2, **LLAMA
  )
  return transformers.MixtralForCausalLM(config)


MAKERS = {
  fn.__name__: fn
  for fn in (bert, roberta, gpt2, t5, t5_v1_1, llama, llama3, mixtral)
}


@pytest.fixture(scope='module')
def pairs():
  """Name -> (transformers' model, family, t2x's config and model)."""
  return {name: make_pair(maker) for name, maker in MAKERS.items()}


def make_pair(maker):
  torch.manual_seed(0)
  theirs = maker().eval()
  with torch.no_grad():
    for parameter in theirs.parameters():
      # No bias stays 0, no norm 1, and attention is far from uniform.
      parameter.add_(0.3 * torch.randn_like(parameter))
  family, config = configs.to_t2x(theirs.config.to_dict())
  # Which heads there are is told by the weights, as in files.
  config = configs.with_parts(config, state(theirs))
  return theirs, family, config, names.to_t2x(family, config, state(theirs))


def state(model):
  return {k: v.detach().numpy() for k, v in model.state_dict().items()}


@pytest.fixture(scope='module')
def batch():
  """Token ids and lengths of two rows, the second one padded."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(2, VOCAB, (2, max(LENGTHS)))
  real = np.arange(max(LENGTHS))[None] < np.array(LENGTHS)[:, None]
  return tokens, real


def close(ours, theirs, where=None):
  ours, theirs = np.asarray(ours), theirs.detach().numpy()
  assert ours.shape == theirs.shape
  assert np.abs(theirs).max() > 0.1, 'The comparison would see nothing.'
  if where is not None:
    ours, theirs = ours[where], theirs[where]
  np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize('padded', [False, True])
def test_bert_states_logits_pooler_and_next_sentence(pairs, batch, padded):
  theirs, _, _, model = pairs['bert']
  tokens, real = batch
  types = np.random.default_rng(1).integers(0, 2, tokens.shape)
  inputs = dict(
    input_ids=torch.tensor(tokens), token_type_ids=torch.tensor(types)
  )
  if padded:
    inputs['attention_mask'] = torch.tensor(real, dtype=torch.long)
  expected = theirs(**inputs, output_hidden_states=True)
  segments = jnp.asarray(real, jnp.int32) if padded else None

  @jax.jit
  def run(model, tokens):
    kwargs = dict(segments=segments, token_types=jnp.asarray(types))
    encoded = model.encode(tokens, **kwargs)
    pooled = model.pool(encoded)
    logits = model(tokens, **kwargs)
    return encoded, logits, model.next_sentence(pooled[:, None])[:, 0]

  encoded, logits, pair = run(model, tokens)
  where = real if padded else None
  close(encoded, expected.hidden_states[-1], where)
  close(logits, expected.prediction_logits, where)
  close(pair, expected.seq_relationship_logits)


@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize(
  'name', ['roberta', 'gpt2', 'llama', 'llama3', 'mixtral']
)
def test_logits(pairs, batch, name, padded):
  theirs, _, _, model = pairs[name]
  tokens, real = batch
  # Longer than the scaling's first context, so that every regime matters.
  if name == 'llama3':
    tokens, real = np.tile(tokens, 5), np.repeat(real, 5, axis=1)
  if padded and name == 'roberta':
    tokens = np.where(real, tokens, 1)  # It reads positions off the padding.
  mask = torch.tensor(real, dtype=torch.long) if padded else None
  expected = theirs(input_ids=torch.tensor(tokens), attention_mask=mask).logits
  segments = jnp.asarray(real, jnp.int32) if padded else None
  logits = jax.jit(lambda m, x: m(x, segments=segments))(model, tokens)
  close(logits, expected, real if padded else None)


@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('name', ['t5', 't5_v1_1'])
def test_t5_logits(pairs, batch, name, padded):
  theirs, _, config, model = pairs[name]
  assert config.tied_head == ('tied_scaled' if name == 't5' else 'untied')
  tokens, real = batch
  sources = np.tile(tokens[:, ::-1], 2)
  source_real = np.repeat(real, 2, axis=1)
  inputs = dict(
    input_ids=torch.tensor(sources), decoder_input_ids=torch.tensor(tokens)
  )
  kwargs = {}
  if padded:
    as_mask = lambda x: torch.tensor(x, dtype=torch.long)
    inputs['attention_mask'] = as_mask(source_real)
    inputs['decoder_attention_mask'] = as_mask(real)
    kwargs['encoder_segments'] = jnp.asarray(source_real, jnp.int32)
    kwargs['segments'] = jnp.asarray(real, jnp.int32)
  expected = theirs(**inputs).logits
  run = jax.jit(lambda m, x, y: m(x, encoder_inputs=y, **kwargs))
  close(run(model, tokens, sources), expected, real if padded else None)


def test_packed_rows_equal_rows_of_their_own(pairs, batch):
  """Segments and positions keep two documents in a row apart."""
  theirs, _, _, model = pairs['llama']
  tokens, _ = batch
  packed = tokens.reshape(1, -1)
  num, length = tokens.shape
  logits = model(
    packed,
    segments=jnp.repeat(jnp.arange(1, num + 1), length)[None],
    positions=jnp.tile(jnp.arange(length), num)[None],
  )
  expected = theirs(input_ids=torch.tensor(tokens)).logits
  close(logits.reshape(num, length, -1), expected)


@pytest.mark.parametrize('name', list(MAKERS))
def test_export_of_import_is_exact(pairs, name):
  theirs, family, config, model = pairs[name]
  assert config.vocab_multiple > 1
  exported = names.from_t2x(family, config, model)
  original = state(theirs)
  assert set(exported) == set(original)
  for key, value in original.items():
    np.testing.assert_array_equal(exported[key], value, err_msg=key)
  theirs.load_state_dict({k: torch.tensor(v) for k, v in exported.items()})


@pytest.mark.parametrize('name', list(MAKERS))
def test_import_without_prefix_and_without_copies(pairs, name):
  theirs, family, config, model = pairs[name]
  prefix = theirs.base_model_prefix + '.'
  tied = set(names.tables.FAMILIES[family].copies)
  if config.tied_head == 'untied':
    tied.discard('lm_head.weight')
  bare = {
    key.removeprefix(prefix): value
    for key, value in state(theirs).items()
    if key not in tied
  }
  again = names.to_t2x(family, config, bare)
  jax.tree.map(np.testing.assert_array_equal, again, model)


@pytest.mark.parametrize('name', ['bert', 'gpt2', 'llama', 'mixtral'])
def test_bare_export_loads_into_the_body(pairs, name):
  theirs, family, config, model = pairs[name]
  bare = names.from_t2x(family, config, model, bare=True)
  body = theirs.base_model
  body.load_state_dict({k: torch.tensor(v) for k, v in bare.items()})
  assert set(bare) == set(body.state_dict())


def test_body_only_checkpoint_of_bert(batch):
  torch.manual_seed(0)
  theirs = transformers.BertModel(transformers.BertConfig(**ENCODER)).eval()
  hf = {**theirs.config.to_dict(), 'architectures': ['BertModel']}
  family, config = configs.to_t2x(hf)
  model = names.to_t2x(family, config, state(theirs))
  tokens, _ = batch
  expected = theirs(input_ids=torch.tensor(tokens)).pooler_output
  close(model.pool(model.encode(tokens)), expected)
  exported = names.from_t2x(family, config, model)
  assert set(exported) == {f'bert.{key}' for key in theirs.state_dict()}


def test_repeating_groups_and_a_remainder_keep_the_order(pairs):
  """Layer i stands elsewhere in a stack of pairs; its name is the same."""
  theirs, family, config, model = pairs['gpt2']
  grouped = dataclasses.replace(
    config, attention_pattern=(config.attention,) * 2
  )
  regrouped = names.to_t2x(family, grouped, state(theirs))
  assert len(regrouped.tower.layers.remainder) == 1
  tokens = np.arange(8)[None]
  np.testing.assert_allclose(
    regrouped(tokens), model(tokens), atol=1e-5, rtol=0
  )
  exported = names.from_t2x(family, grouped, regrouped)
  for key, value in state(theirs).items():
    np.testing.assert_array_equal(exported[key], value, err_msg=key)


def test_experts_that_released_files_keep_apart(pairs):
  """Mixtral's files: w1 gates, w3 goes up, w2 down, each expert by itself."""
  theirs, family, config, model = pairs['mixtral']
  apart = {}
  for name, array in state(theirs).items():
    before, _, part = name.partition('mlp.')
    moe = f'{before}block_sparse_moe.'
    if part == 'gate.weight':
      apart[moe + part] = array
    elif part == 'experts.gate_up_proj':
      for i, both in enumerate(array):
        gate, up = np.split(both, 2)
        apart |= {f'{moe}experts.{i}.w1.weight': gate}
        apart |= {f'{moe}experts.{i}.w3.weight': up}
    elif part == 'experts.down_proj':
      apart |= {
        f'{moe}experts.{i}.w2.weight': down for i, down in enumerate(array)
      }
    else:
      apart[name] = array
  assert sum('.w2.' in name for name in apart) == 3 * 5
  got = names.to_t2x(family, config, apart)
  jax.tree.map(np.testing.assert_array_equal, got, model)
  del apart['model.layers.1.block_sparse_moe.experts.2.w3.weight']
  with pytest.raises(ValueError, match=r'layers\.1\.block.*not every expert'):
    names.to_t2x(family, config, apart)

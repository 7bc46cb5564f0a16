"""Decoders that differ from Llama in a few settings, against `transformers`."""

import dataclasses
import json

import extras
from flax import nnx
import hf_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from t2x.decode import beams
from t2x.decode import generate
from t2x.decode import sampling
from t2x.inference import generation
from t2x.inference import hf_conversion
from t2x.inference import loading
from t2x.interop import configs
from t2x.interop import exported
from t2x.interop import huggingface
from t2x.interop import llama_like
from t2x.interop import names
from t2x.layers import norm
from t2x.models import model as model_lib

torch = extras.need('torch', extra='reference')
transformers = extras.need('transformers', extra='reference')

pytestmark = pytest.mark.reference

VOCAB, LENGTH = 101, 13
# Odd sizes, and rows longer than the windows.
SIZES = dict(
  vocab_size=VOCAB,
  hidden_size=24,
  intermediate_size=40,
  num_hidden_layers=5,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=64,
  rms_norm_eps=1e-3,
  bos_token_id=None,
  eos_token_id=None,
  pad_token_id=None,
)
SLIDES = ['sliding_attention', 'full_attention', 'full_attention'] * 2
HALF = dict(rope_type='default', rope_theta=1000.0, partial_rotary_factor=0.5)
FAMILIES = {
  'mistral': ('Mistral', dict(sliding_window=4, head_dim=8)),
  'mistral without a window': ('Mistral', dict(sliding_window=None)),
  'mistral of short rows': ('Mistral', dict(sliding_window=40)),
  'qwen2': ('Qwen2', {}),
  'qwen2 that slides from a layer on': (
    'Qwen2',
    dict(use_sliding_window=True, sliding_window=4, max_window_layers=3),
  ),
  'qwen3': ('Qwen3', dict(head_dim=8)),
  'qwen3 with biases and windows': (
    'Qwen3',
    dict(
      head_dim=8,
      attention_bias=True,
      tie_word_embeddings=True,
      use_sliding_window=True,
      sliding_window=3,
      layer_types=SLIDES[:5],
    ),
  ),
  'gemma': ('Gemma', dict(head_dim=8, attention_bias=True)),
  'gemma2': (
    'Gemma2',
    dict(
      head_dim=8,
      sliding_window=4,
      query_pre_attn_scalar=17,
      attn_logit_softcapping=2.0,
      final_logit_softcapping=1.5,
    ),
  ),
  'gemma2 without caps': (
    'Gemma2',
    dict(
      head_dim=6,
      num_hidden_layers=4,
      query_pre_attn_scalar=6,
      attn_logit_softcapping=None,
      final_logit_softcapping=None,
      layer_types=['full_attention'] * 4,
    ),
  ),
  'phi3': ('Phi3', {}),
  'phi3 that turns a part': (
    'Phi3',
    dict(
      num_attention_heads=3,
      num_key_value_heads=1,
      sliding_window=4,
      rope_parameters=HALF,
    ),
  ),
  'smollm2': ('Llama', dict(tie_word_embeddings=True, rope_theta=1e5)),
  'smollm3': (
    'SmolLM3',
    dict(no_rope_layer_interval=3, use_sliding_window=True, sliding_window=4),
  ),
}
NAMES = list(FAMILIES)


def make_theirs(name):
  kind, own = FAMILIES[name]
  config = getattr(transformers, f'{kind}Config')(**{**SIZES, **own})
  torch.manual_seed(0)
  model = getattr(transformers, f'{kind}ForCausalLM')(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      # No bias stays 0, no norm 1, and attention is far from uniform.
      parameter.add_(0.3 * torch.randn_like(parameter))
  return model


def state(model):
  return {k: v.detach().numpy() for k, v in model.state_dict().items()}


@pytest.fixture(scope='module')
def pairs():
  """Name -> (transformers' model, family, t2x's config and model)."""
  found = {}
  for name in NAMES:
    theirs = make_theirs(name)
    family, config = configs.to_t2x(theirs.config.to_dict())
    model = names.to_t2x(family, config, state(theirs))
    found[name] = theirs, family, config, model
  return found


def ids():
  return np.random.default_rng(0).integers(5, VOCAB, (2, LENGTH))


def their_logits(model, tokens, **kwargs):
  kwargs = {k: torch.tensor(v) for k, v in kwargs.items()}
  with torch.no_grad():
    return model(input_ids=torch.tensor(tokens), **kwargs).logits.numpy()


@jax.jit
def our_logits(model, tokens, **kwargs):
  return model(tokens, **kwargs)


@pytest.mark.parametrize('name', NAMES)
def test_logits_with_padding_on_either_side(pairs, name):
  theirs, _, _, model = pairs[name]
  real = np.ones((2, LENGTH), np.int64)
  real[0, 9:] = 0  # The end of the first row, the beginning of the second.
  real[1, :3] = 0
  positions = np.maximum(real.cumsum(1) - 1, 0)
  want = their_logits(
    theirs, ids(), attention_mask=real, position_ids=positions
  )
  got = our_logits(
    model, ids(), segments=jnp.asarray(real), positions=jnp.asarray(positions)
  )
  assert np.abs(want).max() > 1.0
  seen = real == 1
  np.testing.assert_allclose(
    np.asarray(got)[seen], want[seen], atol=1e-4, rtol=0
  )


@pytest.mark.parametrize('name', NAMES)
def test_an_export_is_what_came_in(pairs, name, tmp_path):
  theirs, family, config, model = pairs[name]
  arrays = names.from_t2x(family, config, model)
  original = state(theirs)
  assert set(arrays) == set(original)
  for key, value in original.items():
    np.testing.assert_array_equal(arrays[key], value, err_msg=key)
  # Once as the nearest class, once as the class that it was.
  for hf in (None, theirs.config.to_dict()):
    directory = tmp_path / ('kept' if hf else 'made')
    wrote = huggingface.write(str(directory), model, hf=hf)
    assert not hf or wrote == family
    again = transformers.AutoModelForCausalLM.from_pretrained(directory)
    want = their_logits(theirs, ids())
    # Another class may multiply in another order.
    same = type(again) is type(theirs)
    np.testing.assert_allclose(
      their_logits(again.eval(), ids()), want, atol=0 if same else 1e-4, rtol=0
    )
    assert configs.to_t2x(again.config.to_dict()) == (wrote, config)


OFTEN = ('mistral', 'qwen3', 'gemma2', 'phi3 that turns a part')


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=() if name in OFTEN else pytest.mark.exhaustive)
    for name in NAMES
  ],
)
def test_greedy_texts_are_those_of_transformers(pairs, name):
  """Prefill and steps from a cache, past the windows."""
  theirs, _, _, model = pairs[name]
  prompts = [ids()[0].tolist(), ids()[1, :3].tolist()]
  found = generate.generate(
    model,
    prompts,
    num_tokens=9,
    sampling=sampling.SamplingConfig(temperature=0),
    eos_id=None,
  )
  for prompt, tokens, log_probs in zip(prompts, found.tokens, found.log_probs):
    with torch.no_grad():
      want = theirs.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=9
      )
    assert prompt + tokens == want[0].tolist()
    whole = np.array([prompt + tokens])
    logits = torch.tensor(their_logits(theirs, whole)[0, len(prompt) - 1 : -1])
    want = torch.log_softmax(logits, -1).numpy()
    np.testing.assert_allclose(log_probs, want[np.arange(9), tokens], atol=1e-4)


def test_beams_are_those_of_transformers(pairs):
  """Of capped logits: their scores are log-probabilities."""
  theirs, _, _, model = pairs['gemma2']
  prompt = ids()[0, :5].tolist()
  with torch.no_grad():
    want = theirs.generate(
      torch.tensor([prompt]), num_beams=3, max_new_tokens=6, do_sample=False,
      return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
  found = generate.beam_search(
    model,
    [prompt],
    num_tokens=6,
    beams=beams.BeamConfig(num_beams=3),
    eos_id=None,
  )
  assert prompt + found.tokens[0][0] == want.sequences[0].tolist()
  np.testing.assert_allclose(
    found.scores[0][0], want.sequences_scores[0], atol=1e-4
  )


def test_a_run_of_a_fused_family_goes_back_to_it(pairs, tmp_path):
  """Its config and its class stay, though a Llama computes the same."""
  theirs = make_theirs('phi3')
  hf_files.MAKERS['llama'](tmp_path / 'source')
  theirs.resize_token_embeddings(600)
  theirs.save_pretrained(tmp_path / 'source')
  hf_conversion.to_run(str(tmp_path / 'source'), str(tmp_path / 'run'))
  assert hf_conversion.from_run(
    str(tmp_path / 'run'), str(tmp_path / 'back')
  ) == ('phi3')
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'back')
  assert type(again) is type(theirs)
  np.testing.assert_array_equal(
    their_logits(again.eval(), ids()), their_logits(theirs, ids())
  )
  text = generation.generate_text(
    loading.load(str(tmp_path / 'run')), ['A text'], num_tokens=3
  )
  assert len(text) == 1


def write_smollm(directory):
  """Writes a checkpoint with SmolLM's kind of tokenizer."""
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  pieces = tokenizers.pre_tokenizers
  made.pre_tokenizer = pieces.Sequence(
    [
      pieces.Digits(individual_digits=True),
      pieces.ByteLevel(add_prefix_space=False),
    ]
  )
  made.decoder = tokenizers.decoders.ByteLevel()
  end = '<|endoftext|>'
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=400,
    special_tokens=[end, '<|im_start|>', '<|im_end|>'],
    initial_alphabet=pieces.ByteLevel.alphabet(),
    show_progress=False,
  )
  made.train_from_iterator(hf_files.TEXTS, trainer)
  directory.mkdir()
  made.save(str(directory / 'tokenizer.json'))
  settings = {
    'tokenizer_class': 'GPT2Tokenizer',
    'bos_token': end,
    'eos_token': end,
    'unk_token': end,
  }
  text = json.dumps(settings)
  (directory / 'tokenizer_config.json').write_text(text)
  config = transformers.LlamaConfig(
    **SIZES
    | {'vocab_size': 400, 'tie_word_embeddings': True, 'rope_theta': 1e5}
    | {'bos_token_id': 0, 'eos_token_id': 0}
  )
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.3 * torch.randn_like(parameter))
  model.save_pretrained(directory)
  return model


def test_a_smollm_and_its_tokenizer_write_what_transformers_writes(tmp_path):
  model = write_smollm(tmp_path / 'smollm')
  trained = loading.load(str(tmp_path / 'smollm'))
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'smollm')
  texts = [*hf_files.TEXTS[:50], *hf_files.PROBES, 'In 1,024 days <|im_end|>']
  want = [tokenizer(t, add_special_tokens=False)['input_ids'] for t in texts]
  assert trained.tokenizer.encode_batch(texts) == want
  prompt = 'In 1,024 days the'
  got = generation.generate_text(
    trained,
    [prompt],
    num_tokens=8,
    sampling=sampling.SamplingConfig(temperature=0),
  )
  inputs = tokenizer(prompt, return_tensors='pt')
  with torch.no_grad():
    out = model.generate(**inputs, do_sample=False, max_new_tokens=8)
  new = out[0, inputs['input_ids'].shape[1] :]
  assert got == [tokenizer.decode(new, skip_special_tokens=True)]
  assert got[0].strip()


# Of the released config.json files, and their parameters as published.
RELEASED = {
  'mistral-7b': (
    7_241_732_096,
    dict(
      model_type='mistral', vocab_size=32000, hidden_size=4096,
      intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
      num_key_value_heads=8, sliding_window=4096, tie_word_embeddings=False,
    ),
  ),
  'qwen2-0.5b': (
    494_032_768,
    dict(
      model_type='qwen2', vocab_size=151936, hidden_size=896,
      intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
      num_key_value_heads=2, use_sliding_window=False, sliding_window=32768,
      max_window_layers=24, tie_word_embeddings=True, rope_theta=1e6,
    ),
  ),
  'qwen3-0.6b': (
    596_049_920,
    dict(
      model_type='qwen3', vocab_size=151936, hidden_size=1024,
      intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
      num_key_value_heads=8, head_dim=128, attention_bias=False,
      tie_word_embeddings=True, rope_theta=1e6, sliding_window=None,
    ),
  ),
  'gemma-2b': (
    2_506_172_416,
    dict(
      model_type='gemma', vocab_size=256000, hidden_size=2048,
      intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8,
      num_key_value_heads=1, head_dim=256, hidden_act='gelu',
    ),
  ),
  'gemma-2-2b': (
    2_614_341_888,
    dict(
      model_type='gemma2', vocab_size=256000, hidden_size=2304,
      intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
      num_key_value_heads=4, head_dim=256, sliding_window=4096,
    ),
  ),
  'phi-3-mini': (
    3_821_079_552,
    dict(
      model_type='phi3', vocab_size=32064, hidden_size=3072,
      intermediate_size=8192, num_hidden_layers=32, num_attention_heads=32,
      num_key_value_heads=32, sliding_window=2047, rope_scaling=None,
    ),
  ),
  'smollm2-135m': (
    134_515_008,
    dict(
      model_type='llama', vocab_size=49152, hidden_size=576,
      intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
      num_key_value_heads=3, tie_word_embeddings=True, rope_theta=1e5,
    ),
  ),
  'smollm3-3b': (
    3_075_098_624,
    dict(
      model_type='smollm3', vocab_size=128256, hidden_size=2048,
      intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
      num_key_value_heads=4, no_rope_layer_interval=4,
    ),
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', RELEASED)
def test_released_configs_have_as_many_parameters(name):
  count, hf = RELEASED[name]
  _, config = configs.to_t2x(hf)
  config = dataclasses.replace(config, vocab_multiple=1)
  shapes = jax.eval_shape(lambda: model_lib.make(config, rngs=nnx.Rngs(0)))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def drawn_settings(rng):
  """One of the families, with settings of its class at random."""
  name = NAMES[rng.integers(len(NAMES))]
  kind, own = FAMILIES[name]
  num = int(rng.integers(1, 9)) if rng.integers(4) else 30
  # Lists of layers are of their own length.
  own = {k: v for k, v in own.items() if k != 'layer_types'}
  own |= {
    'num_hidden_layers': num,
    'sliding_window': int(rng.integers(1, 9)),
    'rms_norm_eps': float(rng.choice([1e-6, 1e-5, 0.3])),
    'tie_word_embeddings': bool(rng.integers(2)),
  }
  if kind in ('Qwen2', 'Qwen3'):
    own['use_sliding_window'] = bool(rng.integers(2))
    own['max_window_layers'] = int(rng.integers(num + 2))
  if kind in ('Qwen2', 'Qwen3', 'Gemma2') and rng.integers(2):
    types = [SLIDES[rng.integers(2)] for _ in range(num)]
    own['layer_types'] = types
  if kind == 'Gemma2':
    own['query_pre_attn_scalar'] = int(rng.integers(1, 300))
  if kind == 'SmolLM3':
    own['no_rope_layers'] = rng.integers(0, 2, num).tolist()
  return getattr(transformers, f'{kind}Config')(**{**SIZES, **own})


def test_any_settings_come_back_from_what_is_written():
  """300 draws: read, written, read by the other library, read again."""
  rng = np.random.default_rng(0)
  for _ in range(300):
    theirs = drawn_settings(rng)
    _, config = configs.to_t2x(theirs.to_dict())
    assert config.num_layers == theirs.num_hidden_layers
    family, hf = exported.from_t2x(config)
    loaded = transformers.AutoConfig.for_model(**json.loads(json.dumps(hf)))
    assert loaded.model_type == family
    assert configs.to_t2x(loaded.to_dict())[1] == config, theirs


NEEDED = (
  'model_type', 'vocab_size', 'hidden_size', 'intermediate_size',
  'num_hidden_layers', 'num_attention_heads',
)  # fmt: skip


def test_what_a_file_leaves_out_is_what_transformers_takes():
  """300 draws of settings, of which each is there or not.

  Older files name no `layer_types`, and each class has values of its own.
  """
  rng = np.random.default_rng(1)
  seen = set()
  for _ in range(300):
    whole = drawn_settings(rng).to_dict()
    whole['num_attention_heads'], whole['hidden_size'] = 32, 32 * 4
    file = {
      key: value
      for key, value in whole.items()
      if key in NEEDED or rng.integers(3) == 0
    }
    filled = transformers.AutoConfig.for_model(**file).to_dict()
    family, config = configs.to_t2x(file)
    assert config == configs.to_t2x(filled)[1], file
    seen.add((family, 'layer_types' in file))
  both = [(family, True) for family in llama_like.BY_LAYER]
  assert seen >= {*both, *((family, False) for family, _ in both)}


MISTRAL = {'model_type': 'mistral', **SIZES}
GEMMA2 = {'model_type': 'gemma2', **SIZES}
QWEN3 = {'model_type': 'qwen3', **SIZES}
SMOLLM3 = {'model_type': 'smollm3', **SIZES}
PHI3 = {'model_type': 'phi3', **SIZES}
LONG = {'type': 'longrope', 'short_factor': [1.0], 'long_factor': [2.0]}


@pytest.mark.parametrize(
  'hf, message',
  [
    (MISTRAL | {'sliding_window': 0}, 'sliding_window=0; it must be'),
    (MISTRAL | {'sliding_window': '4'}, "sliding_window='4'; it must be"),
    (GEMMA2 | {'sliding_window': None}, 'sliding_window=None in the config'),
    (
      GEMMA2 | {'layer_types': ['full_attention']},
      'for each of num_hidden_layers=5',
    ),
    (
      GEMMA2 | {'layer_types': 'full_attention'},
      'for each of num_hidden_layers=5',
    ),
    (
      GEMMA2 | {'layer_types': ['chunked_attention'] * 5},
      "layer_types=.'chunked_attention'",
    ),
    (GEMMA2 | {'final_logit_softcapping': -1}, 'softcapping=-1; it must be'),
    (GEMMA2 | {'query_pre_attn_scalar': None}, 'attn_scalar=None; it must be'),
    (GEMMA2 | {'use_bidirectional_attention': True}, 'bidirectional_attention'),
    (
      QWEN3 | {'use_sliding_window': True, 'max_window_layers': None},
      'max_window_layers=None; it must be a whole number, 0 or more',
    ),
    (QWEN3 | {'use_sliding_window': 'no'}, "use_sliding_window='no'; it must"),
    (SMOLLM3 | {'no_rope_layers': [1, 0]}, 'no_rope_layers=.1, 0.; it must be'),
    (SMOLLM3 | {'no_rope_layer_interval': 0}, 'interval=0; it must be'),
    (PHI3 | {'rope_scaling': LONG}, "rope_type='longrope'"),
    (PHI3 | {'partial_rotary_factor': 0}, 'partial_rotary_factor=0; it must'),
  ],
)
def test_what_a_family_cannot_have(hf, message):
  with pytest.raises(ValueError, match=message) as error:
    configs.to_t2x(hf)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'kind',
  ['gemma3_text', 'gemma3', 'phi', 'qwen2_moe', 'qwen3_moe', 'deepseek_v3',
   'falcon', 'opt', 'ministral', 'olmo2', 'gpt_neox', 'cohere2'],
)  # fmt: skip
def test_other_families_are_refused_by_name(kind):
  with pytest.raises(ValueError, match=f"model_type='{kind}'; t2x reads") as e:
    configs.to_t2x({'model_type': kind, **SIZES})
  message = str(e.value)
  assert '\n' not in message and 'qwen3, gemma, gemma2' in message


def test_what_the_nearest_family_lacks_is_named(pairs):
  _, _, config, _ = pairs['gemma2']
  own = norm.RMSNorm(eps=config.norm.eps)
  with pytest.raises(ValueError, match='is gemma2, .*unit_offset=False'):
    exported.from_t2x(dataclasses.replace(config, norm=own))
  _, _, config, _ = pairs['mistral']
  with pytest.raises(ValueError, match='is mistral, .*logit_soft_cap=3'):
    exported.from_t2x(dataclasses.replace(config, logit_soft_cap=3.0))
  heads = dataclasses.replace(config.attention, bias=True, qk_norm=True)
  with pytest.raises(ValueError, match='is qwen3, .*scale=0.5'):
    exported.from_t2x(
      dataclasses.replace(
        config, attention=dataclasses.replace(heads, scale=0.5)
      )
    )

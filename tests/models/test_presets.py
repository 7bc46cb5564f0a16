"""Presets have the published sizes and draw weights as their papers say."""

import dataclasses
import math
import re

import extras
from flax import nnx
import jax
import numpy as np
import pytest

from t2x.layers import attention_config
from t2x.layers import mlp
from t2x.layers import norm
from t2x.layers import position
from t2x.models import decoder
from t2x.models import model as model_lib
from t2x.models import presets

# Released weights, counted exactly; the encoders with their pooler.
EXACT = {
  'bert_base': 109_482_240,
  'bert_large': 335_141_888,
  'roberta_base': 124_645_632,
  'roberta_large': 355_359_744,
  'xlnet_base': 116_718_336,
  'xlnet_large': 360_268_800,
  'gpt2_small': 124_439_808,
  'gpt2_medium': 354_823_168,
  'gpt2_large': 774_030_080,
  'gpt2_xl': 1_557_611_200,
  't5_small': 60_506_624,
  't5_base': 222_903_552,
  't5_large': 737_668_096,
  't5_3b': 2_851_598_336,
  't5_11b': 11_307_321_344,
  't5_v1_1_small': 76_961_152,
  't5_v1_1_base': 247_577_856,
  't5_v1_1_large': 783_150_080,
  't5_v1_1_xl': 2_849_757_184,
  't5_v1_1_xxl': 11_135_332_352,
  'llama2_7b': 6_738_415_616,
  'llama2_13b': 13_015_864_320,
  'llama2_70b': 68_976_648_192,
  'mixtral_8x7b': 46_702_792_704,
}

# What the papers print, and how near to it the count must come: to the last
# printed digit where the paper gives several. The original Transformer's 65
# million leave its vocabulary open ("about 37000 tokens").
ROUNDED = {
  'transformer_base': (65e6, 0.031),
  'gpt3_175b': (174_600e6, 0.0003),
  'palm_540b': (540.35e9, 0.0001),
}

# Heads of pretraining, which the published counts leave out.
HEADS = ('transform', 'output_bias_V', 'next_sentence')


def shapes(config):
  """Returns dotted path -> leaf, without allocating."""
  config = dataclasses.replace(config, vocab_multiple=1)
  make = lambda: model_lib.make(config, rngs=nnx.Rngs(0))
  return by_path(jax.eval_shape(make))


def by_path(model):
  flat = jax.tree_util.tree_flatten_with_path(model)[0]
  keystr = jax.tree_util.keystr
  return {
    keystr(path, simple=True, separator='.').removesuffix('.value'): leaf
    for path, leaf in flat
  }


def count(config):
  return sum(
    math.prod(leaf.shape)
    for path, leaf in shapes(config).items()
    if not path.startswith(HEADS)
  )


def test_every_preset_is_counted():
  assert set(presets.PRESETS) == set(EXACT) | set(ROUNDED)


@pytest.mark.parametrize('name', EXACT)
def test_exact_count(name):
  assert count(presets.PRESETS[name]()) == EXACT[name]


@pytest.mark.parametrize('name', ROUNDED)
def test_rounded_count(name):
  published, tolerance = ROUNDED[name]
  assert count(presets.PRESETS[name]()) == pytest.approx(
    published, rel=tolerance
  )


def test_heads_of_bert_are_those_left_out():
  """Dense, norm, output bias and the two-way classifier."""
  config = presets.bert_base()
  heads = 768 * 768 + 768 + 2 * 768 + 30522 + 2 * 768 + 2
  total = sum(math.prod(x.shape) for x in shapes(config).values())
  assert total - count(config) == heads


def test_gpt3_alternates_dense_and_banded_layers():
  config = presets.gpt3_175b()
  kinds = [type(kind) for kind in config.kinds]
  assert kinds == [attention_config.Dense, attention_config.Local]
  leaves = shapes(config)
  group = [p for p in leaves if re.search(r'group\.\d\.attention\.q_DNH', p)]
  assert [leaves[p].shape for p in group] == [(48, 12288, 96, 128)] * 2
  assert config.max_length == 2048


def test_palm_is_parallel_multi_query_without_biases():
  config = presets.palm_540b()
  assert config.residual == 'parallel'
  assert config.position == position.Rotary(style='interleaved')
  assert config.tied_head == 'tied_scaled'
  leaves = shapes(config)
  assert not [path for path in leaves if 'bias' in path]
  k = next(leaf for path, leaf in leaves.items() if 'k_DKH' in path)
  assert k.shape == (118, 18432, 1, 256)


def test_transformer_base_is_the_papers():
  config = presets.transformer_base()
  assert config.residual == 'post_norm' and config.embed_scale
  assert config.position == position.Sinusoidal()
  assert config.mlp.activation == 'relu'
  assert config.dropout == 0.1 and config.tied_head == 'tied'
  assert isinstance(config.norm, norm.LayerNorm)


# --- Initialisation: the preset's own, at small dimensions. ---

L, D, N, H, F = 4, 64, 4, 32, 192  # N H is not D, so that each fan shows.
CUT = 0.87962566  # Std of a standard normal cut at two.


def glorot(fan_in, fan_out):
  return math.sqrt(2 / (fan_in + fan_out))


def same(std, **others):
  """One std for all matrices, except those given."""
  names = ('q', 'k', 'v', 'o', 'up', 'down', 'tokens', 'positions', 'dense')
  return {**dict.fromkeys(names, std), **others}


FAN_IN = same(
  D**-0.5,
  o=(N * H) ** -0.5,
  down=F**-0.5,
  gate=D**-0.5,
  tokens=1.0,
)
T5_V1_1 = {
  **FAN_IN,
  'q': (D * H) ** -0.5,
  'relative': D**-0.5,
  'output': D**-0.5,
}
T5 = {k: v for k, v in T5_V1_1.items() if k not in ('gate', 'output')}
GPT = same(0.02, o=0.02 / math.sqrt(2 * L), down=0.02 / math.sqrt(2 * L))

# From each paper (or its released code), in terms of the dimensions.
STDS = {
  'transformer_base': same(
    glorot(D, N * H),
    up=glorot(D, F),
    down=glorot(D, F),
    tokens=512**-0.5,
  ),
  'bert_base': same(0.02 * CUT, types=0.02 * CUT),
  'roberta_base': same(0.02, types=0.02),
  'gpt2_small': GPT,
  'gpt3_175b': GPT,
  'palm_540b': FAN_IN,
  't5_small': T5,
  't5_v1_1_small': T5_V1_1,
  'llama2_7b': same(0.02, gate=0.02, output=0.02),
}

PATTERNS = {
  'q': r'\.q_DNH$',
  'k': r'\.k_DKH$',
  'v': r'\.v_DKH$',
  'o': r'\.o_NHD$',
  'up': r'\.up_DF$',
  'gate': r'\.gate_DF$',
  'down': r'\.down_FD$',
  'tokens': r'tokens\.table_VD$',
  'output': r'output\.table_VD$',
  'positions': r'\.table_PD$',
  'types': r'^token_types$',
  'relative': r'\.table_RN$',
  'dense': r'\.kernel_DE$',
}


def shrunk(config):
  """The same model at small dimensions; its `init` is untouched."""
  small = lambda a: dataclasses.replace(a, num_heads=N, head_dim=H)
  return dataclasses.replace(
    config,
    vocab_size=512,
    num_layers=L,
    embed_dim=D,
    attention=small(config.attention),
    attention_pattern=tuple(small(a) for a in config.attention_pattern),
    mlp=dataclasses.replace(config.mlp, hidden=F),
  )


@pytest.fixture(scope='module', params=STDS)
def drawn(request):
  """(name, dotted path -> array) of a small model of each preset."""
  config = shrunk(presets.PRESETS[request.param]())
  model = model_lib.make(config, rngs=nnx.Rngs(1))
  return request.param, jax.tree.map(np.asarray, by_path(model))


def test_standard_deviations(drawn):
  name, leaves = drawn
  seen = set()
  for path, leaf in leaves.items():
    kinds = [k for k, p in PATTERNS.items() if re.search(p, path)]
    if not kinds:
      assert re.search('scale$|bias', path), f'{path} is not tested'
      continue
    expected = STDS[name][kinds[0]]
    # Five standard errors of a sample's standard deviation.
    tolerance = 5 / math.sqrt(2 * leaf.size)
    assert leaf.std() == pytest.approx(expected, rel=tolerance), path
    assert abs(leaf.mean()) < 5 * expected / math.sqrt(leaf.size), path
    seen.add(kinds[0])
  assert {'q', 'k', 'v', 'o', 'up', 'down', 'tokens'} <= seen
  special = {'gate', 'types', 'relative', 'output'} & set(STDS[name])
  assert special <= seen


def test_biases_are_zero_and_norms_one(drawn):
  name, leaves = drawn
  scales = [path for path in leaves if path.endswith('scale')]
  biases = [path for path in leaves if re.search(r'bias(_[A-Z]+)?$', path)]
  assert scales
  assert bool(biases) == (name[:2] not in ('pa', 't5', 'll'))
  for path in scales:
    assert (leaves[path] == 1).all(), path
  for path in biases:
    assert (leaves[path] == 0).all(), path


def test_layers_are_drawn_apart(drawn):
  _, leaves = drawn
  for path, leaf in leaves.items():
    if 'q_DNH' in path:
      rows = leaf.reshape(leaf.shape[0], -1)
      correlation = np.corrcoef(rows) - np.eye(len(rows))
      assert len(rows) > 1 and np.abs(correlation).max() < 0.06, path


@pytest.mark.parametrize('drawn', ['bert_base'], indirect=True)
def test_bert_is_cut_at_two_standard_deviations(drawn):
  _, leaves = drawn
  for path, leaf in leaves.items():
    assert path.endswith('scale') or np.abs(leaf).max() <= 0.04, path
  tokens = leaves['embeddings.tokens.table_VD']
  assert np.abs(tokens).max() > 0.0399


@pytest.mark.parametrize('drawn', ['roberta_base', 'gpt2_small'], indirect=True)
def test_these_are_not_cut(drawn):
  _, leaves = drawn
  assert np.abs(leaves['embeddings.tokens.table_VD']).max() > 3.5 * 0.02


@pytest.mark.parametrize('drawn', ['transformer_base'], indirect=True)
def test_glorot_uniform_is_bounded(drawn):
  _, leaves = drawn
  bound = math.sqrt(6 / (D + F))
  up = np.abs(leaves['encoder.layers.group.0.mlp.up_DF'])
  assert 0.999 * bound < up.max() <= bound


# --- Against the other library's configs and counts. ---


def hugging_face():
  """Preset -> (class without a head, config) of transformers.

  The smallest of each are the library's own defaults.
  """
  hf = extras.need('transformers', extra='reference')
  bert_large = dict(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
  )
  roberta = dict(
    max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5
  )
  gpt2 = lambda n, width: hf.GPT2Config(
    n_layer=n, n_embd=width, n_head=width // 64
  )
  t5 = lambda *dims, **kwargs: hf.T5Config(
    **dict(zip(('d_model', 'd_ff', 'num_layers', 'num_heads'), dims)),
    **kwargs,
  )
  v1_1 = lambda *dims: t5(
    *dims,
    feed_forward_proj='gated-gelu',
    tie_word_embeddings=False,
    dropout_rate=0.0,
  )
  llama = lambda **kwargs: hf.LlamaConfig(rms_norm_eps=1e-5, **kwargs)
  encoder, roberta_model = hf.BertModel, hf.RobertaModel
  both = hf.T5ForConditionalGeneration
  return {
    'bert_base': (encoder, hf.BertConfig()),
    'bert_large': (encoder, hf.BertConfig(**bert_large)),
    'roberta_base': (roberta_model, hf.RobertaConfig(**roberta)),
    'roberta_large': (
      roberta_model,
      hf.RobertaConfig(**bert_large, **roberta),
    ),
    'gpt2_small': (hf.GPT2Model, hf.GPT2Config()),
    'gpt2_medium': (hf.GPT2Model, gpt2(24, 1024)),
    'gpt2_large': (hf.GPT2Model, gpt2(36, 1280)),
    'gpt2_xl': (hf.GPT2Model, gpt2(48, 1600)),
    't5_small': (both, hf.T5Config()),
    't5_base': (both, t5(768, 3072, 12, 12)),
    't5_large': (both, t5(1024, 4096, 24, 16)),
    't5_3b': (both, t5(1024, 16384, 24, 32, d_kv=128)),
    't5_11b': (both, t5(1024, 65536, 24, 128, d_kv=128)),
    't5_v1_1_small': (both, v1_1(512, 1024, 8, 6)),
    't5_v1_1_base': (both, v1_1(768, 2048, 12, 12)),
    't5_v1_1_large': (both, v1_1(1024, 2816, 24, 16)),
    't5_v1_1_xl': (both, v1_1(2048, 5120, 24, 32)),
    't5_v1_1_xxl': (both, v1_1(4096, 10240, 24, 64)),
    'llama2_7b': (hf.LlamaForCausalLM, llama()),
    'llama2_13b': (
      hf.LlamaForCausalLM,
      llama(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
      ),
    ),
    'llama2_70b': (
      hf.LlamaForCausalLM,
      llama(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
      ),
    ),
    'mixtral_8x7b': (
      hf.MixtralForCausalLM,
      hf.MixtralConfig(router_aux_loss_coef=0.02),
    ),
  }


@pytest.mark.reference
def test_the_other_library_counts_the_same():
  torch = extras.need('torch', extra='reference')
  for name, (make, config) in hugging_face().items():
    with torch.device('meta'):
      model = make(config)
    num = sum(p.numel() for p in model.parameters())
    if 'v1_1' in name:
      # transformers 5 ties the head of a new model, which 1.1 does not.
      num += config.vocab_size * config.d_model
    assert num == EXACT[name], name


@pytest.mark.reference
def test_presets_are_the_other_librarys_configs():
  """Everything that a config says: eps, activation, scale, dropout, heads."""
  extras.need('transformers', extra='reference')
  from t2x.interop import configs

  for name, (_, hf) in hugging_face().items():
    config = configs.to_t2x(hf.to_dict())[1]
    if 'roberta' in name:
      config = dataclasses.replace(config, pooler=True)
    if 't5_v1_1' in name:  # That its head is its own is told by the weights.
      config = configs.with_parts(config, ['lm_head.weight'])
    assert config == presets.PRESETS[name](), name


@pytest.mark.parametrize(
  'make,message',
  [
    (
      lambda: attention_config.Dense(num_heads=0),
      r'attention\.num_heads=0; it is 1 or more',
    ),
    (
      lambda: attention_config.Dense(num_kv_heads=0),
      r'attention\.num_kv_heads=0; it is 1 or more',
    ),
    (
      lambda: attention_config.Dense(block=-1),
      r'attention\.block=-1; it is 1 or',
    ),
    (
      lambda: attention_config.Dense(soft_cap=0.0),
      r'soft_cap=0\.0; it is above 0',
    ),
    (
      lambda: attention_config.Dense(dropout=1.0),
      r'dropout=1\.0; it is in \[0, 1\)',
    ),
    (lambda: mlp.MlpConfig(hidden=0), r'mlp\.hidden=0; it is 1 or more'),
    (lambda: position.Learned(max_length=0), r'max_length=0; it is 1 or more'),
    (
      lambda: position.RelativeBuckets(num_buckets=3),
      r'num_buckets=3; it is 4 or more',
    ),
    (
      lambda: position.RelativeBias(
        position.RelativeBuckets(max_distance=16),
        4,
        bidirectional=False,
        std=1.0,
        rngs=nnx.Rngs(0),
      ),
      r'max_distance=16 must be above the 16 distances',
    ),
    (
      lambda: decoder.DecoderConfig(
        position=position.Rotary(), attention=attention_config.Dense(head_dim=5)
      ),
      r'fraction=1\.0 of attention\.head_dim=5 rotates 5 entries; .* even',
    ),
    (
      lambda: decoder.DecoderConfig(position=position.Rotary(fraction=0.01)),
      r'rotates 0 entries',
    ),
    (
      lambda: decoder.DecoderConfig(
        attention_pattern=(
          attention_config.Dense(num_heads=2),
          attention_config.Local(num_heads=4),
        )
      ),
      r'has layers of \[2, 4\] heads; all have as many',
    ),
    (lambda: decoder.DecoderConfig(dropout=-0.1), r'model\.dropout=-0\.1; it'),
  ],
)
def test_sizes_and_rates_that_cannot_be(make, message):
  with pytest.raises(ValueError, match=message):
    make()

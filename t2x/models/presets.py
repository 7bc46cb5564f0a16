"""Published models as configs, with their dimensions and initialisation.

  >>> config = gpt2_small()
  >>> config.num_layers, config.embed_dim
  (12, 768)

Numbers of parameters in the docstrings leave out the rows that `vocab_multiple`
pads, and pretraining heads, as the papers do. Where a paper does not give the
initialisation, that of the released code is used.
"""

from collections.abc import Callable
import dataclasses

from t2x.layers import attention_config
from t2x.layers import mlp
from t2x.layers import moe
from t2x.layers import norm
from t2x.layers import param
from t2x.layers import position
from t2x.layers import routing
from t2x.layers import transformer_xl
from t2x.models import decoder
from t2x.models import encoder
from t2x.models import encoder_decoder
from t2x.models import model


def transformer_base() -> encoder_decoder.EncoderDecoderConfig:
  """Returns the base Transformer (Vaswani et al., 2017, Table 3): 65M.

  The vocabulary has 37,000 byte pairs of English and German. Matrices are drawn
  as in tensor2tensor (Glorot, uniform), embeddings with 1 / sqrt(D), since they
  are multiplied by sqrt(D) when looked up.
  """
  return encoder_decoder.EncoderDecoderConfig(
    vocab_size=37000,
    num_layers=6,
    embed_dim=512,
    attention=attention_config.Dense(num_heads=8, head_dim=64),
    mlp=mlp.MlpConfig(hidden=2048, activation='relu'),
    norm=norm.LayerNorm(eps=1e-6),
    residual='post_norm',
    position=position.Sinusoidal(),
    init=param.Init(
      distribution='uniform', scale='fan_avg', std=1.0, embed_std=512**-0.5
    ),
    dropout=0.1,
    embed_scale=True,
  )


def bert_base() -> encoder.EncoderConfig:
  """Returns BERT base (Devlin et al., 2019): 109,482,240 with the pooler."""
  return _bert(num_layers=12, embed_dim=768)


def bert_large() -> encoder.EncoderConfig:
  """Returns BERT large (Devlin et al., 2019): 335,141,888 with the pooler."""
  return _bert(num_layers=24, embed_dim=1024)


def _bert(*, num_layers: int, embed_dim: int) -> encoder.EncoderConfig:
  """Returns a BERT of some size.

  Weights are truncated normal with standard deviation 0.02 before truncation;
  GELU is computed with the error function.
  """
  return encoder.EncoderConfig(
    vocab_size=30522,
    num_layers=num_layers,
    embed_dim=embed_dim,
    attention=attention_config.Dense(
      num_heads=embed_dim // 64, bias=True, dropout=0.1
    ),
    mlp=mlp.MlpConfig(hidden=4 * embed_dim, activation='gelu'),
    norm=norm.LayerNorm(eps=1e-12),
    residual='post_norm',
    position=position.Learned(max_length=512),
    init=param.Init(distribution='truncated_normal', std=0.02),
    dropout=0.1,
    num_token_types=2,
    embed_norm=True,
    pooler=True,
    next_sentence=True,
  )


def roberta_base() -> encoder.EncoderConfig:
  """Returns RoBERTa base (Liu et al., 2019): 124,645,632 with the pooler."""
  return _roberta(bert_base())


def roberta_large() -> encoder.EncoderConfig:
  """Returns RoBERTa large (Liu et al., 2019): 355,359,744 with the pooler."""
  return _roberta(bert_large())


def _roberta(bert: encoder.EncoderConfig) -> encoder.EncoderConfig:
  """Returns a RoBERTa: BERT with byte-level BPE and no next-sentence task.

  Positions count from 2, so the table has 514 rows, and the one token type is
  a constant, both as in the release. fairseq draws from a normal distribution
  without truncation.
  """
  return dataclasses.replace(
    bert,
    vocab_size=50265,
    norm=norm.LayerNorm(eps=1e-5),
    position=position.Learned(max_length=512, offset=2),
    init=param.Init(distribution='normal', std=0.02),
    num_token_types=1,
    next_sentence=False,
  )


def xlnet_base() -> encoder.EncoderConfig:
  """Returns XLNet base (Yang et al., 2019): 116,718,336 parameters."""
  return _xlnet(num_layers=12, embed_dim=768)


def xlnet_large() -> encoder.EncoderConfig:
  """Returns XLNet large (Yang et al., 2019): 360,268,800 parameters."""
  return _xlnet(num_layers=24, embed_dim=1024)


def _xlnet(*, num_layers: int, embed_dim: int) -> encoder.EncoderConfig:
  """Returns an XLNet of some size.

  Weights are N(0, 0.02), and each layer has its own biases of scores, as in the
  release.
  """
  return encoder.EncoderConfig(
    vocab_size=32000,
    num_layers=num_layers,
    embed_dim=embed_dim,
    attention=transformer_xl.TransformerXL(
      num_heads=embed_dim // 64, dropout=0.1, num_token_types=3
    ),
    mlp=mlp.MlpConfig(hidden=4 * embed_dim, activation='gelu', dropout=0.1),
    norm=norm.LayerNorm(eps=1e-12),
    residual='post_norm',
    position=None,
    init=param.Init(distribution='normal', std=0.02),
    dropout=0.1,
    masked_head=False,
    output_bias=True,
    two_stream=True,
  )


def gpt2_small() -> decoder.DecoderConfig:
  """Returns GPT-2 small (Radford et al., 2019): 124,439,808 parameters."""
  return _gpt2(num_layers=12, embed_dim=768)


def gpt2_medium() -> decoder.DecoderConfig:
  """Returns GPT-2 medium (Radford et al., 2019): 354,823,168 parameters."""
  return _gpt2(num_layers=24, embed_dim=1024)


def gpt2_large() -> decoder.DecoderConfig:
  """Returns GPT-2 large (Radford et al., 2019): 774,030,080 parameters."""
  return _gpt2(num_layers=36, embed_dim=1280)


def gpt2_xl() -> decoder.DecoderConfig:
  """Returns GPT-2 XL (Radford et al., 2019): 1,557,611,200 parameters."""
  return _gpt2(num_layers=48, embed_dim=1600)


def _gpt2(*, num_layers: int, embed_dim: int) -> decoder.DecoderConfig:
  """Returns a GPT-2 of some size.

  Weights and positions are N(0, 0.02) as in GPT, residual branches are divided
  by sqrt(2 L). The paper gives neither dropout nor biases; they are those of
  GPT and of the released weights. The paper's first print counts 117M, 345M,
  762M and 1542M parameters.
  """
  return decoder.DecoderConfig(
    vocab_size=50257,
    num_layers=num_layers,
    embed_dim=embed_dim,
    attention=attention_config.Dense(
      num_heads=embed_dim // 64, bias=True, dropout=0.1
    ),
    mlp=mlp.MlpConfig(hidden=4 * embed_dim, activation='gelu_tanh'),
    position=position.Learned(max_length=1024),
    init=param.Init(std=0.02, depth_scaled=True),
    dropout=0.1,
  )


def gpt3_175b() -> decoder.DecoderConfig:
  """Returns GPT-3 (Brown et al., 2020, Tables 2.1 and D.1): 174,600M.

  Dense and locally banded layers alternate. The paper does not give the width
  of the band; 128 is that of the Sparse Transformer (Child et al., 2019).
  """
  dense = attention_config.Dense(num_heads=96, head_dim=128, bias=True)
  banded = attention_config.Local(
    num_heads=96, head_dim=128, bias=True, window=128
  )
  return decoder.DecoderConfig(
    vocab_size=50257,
    num_layers=96,
    embed_dim=12288,
    attention=dense,
    attention_pattern=(dense, banded),
    mlp=mlp.MlpConfig(hidden=4 * 12288, activation='gelu_tanh'),
    position=position.Learned(max_length=2048),
    init=param.Init(std=0.02, depth_scaled=True),
  )


def palm_540b() -> decoder.DecoderConfig:
  """Returns PaLM (Chowdhery et al., 2022, Table 1 and section 2): 540.35B.

  It has parallel layers, SwiGLU, one key/value head, rotary positions, and no
  biases in products or norms. Matrices are N(0, 1 / fan in), embeddings
  N(0, 1), and logits are divided by sqrt(D) (section 5).
  """
  return decoder.DecoderConfig(
    vocab_size=256000,
    num_layers=118,
    embed_dim=18432,
    attention=attention_config.Dense(
      num_heads=48, num_kv_heads=1, head_dim=256
    ),
    mlp=mlp.MlpConfig(
      hidden=4 * 18432, activation='silu', gated=True, bias=False
    ),
    norm=norm.LayerNorm(eps=1e-6, bias=False),
    residual='parallel',
    position=position.Rotary(style='interleaved'),
    init=param.Init(scale='fan_in', std=1.0, embed_std=1.0),
    tied_head='tied_scaled',
  )


def t5_small() -> encoder_decoder.EncoderDecoderConfig:
  """Returns T5 small (Raffel et al., 2020, section 3.7): 60,506,624."""
  return _t5(num_layers=6, embed_dim=512, hidden=2048, num_heads=8)


def t5_base() -> encoder_decoder.EncoderDecoderConfig:
  """Returns T5 base (Raffel et al., 2020, section 3.7): 222,903,552."""
  return _t5(num_layers=12, embed_dim=768, hidden=3072, num_heads=12)


def t5_large() -> encoder_decoder.EncoderDecoderConfig:
  """Returns T5 large (Raffel et al., 2020, section 3.7): 737,668,096."""
  return _t5(num_layers=24, embed_dim=1024, hidden=4096, num_heads=16)


def t5_3b() -> encoder_decoder.EncoderDecoderConfig:
  """Returns T5 3B (Raffel et al., 2020, section 3.7): 2,851,598,336."""
  return _t5(
    num_layers=24, embed_dim=1024, hidden=16384, num_heads=32, head_dim=128
  )


def t5_11b() -> encoder_decoder.EncoderDecoderConfig:
  """Returns T5 11B (Raffel et al., 2020, section 3.7): 11,307,321,344."""
  return _t5(
    num_layers=24, embed_dim=1024, hidden=65536, num_heads=128, head_dim=128
  )


def t5_v1_1_small() -> encoder_decoder.EncoderDecoderConfig:
  """Returns T5 1.1 small (Shazeer, 2020): 76,961,152 parameters."""
  return _t5_v1_1(num_layers=8, embed_dim=512, hidden=1024, num_heads=6)


def t5_v1_1_base() -> encoder_decoder.EncoderDecoderConfig:
  """Returns T5 1.1 base (Shazeer, 2020): 247,577,856 parameters."""
  return _t5_v1_1(num_layers=12, embed_dim=768, hidden=2048, num_heads=12)


def t5_v1_1_large() -> encoder_decoder.EncoderDecoderConfig:
  """Returns T5 1.1 large (Shazeer, 2020): 783,150,080 parameters."""
  return _t5_v1_1(num_layers=24, embed_dim=1024, hidden=2816, num_heads=16)


def t5_v1_1_xl() -> encoder_decoder.EncoderDecoderConfig:
  """Returns T5 1.1 XL (Shazeer, 2020): 2,849,757,184 parameters."""
  return _t5_v1_1(num_layers=24, embed_dim=2048, hidden=5120, num_heads=32)


def t5_v1_1_xxl() -> encoder_decoder.EncoderDecoderConfig:
  """Returns T5 1.1 XXL (Shazeer, 2020): 11,135,332,352 parameters."""
  return _t5_v1_1(num_layers=24, embed_dim=4096, hidden=10240, num_heads=64)


def _t5(
  *,
  num_layers: int,
  embed_dim: int,
  hidden: int,
  num_heads: int,
  head_dim: int = 64,
) -> encoder_decoder.EncoderDecoderConfig:
  """Returns a T5 of some size.

  Scores are not divided by sqrt(H); the weights of queries are initialised
  smaller by that factor. Matrices are N(0, 1 / fan in). Embeddings are N(0, 1)
  and tied, so features are divided by sqrt(D) before the logits, as in the
  released code.
  """
  return encoder_decoder.EncoderDecoderConfig(
    vocab_size=32128,
    num_layers=num_layers,
    embed_dim=embed_dim,
    attention=attention_config.Dense(
      num_heads=num_heads, head_dim=head_dim, scale=1.0, dropout=0.1
    ),
    mlp=mlp.MlpConfig(
      hidden=hidden, activation='relu', bias=False, dropout=0.1
    ),
    norm=norm.RMSNorm(eps=1e-6),
    position=position.RelativeBuckets(num_buckets=32, max_distance=128),
    init=param.Init(scale='fan_in', std=1.0, embed_std=1.0),
    dropout=0.1,
    tied_head='tied_scaled',
  )


def _t5_v1_1(**sizes: int) -> encoder_decoder.EncoderDecoderConfig:
  """Returns a T5 1.1: gated GELU, untied head, no dropout in pretraining.

  The sizes are those of the released checkpoints.
  """
  base = _t5(**sizes)
  return dataclasses.replace(
    base,
    attention=dataclasses.replace(base.attention, dropout=0.0),
    mlp=mlp.MlpConfig(
      hidden=base.mlp.hidden,
      activation='gelu_tanh',
      gated=True,
      bias=False,
    ),
    dropout=0.0,
    tied_head='untied',
  )


def llama2_7b() -> decoder.DecoderConfig:
  """Returns Llama 2 7B (Touvron et al., 2023): 6,738,415,616 parameters."""
  return _llama2(num_layers=32, embed_dim=4096, hidden=11008, num_heads=32)


def llama2_13b() -> decoder.DecoderConfig:
  """Returns Llama 2 13B (Touvron et al., 2023): 13,015,864,320 parameters."""
  return _llama2(num_layers=40, embed_dim=5120, hidden=13824, num_heads=40)


def llama2_70b() -> decoder.DecoderConfig:
  """Returns Llama 2 70B (Touvron et al., 2023): 68,976,648,192 parameters."""
  return _llama2(
    num_layers=80, embed_dim=8192, hidden=28672, num_heads=64, num_kv_heads=8
  )


def _llama2(
  *,
  num_layers: int,
  embed_dim: int,
  hidden: int,
  num_heads: int,
  num_kv_heads: int | None = None,
) -> decoder.DecoderConfig:
  """Returns a Llama 2 of some size.

  The paper does not give the initialisation; N(0, 0.02) is that of the released
  config.
  """
  return decoder.DecoderConfig(
    vocab_size=32000,
    num_layers=num_layers,
    embed_dim=embed_dim,
    attention=attention_config.Dense(
      num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=128
    ),
    mlp=mlp.MlpConfig(hidden=hidden, activation='silu', gated=True, bias=False),
    norm=norm.RMSNorm(eps=1e-5),
    position=position.Rotary(style='half'),
    init=param.Init(std=0.02),
    tied_head='untied',
  )


def mixtral_8x7b() -> decoder.DecoderConfig:
  """Returns Mixtral 8x7B (Jiang et al., 2024): 46,702,792,704 parameters.

  A router chooses 2 of 8 experts for each token.

  Initialisation and the factor of the balance loss are the release's config.
  """
  base = _llama2(
    num_layers=32, embed_dim=4096, hidden=14336, num_heads=32, num_kv_heads=8
  )
  experts = moe.MoeConfig(
    **dataclasses.asdict(base.mlp),
    num_experts=8,
    router=routing.TokenChoice(top_k=2, balance_loss=0.02),
    z_loss=0.0,
  )
  return dataclasses.replace(
    base, mlp=experts, position=position.Rotary(style='half', base=1e6)
  )


PRESETS: dict[str, Callable[[], model.ModelConfig]] = {
  fn.__name__: fn
  for fn in (
    transformer_base,
    bert_base,
    bert_large,
    roberta_base,
    roberta_large,
    xlnet_base,
    xlnet_large,
    gpt2_small,
    gpt2_medium,
    gpt2_large,
    gpt2_xl,
    gpt3_175b,
    palm_540b,
    t5_small,
    t5_base,
    t5_large,
    t5_3b,
    t5_11b,
    t5_v1_1_small,
    t5_v1_1_base,
    t5_v1_1_large,
    t5_v1_1_xl,
    t5_v1_1_xxl,
    llama2_7b,
    llama2_13b,
    llama2_70b,
    mixtral_8x7b,
  )
}

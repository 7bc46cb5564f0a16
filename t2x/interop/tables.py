"""Names and layouts of parameters in Hugging Face, by model family.

A row has the path of a parameter in t2x (`*` for the layer), its name in
Hugging Face, and its layout there. The letters at the end of a path are the
dimensions in t2x, in order. The layout has the same letters in the order of the
other array, and merged dimensions are written together: a torch Linear of N
heads has the layout 'NH D' where t2x has `DNH`. A fourth field (i, n, dim)
means part i of n of the other array along that dimension; parts may differ in
size.
"""

from collections.abc import Sequence
import dataclasses


@dataclasses.dataclass(frozen=True)
class ParameterRow:
  """One parameter of a layer or of the model.

  Attributes:
    path: path in t2x, with `*` for the layer.
    name: name in Hugging Face, with `{layer}` for the layer.
    layout: dimensions in Hugging Face; merged ones are written together.
    part: index, number and dimension of the parts of the array in Hugging Face,
      of which this parameter is one.
  """

  path: str
  name: str
  layout: str
  part: tuple[int, int, int] = (0, 1, -1)

  @property
  def letters(self) -> str:
    """The dimensions in t2x: those of the path, or else of the layout."""
    last = self.path.rpartition('_')[2]
    return last if last.isupper() else self.layout.replace(' ', '')

  @property
  def groups(self) -> list[str]:
    """The dimensions in Hugging Face: 'NH D' is ['NH', 'D']."""
    return self.layout.split()


@dataclasses.dataclass(frozen=True)
class Family:
  """The table of a model family.

  Attributes:
    prefix: prefix of the body's names in models with a head; models without a
      head leave it out.
    rows: parameters of the family.
    copies: name of a tied copy -> name of the parameter; checkpoints may have
      either or both.
    ignored: regular expression that matches names of buffers, which are not
      parameters.
  """

  prefix: str
  rows: tuple[ParameterRow, ...]
  copies: dict[str, str]
  ignored: str = 'a^'


def _rows(
  rows: Sequence[tuple], path: str = '', name: str = ''
) -> tuple[ParameterRow, ...]:
  """Makes rows with a common prefix of the paths and of the names."""
  return tuple(ParameterRow(path + p, name + n, *rest) for p, n, *rest in rows)


def _norm(path: str, name: str) -> list[tuple]:
  return [
    (f'{path}.scale', f'{name}.weight', 'D'),
    (f'{path}.bias', f'{name}.bias', 'D'),
  ]


# --- BERT and RoBERTa: the same body, different heads. ---

_BERT_LAYER = [
  ('attention.q_DNH', 'attention.self.query.weight', 'NH D'),
  ('attention.k_DKH', 'attention.self.key.weight', 'KH D'),
  ('attention.v_DKH', 'attention.self.value.weight', 'KH D'),
  ('attention.o_NHD', 'attention.output.dense.weight', 'D NH'),
  ('attention.q_bias_NH', 'attention.self.query.bias', 'NH'),
  ('attention.k_bias_KH', 'attention.self.key.bias', 'KH'),
  ('attention.v_bias_KH', 'attention.self.value.bias', 'KH'),
  ('attention.o_bias_D', 'attention.output.dense.bias', 'D'),
  *_norm('attention_norm', 'attention.output.LayerNorm'),
  ('mlp.up_DF', 'intermediate.dense.weight', 'F D'),
  ('mlp.up_bias_F', 'intermediate.dense.bias', 'F'),
  ('mlp.down_FD', 'output.dense.weight', 'D F'),
  ('mlp.down_bias_D', 'output.dense.bias', 'D'),
  *_norm('mlp_norm', 'output.LayerNorm'),
]

_BERT_BODY = [
  ('embeddings.tokens.table_VD', 'embeddings.word_embeddings.weight', 'V D'),
  (
    'embeddings.positions.table_PD',
    'embeddings.position_embeddings.weight',
    'P D',
  ),
  ('token_types', 'embeddings.token_type_embeddings.weight', 'P D'),
  *_norm('embed_norm', 'embeddings.LayerNorm'),
  ('pooler.kernel_DE', 'pooler.dense.weight', 'E D'),
  ('pooler.bias_E', 'pooler.dense.bias', 'E'),
]


def _bert(prefix: str) -> tuple[ParameterRow, ...]:
  return _rows(_BERT_BODY, '', prefix) + _rows(
    _BERT_LAYER, 'tower.layers.*.', prefix + 'encoder.layer.{layer}.'
  )


def _dense(path: str, name: str) -> list[tuple]:
  return [
    (f'{path}.kernel_DE', f'{name}.weight', 'E D'),
    (f'{path}.bias_E', f'{name}.bias', 'E'),
  ]


# The heads on texts and on tokens have one name: a file has one of them.
_TOKEN_CLASSES = _dense('token_classes', 'classifier')
_CLASSES = _dense('classes.0', 'classifier')

_BERT_HEADS = [
  ('transform.kernel_DE', 'cls.predictions.transform.dense.weight', 'E D'),
  ('transform.bias_E', 'cls.predictions.transform.dense.bias', 'E'),
  *_norm('transform_norm', 'cls.predictions.transform.LayerNorm'),
  ('output_bias_V', 'cls.predictions.bias', 'V'),
  ('next_sentence.kernel_DE', 'cls.seq_relationship.weight', 'E D'),
  ('next_sentence.bias_E', 'cls.seq_relationship.bias', 'E'),
]

_ROBERTA_HEADS = [
  ('transform.kernel_DE', 'lm_head.dense.weight', 'E D'),
  ('transform.bias_E', 'lm_head.dense.bias', 'E'),
  *_norm('transform_norm', 'lm_head.layer_norm'),
  ('output_bias_V', 'lm_head.bias', 'V'),
]

_POSITION_BUFFERS = r'.*embeddings\.position_ids'

_BERT = Family(
  prefix='bert.',
  rows=_bert('bert.') + _rows(_BERT_HEADS + _CLASSES + _TOKEN_CLASSES),
  copies={
    'cls.predictions.decoder.weight': (
      'bert.embeddings.word_embeddings.weight'
    ),
    'cls.predictions.decoder.bias': 'cls.predictions.bias',
  },
  ignored=_POSITION_BUFFERS,
)

_ROBERTA = Family(
  prefix='roberta.',
  rows=_bert('roberta.') + _rows(_ROBERTA_HEADS + _TOKEN_CLASSES),
  copies={
    'lm_head.decoder.weight': 'roberta.embeddings.word_embeddings.weight',
    'lm_head.decoder.bias': 'lm_head.bias',
  },
  ignored=_POSITION_BUFFERS,
)

# RoBERTa's classification head is BERT's pooler and head under other names.
_ROBERTA_CLASSES = dataclasses.replace(
  _ROBERTA,
  rows=tuple(r for r in _bert('roberta.') if not r.path.startswith('pooler.'))
  + _rows(
    _ROBERTA_HEADS
    + _dense('pooler', 'classifier.dense')
    + _dense('classes.0', 'classifier.out_proj')
  ),
  # Early files also hold a pooler, which the class does not have.
  ignored=rf'{_POSITION_BUFFERS}|roberta\.pooler\.dense\.(weight|bias)',
)

# --- GPT-2: Conv1D is (in, out); one holds queries, keys and values. ---

_GPT2_LAYER = [
  *_norm('attention_norm', 'ln_1'),
  ('attention.q_DNH', 'attn.c_attn.weight', 'D NH', (0, 3, -1)),
  ('attention.k_DKH', 'attn.c_attn.weight', 'D KH', (1, 3, -1)),
  ('attention.v_DKH', 'attn.c_attn.weight', 'D KH', (2, 3, -1)),
  ('attention.q_bias_NH', 'attn.c_attn.bias', 'NH', (0, 3, -1)),
  ('attention.k_bias_KH', 'attn.c_attn.bias', 'KH', (1, 3, -1)),
  ('attention.v_bias_KH', 'attn.c_attn.bias', 'KH', (2, 3, -1)),
  ('attention.o_NHD', 'attn.c_proj.weight', 'NH D'),
  ('attention.o_bias_D', 'attn.c_proj.bias', 'D'),
  *_norm('mlp_norm', 'ln_2'),
  ('mlp.up_DF', 'mlp.c_fc.weight', 'D F'),
  ('mlp.up_bias_F', 'mlp.c_fc.bias', 'F'),
  ('mlp.down_FD', 'mlp.c_proj.weight', 'F D'),
  ('mlp.down_bias_D', 'mlp.c_proj.bias', 'D'),
]

_GPT2_BODY = [
  ('embeddings.tokens.table_VD', 'wte.weight', 'V D'),
  ('embeddings.positions.table_PD', 'wpe.weight', 'P D'),
  *_norm('tower.final_norm', 'ln_f'),
]

_GPT2 = Family(
  prefix='transformer.',
  rows=_rows(_GPT2_BODY, '', 'transformer.')
  + _rows(_GPT2_LAYER, 'tower.layers.*.', 'transformer.h.{layer}.'),
  copies={'lm_head.weight': 'transformer.wte.weight'},
  ignored=r'.*\.attn\.(masked_)?bias',
)

# --- Llama, those like it, and Mixtral with its experts. ---

_LLAMA_LAYER = [
  ('attention_norm.scale', 'input_layernorm.weight', 'D'),
  ('attention.q_DNH', 'self_attn.q_proj.weight', 'NH D'),
  ('attention.k_DKH', 'self_attn.k_proj.weight', 'KH D'),
  ('attention.v_DKH', 'self_attn.v_proj.weight', 'KH D'),
  ('attention.o_NHD', 'self_attn.o_proj.weight', 'D NH'),
  ('attention.q_bias_NH', 'self_attn.q_proj.bias', 'NH'),
  ('attention.k_bias_KH', 'self_attn.k_proj.bias', 'KH'),
  ('attention.v_bias_KH', 'self_attn.v_proj.bias', 'KH'),
  ('attention.o_bias_D', 'self_attn.o_proj.bias', 'D'),
  ('mlp_norm.scale', 'post_attention_layernorm.weight', 'D'),
]

_LLAMA_MLP = [
  ('mlp.gate_DF', 'mlp.gate_proj.weight', 'F D'),
  ('mlp.up_DF', 'mlp.up_proj.weight', 'F D'),
  ('mlp.down_FD', 'mlp.down_proj.weight', 'D F'),
]

# Qwen 3.
_HEAD_NORMS = [
  ('attention.q_norm.scale', 'self_attn.q_norm.weight', 'H'),
  ('attention.k_norm.scale', 'self_attn.k_norm.weight', 'H'),
]

# Gemma 2; the second norm's name is that of another norm in Llama.
_SANDWICH = [
  (
    'attention_out_norm.scale',
    'post_attention_layernorm.weight',
    'D',
  ),
  ('mlp_norm.scale', 'pre_feedforward_layernorm.weight', 'D'),
  ('mlp_out_norm.scale', 'post_feedforward_layernorm.weight', 'D'),
]

# Phi-3: one array holds queries, keys and values; one the gate and up
# projections.
_PHI3_LAYER = [
  ('attention_norm.scale', 'input_layernorm.weight', 'D'),
  ('attention.q_DNH', 'self_attn.qkv_proj.weight', 'NH D', (0, 3, 0)),
  ('attention.k_DKH', 'self_attn.qkv_proj.weight', 'KH D', (1, 3, 0)),
  ('attention.v_DKH', 'self_attn.qkv_proj.weight', 'KH D', (2, 3, 0)),
  ('attention.o_NHD', 'self_attn.o_proj.weight', 'D NH'),
  ('mlp_norm.scale', 'post_attention_layernorm.weight', 'D'),
  ('mlp.gate_DF', 'mlp.gate_up_proj.weight', 'F D', (0, 2, 0)),
  ('mlp.up_DF', 'mlp.gate_up_proj.weight', 'F D', (1, 2, 0)),
  ('mlp.down_FD', 'mlp.down_proj.weight', 'D F'),
]

# One array holds the gate, then the up projections of all experts of a layer.
_MIXTRAL_EXPERTS = [
  ('mlp.router_DE', 'mlp.gate.weight', 'E D'),
  ('mlp.gate_EDF', 'mlp.experts.gate_up_proj', 'E F D', (0, 2, 1)),
  ('mlp.up_EDF', 'mlp.experts.gate_up_proj', 'E F D', (1, 2, 1)),
  ('mlp.down_EFD', 'mlp.experts.down_proj', 'E D F'),
]


def _llama(layer: list[tuple]) -> Family:
  ends = [
    ('embeddings.tokens.table_VD', 'model.embed_tokens.weight', 'V D'),
    ('tower.final_norm.scale', 'model.norm.weight', 'D'),
    ('output.table_VD', 'lm_head.weight', 'V D'),
  ]
  return Family(
    prefix='model.',
    rows=_rows(ends) + _rows(layer, 'tower.layers.*.', 'model.layers.{layer}.'),
    copies={'lm_head.weight': 'model.embed_tokens.weight'},
    ignored=r'.*rotary_emb\.inv_freq',
  )


# --- T5: 1.1 differs in the feed-forward layer and the head. ---


def _t5_attention(path: str, name: str) -> list[tuple]:
  return [
    (f'{path}.q_DNH', f'{name}.q.weight', 'NH D'),
    (f'{path}.k_DKH', f'{name}.k.weight', 'KH D'),
    (f'{path}.v_DKH', f'{name}.v.weight', 'KH D'),
    (f'{path}.o_NHD', f'{name}.o.weight', 'D NH'),
  ]


def _t5_mlp(name: str, gated: bool) -> list[tuple]:
  up = 'wi_1' if gated else 'wi'
  rows = [
    ('mlp_norm.scale', f'{name}.layer_norm.weight', 'D'),
    ('mlp.up_DF', f'{name}.DenseReluDense.{up}.weight', 'F D'),
    ('mlp.down_FD', f'{name}.DenseReluDense.wo.weight', 'D F'),
  ]
  gate = ('mlp.gate_DF', f'{name}.DenseReluDense.wi_0.weight', 'F D')
  return [*rows, gate] if gated else rows


def _t5_side(side: str, layer: list[tuple]) -> tuple[ParameterRow, ...]:
  self_attention = [
    ('attention_norm.scale', 'layer.0.layer_norm.weight', 'D'),
    *_t5_attention('attention', 'layer.0.SelfAttention'),
  ]
  first = f'{side}.block.0.layer.0.SelfAttention.'
  return _rows(
    [
      (
        f'{side}.bias.table_RN',
        f'{first}relative_attention_bias.weight',
        'R N',
      ),
      (f'{side}.final_norm.scale', f'{side}.final_layer_norm.weight', 'D'),
    ]
  ) + _rows(
    self_attention + layer, f'{side}.layers.*.', side + '.block.{layer}.'
  )


def _t5(*, gated: bool) -> Family:
  cross = [
    ('cross_norm.scale', 'layer.1.layer_norm.weight', 'D'),
    *_t5_attention('cross', 'layer.1.EncDecAttention'),
  ]
  ends = [
    ('embeddings.tokens.table_VD', 'shared.weight', 'V D'),
    ('output.table_VD', 'lm_head.weight', 'V D'),
  ]
  return Family(
    prefix='',
    rows=_rows(ends)
    + _t5_side('encoder', _t5_mlp('layer.1', gated))
    + _t5_side('decoder', cross + _t5_mlp('layer.2', gated)),
    copies={
      'encoder.embed_tokens.weight': 'shared.weight',
      'decoder.embed_tokens.weight': 'shared.weight',
      'lm_head.weight': 'shared.weight',
    },
    # Early checkpoints have a bias that no code reads.
    ignored=r'.*EncDecAttention\.relative_attention_bias\.weight',
  )


FAMILIES = {
  'bert': _BERT,
  'roberta': _ROBERTA,
  'roberta_classes': _ROBERTA_CLASSES,
  'gpt2': _GPT2,
  't5': _t5(gated=False),
  't5_v1_1': _t5(gated=True),
  'mixtral': _llama(_LLAMA_LAYER + _MIXTRAL_EXPERTS),
  'qwen3': _llama(_LLAMA_LAYER + _HEAD_NORMS + _LLAMA_MLP),
  'gemma2': _llama(_LLAMA_LAYER[:-1] + _SANDWICH + _LLAMA_MLP),
  'phi3': _llama(_PHI3_LAYER),
  **dict.fromkeys(
    ('llama', 'mistral', 'qwen2', 'gemma', 'smollm3'),
    _llama(_LLAMA_LAYER + _LLAMA_MLP),
  ),
}

"""Directories that others write otherwise than released ones."""

import json
import logging
import math

import extras
import hf_files
import jax
import numpy as np
import pytest
import tokenizers as library

from t2x.data import tokenizer_loading
from t2x.data import tokenizers
from t2x.inference import embeddings
from t2x.inference import evaluation
from t2x.inference import generation
from t2x.inference import hf_conversion
from t2x.inference import loading
from t2x.interop import huggingface

torch = extras.need('torch', extra='reference')
transformers = extras.need('transformers', extra='reference')

pytestmark = pytest.mark.reference
SIZE = 528


@pytest.fixture(autouse=True)
def _the_same_weights_in_any_order():
  """Models begin with weights of torch's own; with these, sums round little."""
  torch.manual_seed(3)


def random(model):
  torch.manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.3 * torch.randn_like(parameter))
  return model.eval()


def t5_v1_1(directory, own_head):
  """Writes T5 1.1 as `transformers` 5 does; returns its model."""
  hf_files.MAKERS['t5'](directory)
  config = transformers.T5Config(
    vocab_size=SIZE, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2,
    feed_forward_proj='gated-gelu', tie_word_embeddings=False,
    decoder_start_token_id=0, dropout_rate=0.0,
  )  # fmt: skip
  model = transformers.T5ForConditionalGeneration(config)
  if own_head:
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(SIZE, 16))
  random(model).save_pretrained(directory)
  return model


@pytest.mark.parametrize('own_head', [False, True])
def test_t5_1_1_as_transformers_5_writes_it(tmp_path, own_head):
  source, run, back = (tmp_path / name for name in ('source', 'run', 'back'))
  theirs = t5_v1_1(source, own_head)
  written = json.loads((source / 'config.json').read_text())
  assert written['tie_word_embeddings'] and not written['scale_decoder_outputs']
  found = huggingface.read(str(source))
  assert ('lm_head.weight' in found.tensors) == own_head
  assert found.config.tied_head == ('untied' if own_head else 'tied')
  ids = np.random.default_rng(0).integers(5, SIZE, (2, 9))
  inputs = {'input_ids': torch.tensor(ids)}
  with torch.no_grad():
    want = theirs(**inputs, decoder_input_ids=torch.tensor(ids)).logits.numpy()
  logits = jax.jit(lambda model: model(ids, encoder_inputs=ids))
  assert np.abs(want).max() > 0.5
  np.testing.assert_allclose(logits(found.model), want, atol=1e-4, rtol=0)
  hf_conversion.to_run(str(source), str(run))
  hf_conversion.from_run(str(run), str(back))
  assert json.loads((back / 'config.json').read_text()) == written
  again = huggingface.read(str(back)).model
  jax.tree.map(np.testing.assert_array_equal, again, found.model)


def added(directory, special):
  """Writes a GPT-2 whose tokenizer has two tokens more than its model."""
  hf_files.MAKERS['gpt2'](directory)
  size = tokenizer_loading.read(
    tokenizers.Pretrained(directory=str(directory))
  ).vocab_size
  config = transformers.GPT2Config(
    vocab_size=size, n_embd=16, n_layer=1, n_head=2, n_positions=32,
    bos_token_id=0, eos_token_id=0,
  )  # fmt: skip
  random(transformers.GPT2LMHeadModel(config)).save_pretrained(directory)
  made = library.ByteLevelBPETokenizer(
    str(directory / 'vocab.json'), str(directory / 'merges.txt')
  )._tokenizer
  made.add_special_tokens(['<|endoftext|>'])
  new = [library.AddedToken(t, special=special) for t in ('<pad2>', '<more>')]
  (made.add_special_tokens if special else made.add_tokens)(new)
  made.save(str(directory / 'tokenizer.json'))
  names = {'eos_token': '<|endoftext|>', 'pad_token': '<pad2>'}
  (directory / 'tokenizer_config.json').write_text(json.dumps(names))
  return size


@pytest.mark.parametrize('special', [True, False])
def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path, caplog, special):
  source, run = tmp_path / 'source', tmp_path / 'run'
  size = added(source, special)
  with caplog.at_level(logging.WARNING):
    hf_conversion.to_run(str(source), str(run))
  told = [r.getMessage() for r in caplog.records if 'no rows for' in r.msg]
  assert len(told) == 1 and '2 added tokens' in told[0]
  theirs = transformers.AutoModelForCausalLM.from_pretrained(source)
  for directory in (source, run):
    trained = loading.load(str(directory))
    assert trained.tokenizer.vocab_size == size + 2
    assert len(trained.token_bytes) == size
    result = generation.generation(
      trained,
      ['A text', 'and another of them'],
      num_tokens=5,
      sampling=generation.Sampling(temperature=0),
    )
    for ids, tokens in zip(
      trained.prompt_ids(['A text', 'and another of them']), result.tokens
    ):
      want = theirs.generate(
        torch.tensor([ids]), max_new_tokens=5, do_sample=False
      )[0].tolist()
      assert tokens == [i for i in want[len(ids) :] if i]
    with pytest.raises(ValueError, match=f'Text 1 has the token id {size + 1}'):
      generation.generate_text(trained, ['a', 'b<more>'], num_tokens=2)
    with pytest.raises(ValueError, match=f'has {size + 2} ids and model.vocab'):
      evaluation.evaluate_splits(trained, ['train'])


def test_a_text_of_an_encoder_with_a_token_that_it_has_no_row_for(tmp_path):
  hf_files.MAKERS['bert'](tmp_path / 'bert')
  lines = (tmp_path / 'bert' / 'vocab.txt').read_text().split()
  config = transformers.BertConfig(
    vocab_size=len(lines), hidden_size=16, num_hidden_layers=1,
    num_attention_heads=2, intermediate_size=24, max_position_embeddings=32,
  )  # fmt: skip
  random(transformers.BertForMaskedLM(config)).save_pretrained(
    tmp_path / 'bert'
  )
  made = library.BertWordPieceTokenizer(str(tmp_path / 'bert' / 'vocab.txt'))
  made.add_special_tokens(['<entity>'])
  made.save(str(tmp_path / 'bert' / 'tokenizer.json'))
  trained = loading.load(str(tmp_path / 'bert'))
  assert np.isfinite(embeddings.embed(trained, ['a text'])).all()
  with pytest.raises(ValueError, match=f'has the token id {len(lines)}'):
    embeddings.embed(trained, ['a text <entity>'])


VALUES = (
  None,
  'text',
  [1],
  {},
  {'content': 3},
  -1,
  10**12,
  True,
  1.5,
  math.inf,
)


@pytest.mark.parametrize('name', ['bert', 'roberta', 'gpt2', 't5', 'llama'])
def test_each_value_of_a_tokenizer_config(tmp_path, name):
  """A tokenizer, or one line that names the file."""
  directory = tmp_path / name
  hf_files.MAKERS[name](directory)
  file = directory / 'tokenizer_config.json'
  old = json.loads(file.read_text()) if file.exists() else {}
  keys = (
    'bos_token', 'eos_token', 'pad_token', 'unk_token', 'cls_token',
    'mask_token', 'tokenizer_class', 'extra_ids', 'add_bos_token',
    'add_eos_token', 'add_prefix_space', 'do_lower_case', 'strip_accents',
    'tokenize_chinese_chars', 'chat_template', 'added_tokens_decoder',
    'split_special_tokens',
  )  # fmt: skip
  works = 0
  for key in keys:
    for value in VALUES:
      file.write_text(json.dumps({**old, key: value}))
      try:
        made = tokenizer_loading.read(
          tokenizers.Pretrained(directory=str(directory))
        )
        made.decode(made.encode('A text.'))
        _ = made.chat_template
        works += 1
      except ValueError as error:
        assert '\n' not in str(error) and str(directory) in str(error), key
  assert works > len(keys)

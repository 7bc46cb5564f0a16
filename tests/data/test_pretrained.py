"""Tokenizers of others: the ids, and what surrounds a text, are theirs."""

import json

import extras
import hf_files
import numpy as np
import pytest

from t2x.data import config as data_config
from t2x.data import corpus as corpus_lib
from t2x.data import input_pipeline
from t2x.data import tokenizer_loading
from t2x.data import tokenizers
from t2x.objectives import masked_lm

NAMES = list(hf_files.MAKERS)


@pytest.fixture(scope='module')
def directories(tmp_path_factory):
  root = tmp_path_factory.mktemp('tokenizers')
  return {name: make(root / name) for name, make in hf_files.MAKERS.items()}


def read(directory):
  return tokenizer_loading.read(tokenizers.Pretrained(directory=str(directory)))


def theirs_of(name, directory):
  transformers = extras.need('transformers', extra='reference')
  bpe = lambda: (str(directory / 'vocab.json'), str(directory / 'merges.txt'))
  if name == 'bert':
    return transformers.BertTokenizer(str(directory / 'vocab.txt'))
  if name == 'gpt2':
    return transformers.GPT2Tokenizer(*bpe())
  if name == 'roberta':
    return transformers.RobertaTokenizer(*bpe())
  if name == 't5':
    return transformers.T5Tokenizer.from_pretrained(directory)
  return transformers.LlamaTokenizer.from_pretrained(directory)


@pytest.mark.reference
@pytest.mark.parametrize('saved', [False, True])
@pytest.mark.parametrize('name', NAMES)
def test_ids_are_those_of_transformers(directories, tmp_path, name, saved):
  """From the first files and from the tokenizer.json that it writes."""
  directory = directories[name]
  theirs = theirs_of(name, directory)
  if saved:
    directory = tmp_path / 'saved'
    theirs.save_pretrained(directory)
    assert (directory / 'tokenizer.json').exists()
  ours = read(directory)
  special = [ours.eos_id, ours.bos_id]
  marked = f'a {theirs.convert_ids_to_tokens(ours.eos_id)} b'
  texts = [*hf_files.TEXTS, *hf_files.PROBES, marked]
  if name == 't5':
    texts += ['a <extra_id_0> b', 'x<extra_id_41>y', '<extra_id_99>']
  if name == 'llama' and not saved:
    # SentencePiece puts a space before texts that have one, too.
    texts = [text for text in texts if not text.startswith(' ')]
    texts.remove(marked)
  # Warnings of long texts are theirs.
  want = [theirs(text, add_special_tokens=False)['input_ids'] for text in texts]
  assert ours.encode_batch(texts) == want
  assert name == 'llama' or {i for ids in want for i in ids} & set(special)
  around = [*ours.prefix_ids, *ours.encode('a text'), *ours.suffix_ids]
  assert around == theirs('a text')['input_ids']
  assert ours.vocab_size == len(theirs)
  for ids in want[:50]:
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize('name', NAMES)
def test_a_saved_copy_is_the_same(directories, tmp_path, name):
  ours = read(directories[name])
  ours.save(tmp_path / 'kept')
  again = tokenizer_loading.load(tmp_path / 'kept')
  assert again.encode_batch(hf_files.TEXTS) == ours.encode_batch(hf_files.TEXTS)
  assert again.vocab == ours.vocab and again.config == ours.config
  assert again.fingerprint == ours.fingerprint, 'A run goes on with its copy.'
  ends = lambda tokenizer: (tokenizer.prefix_ids, tokenizer.suffix_ids)
  assert ends(again) == ends(ours)


@pytest.mark.parametrize('name', NAMES)
def test_special_ids_lie_where_the_files_say(directories, name):
  ours = read(directories[name])
  special = {ours.eos_id, ours.bos_id} | set(ours.sentinel_ids)
  ids = np.arange(ours.vocab_size)
  assert not ours.vocab.is_text(ids)[list(special)].any()
  assert ours.vocab.is_text(ids).sum() >= ours.vocab_size - 110
  drawn = ours.vocab.draw(np.linspace(0, 1, 5000, endpoint=False))
  assert set(drawn) == set(ids[ours.vocab.is_text(ids)])
  assert ours.decode(special) == ''
  assert len(ours.sentinel_ids) == (100 if name == 't5' else 0)
  if name == 't5':
    assert ours.sentinel_ids[:2] == (ours.vocab_size - 1, ours.vocab_size - 2)
    text = ours.decode_marked(ours.encode_marked('one <extra_id_3> two'))
    assert '<extra_id_3>' in text and text.startswith('one')


@pytest.mark.parametrize('name', NAMES)
def test_marks_tell_where_words_begin(directories, name):
  ours = read(directories[name])
  begins_V = ours.marks()['begins_V']
  ids = ours.encode('a word and another one')
  assert begins_V[ids][1:].sum() == 4


def test_a_model_is_trained_on_them(directories, tmp_path):
  """Masks are the tokenizer's own, documents begin and end with its ids."""
  (tmp_path / 'a.txt').write_text('\n\n'.join(hf_files.TEXTS))
  config = data_config.DataConfig(
    source='text_files',
    files=str(tmp_path / '*.txt'),
    data_dir=str(tmp_path / 'data'),
    tokenizer=tokenizers.Pretrained(directory=str(directories['bert'])),
    objective=masked_lm.MaskedLM(random_share=0.0, mask_share=1.0),
    eval_splits=(),
    length=32,
    batch_size=4,
  )
  corpus = corpus_lib.prepare(config)
  ours = read(directories['bert'])
  assert corpus.tokenizer.fingerprint == ours.fingerprint
  batch = next(input_pipeline.train_batches(corpus, config, seed=0))
  hidden = np.take_along_axis(batch['inputs'], batch['target_positions'], 1)
  assert (hidden[batch['weights'] > 0] == ours.mask_id).all()
  tokens = corpus.streams('train')[0].tokens
  assert (tokens[0], tokens[-1]) == (ours.bos_id, ours.eos_id)


@pytest.mark.parametrize(
  'name, file, data, message',
  [
    ('gpt2', 'vocab.json', b'[]', 'vocab.json holds no JSON object'),
    ('gpt2', 'vocab.json', b'[' * 99_999, 'vocab.json is not JSON .*deeply'),
    ('gpt2', 'vocab.json', b'{"a": "x"}', 'vocab.json with merges.txt cannot'),
    ('gpt2', 'vocab.json', b'{"a": -1}', 'vocab.json with merges.txt cannot'),
    ('gpt2', 'merges.txt', b'a b c', 'vocab.json with merges.txt cannot'),
    ('gpt2', 'merges.txt', b'a b\n\xe9', 'merges.txt:2: not UTF-8'),
    ('gpt2', 'tokenizer_config.json', b'[]', 'config.json holds no JSON'),
    ('gpt2', 'added_tokens.json', b'[' * 99_999, 'tokens.json is not JSON'),
    ('gpt2', 'chat_template.jinja', b'a\n\xff', 'jinja:2: not UTF-8'),
    ('bert', 'vocab.txt', b'[UNK]\n\xe9', 'vocab.txt:2: not UTF-8'),
    ('bert', 'tokenizer.json', b'\xe9', 'tokenizer.json:1: not UTF-8'),
    ('t5', 'spiece.model', b'', 'spiece.model cannot be read .it is empty'),
    ('t5', 'spiece.model', b'abc', 'spiece.model cannot be read .INTERNAL'),
  ],
)  # fmt: skip
def test_damaged_files(tmp_path, name, file, data, message):
  directory = tmp_path / name
  hf_files.MAKERS[name](directory)
  (directory / file).write_bytes(data)
  with pytest.raises(ValueError, match=message) as raised:
    _ = read(directory).chat_template
  assert '\n' not in str(raised.value)


def test_pairs_need_a_tokenizer_json(directories):
  with pytest.raises(ValueError, match='is one of SentencePiece, which knows'):
    read(directories['t5']).encode_whole([('a', 'b')], 9)


def test_messages(directories, tmp_path):
  with pytest.raises(ValueError, match='data.tokenizer.directory is empty'):
    tokenizer_loading.read(tokenizers.Pretrained())
  with pytest.raises(ValueError, match='No tokenizer in .*spiece.model'):
    read(tmp_path)
  (tmp_path / 'tokenizer.json').write_text('{')
  with pytest.raises(ValueError, match='tokenizer.json cannot be read'):
    read(tmp_path)
  (tmp_path / 'tokenizer_config.json').write_text('no')
  with pytest.raises(ValueError, match='tokenizer_config.json is not JSON'):
    read(tmp_path)
  gpt2 = read(directories['gpt2'])
  with pytest.raises(ValueError, match='no mask token'):
    assert gpt2.vocab.mask_id
  words = tmp_path / 'words'
  words.mkdir()
  (words / 'vocab.txt').write_text('a\nb\n##c\n[UNK]\n')
  with pytest.raises(ValueError, match=r'vocab.txt lacks \[CLS\]'):
    read(words)
  (words / 'vocab.txt').write_text('a\nb\n##c\n[UNK]\n[CLS]\n[SEP]\n')
  (words / 'vocab.txt').write_text('a\nb\n\n##c\n[UNK]\n[CLS]\n[SEP]\nlast\n')
  gap = read(words)
  assert gap.vocab_size == 8 and gap.decode(gap.encode('a last')) == 'a last'
  (words / 'vocab.txt').write_text('a\nb\n##c\n[UNK]\n[CLS]\n[SEP]\n')
  (words / 'added_tokens.json').write_text(json.dumps({'<|im_start|>': 6}))
  with pytest.raises(ValueError, match=r"adds '<\|im_start\|>' as id 6"):
    read(words)
  (words / 'added_tokens.json').write_text(json.dumps({'[SEP]': 5}))
  names = {'eos_token': {'content': 'b'}}
  (words / 'special_tokens_map.json').write_text(json.dumps(names))
  assert read(words).eos_id == 1


def test_no_file_asks_for_a_billion_tokens(directories, tmp_path):
  import shutil

  copy = shutil.copytree(directories['t5'], tmp_path / 'copy')
  settings = {'additional_special_tokens': ['<extra_id_999999999>']}
  (copy / 'tokenizer_config.json').write_text(json.dumps(settings))
  with pytest.raises(ValueError, match='asks for 1000000000 tokens'):
    read(copy)
  settings = {'tokenizer_class': 'AlbertTokenizer'}
  (copy / 'tokenizer_config.json').write_text(json.dumps(settings))
  assert not read(copy).sentinel_ids


def test_a_directory_that_is_gone_is_not_asked_for_sentinels(tmp_path):
  config = tokenizers.Pretrained(directory=str(tmp_path / 'gone'))
  assert tokenizer_loading.num_sentinels(config) is None

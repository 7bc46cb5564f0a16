"""From files on disk to tokens, through TFDS."""

import json
import os
import pathlib
import stat

import numpy as np
import pytest
import tensorflow_datasets as tfds

from t2x.data import builders
from t2x.data import config as config_lib
from t2x.data import corpus as corpus_lib
from t2x.data import input_pipeline
from t2x.data import tokenizers
from t2x.data import words
from t2x.objectives import classification
from t2x.objectives import source_target


def _text(i, num=60):
  rng = np.random.default_rng(i)
  return ' '.join(f'word{w}' for w in rng.integers(0, 2000, num)) + '\n'


def _write(path, num=60):
  lines = [
    json.dumps({'text': _text(i), 'en': _text(i, 9), 'de': _text(i + 999, 7)})
    for i in range(num)
  ]
  path.write_text('\n'.join(lines))
  return str(path)


def _config(tmp_path, **changes):
  settings = {
    'source': 'text_files',
    'files': str(tmp_path / '*.jsonl'),
    'data_dir': str(tmp_path / 'data'),
    'tokenizer': tokenizers.Bytes(),
    'length': 64,
    'batch_size': 4,
  }
  return config_lib.DataConfig(**{**settings, **changes})


def _documents(stream):
  parts = np.split(np.asarray(stream.tokens), stream.offsets[1:-1])
  return [part.tolist() for part in parts]


def test_every_document_is_on_disk_with_start_and_end(tmp_path):
  _write(tmp_path / 'a.jsonl')
  corpus = corpus_lib.prepare(_config(tmp_path))
  found = []
  for split in ('train', 'validation'):
    (stream,) = corpus.streams(split)
    documents = _documents(stream)
    assert all(d[0] == 3 and d[-1] == 1 for d in documents)
    texts = [corpus.tokenizer.decode(d) for d in documents]
    assert corpus.num_bytes(split) == sum(len(t.encode()) for t in texts)
    assert corpus.num_tokens(split) == sum(len(d) for d in documents)
    found.extend(texts)
  assert sorted(found) == sorted(_text(i) for i in range(60))


def test_sentencepiece_corpus_decodes_to_the_text(tmp_path):
  _write(tmp_path / 'a.jsonl')
  tokenizer = tokenizers.SentencePiece(vocab_size=500)
  corpus = corpus_lib.prepare(_config(tmp_path, tokenizer=tokenizer))
  (stream,) = corpus.streams('train')
  texts = {corpus.tokenizer.decode(d) for d in _documents(stream)}
  assert texts < {_text(i) for i in range(60)}


def test_second_preparation_reuses_all_files(tmp_path):
  _write(tmp_path / 'a.jsonl')
  config = _config(tmp_path, tokenizer=tokenizers.SentencePiece(vocab_size=500))

  def files():
    return {
      p: p.stat().st_mtime_ns
      for p in (tmp_path / 'data').rglob('*')
      if p.is_file() and p.name != '.lock'
    }

  first = corpus_lib.prepare(config)
  before = files()
  second = corpus_lib.prepare(config)
  assert files() == before
  assert first.fingerprint == second.fingerprint


def test_two_builds_are_the_same(tmp_path):
  _write(tmp_path / 'a.jsonl')
  tokenizer = tokenizers.SentencePiece(vocab_size=500)
  one, two = (
    corpus_lib.prepare(
      _config(tmp_path, tokenizer=tokenizer, data_dir=str(tmp_path / name))
    )
    for name in ('one', 'two')
  )
  assert one.fingerprint == two.fingerprint
  for split in ('train', 'validation'):
    a, b = one.streams(split)[0], two.streams(split)[0]
    np.testing.assert_array_equal(a.tokens, b.tokens)


def test_changed_file_is_read_again(tmp_path):
  path = tmp_path / 'a.jsonl'
  _write(path)
  first = corpus_lib.prepare(_config(tmp_path))
  _write(path, num=70)
  second = corpus_lib.prepare(_config(tmp_path))
  assert first.fingerprint != second.fingerprint
  assert second.num_bytes('train') > first.num_bytes('train')


def test_other_files_stand_beside(tmp_path):
  a = _write(tmp_path / 'a.jsonl')
  b = _write(tmp_path / 'b.jsonl', num=40)
  one = corpus_lib.prepare(_config(tmp_path, files=a))
  two = corpus_lib.prepare(_config(tmp_path, files=b))
  again = corpus_lib.prepare(_config(tmp_path, files=a))
  assert one.fingerprint == again.fingerprint != two.fingerprint


def test_settings_are_part_of_the_fingerprint(tmp_path):
  _write(tmp_path / 'a.jsonl')
  prints = {
    corpus_lib.prepare(_config(tmp_path, **changes)).fingerprint
    for changes in (
      {},
      {'tokenizer': tokenizers.Bytes(num_sentinels=3)},
      {'tokenizer': tokenizers.SentencePiece(vocab_size=500)},
      {'text_field': 'en'},
    )
  }
  assert len(prints) == 4


def test_near_copies_of_held_out_documents_are_not_trained_on(tmp_path):
  _write(tmp_path / 'a.jsonl')
  config = _config(tmp_path, duplicates='near')
  corpus = corpus_lib.prepare(config)
  held_out = [
    corpus.tokenizer.decode(d)
    for d in _documents(corpus.streams('validation')[0])
  ]
  with open(tmp_path / 'b.jsonl', 'w') as file:
    for text in held_out:
      file.write(json.dumps({'text': f'An edited copy: {text}'}) + '\n')
  corpus = corpus_lib.prepare(config)
  for split in ('train', 'validation'):
    for document in _documents(corpus.streams(split)[0]):
      assert 'An edited' not in corpus.tokenizer.decode(document)
  dropped = corpus.documents['dropped']
  assert dropped['held_out'] >= len(held_out) - 1
  assert sum(dropped.values()) == len(held_out)
  text = ''.join(map(corpus.tokenizer.decode, _all(_config(tmp_path))))
  assert text.count('An edited') == len(held_out)


def _all(config):
  streams = corpus_lib.prepare(config).splits.values()
  return [d for (stream,) in streams for d in _documents(stream)]


def test_each_rule_of_copies_has_a_corpus_of_its_own(tmp_path, caplog):
  texts = [_text(i) for i in range(30)]
  texts += [texts[0], texts[1].replace(' ', '  ', 1), texts[2].upper(), ' ']
  path = tmp_path / 'a.jsonl'
  path.write_text('\n'.join(json.dumps({'text': t}) for t in texts))
  expected = {
    'none': {'empty': 1},
    'exact': {'empty': 1, 'copy': 1},
    'near': {'empty': 1, 'copy': 1, 'near_copy': 1},
  }
  prints = set()
  with caplog.at_level('INFO', 't2x'):
    for duplicates, dropped in [*expected.items(), *expected.items()]:
      caplog.clear()
      config = _config(tmp_path, duplicates=duplicates)
      corpus = corpus_lib.prepare(config)
      prints.add(corpus.fingerprint)
      facts = corpus.documents
      assert facts['dropped'] == dropped
      assert (facts['duplicates'], facts['read']) == (duplicates, 34)
      assert len(_all(config)) == facts['train'] + facts['validation']
      lines = pathlib.Path(facts['list']).read_text().split('\n')[:-1]
      rows = [json.loads(line) for line in lines]
      reasons = [row['reason'] for row in rows]
      assert {r: reasons.count(r) for r in reasons} == dropped
      assert rows[0] == {'id': 'a.jsonl:34', 'reason': 'empty', 'other': None}
      assert all(row['other'] for row in rows[1:])
      assert f'{len(rows)} dropped (1 empty' in caplog.text
      assert facts['list'] in caplog.text
  assert len(prints) == 3


def test_a_tfds_dataset_is_taken_as_it_is(tmp_path):
  config = _tfds_config(tmp_path, duplicates='near')
  with pytest.raises(ValueError, match='duplicates=near: local_pairs is taken'):
    input_pipeline.check(config)
  assert corpus_lib.prepare(_tfds_config(tmp_path)).documents == {}


def test_labels_of_json_lines_are_classes(tmp_path):
  """Numbers and true, false: in the rows, and by the names of the classes."""
  values = [True, False, 3, 0.5, 'yes']
  lines = [
    json.dumps({'text': f'{i} {_text(i)}', 'label': values[i % 5]})
    for i in range(100)
  ]
  (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
  config = _config(
    tmp_path,
    target_field='label',
    objective=classification.Classification(num_classes=5),
    batching=config_lib.Pad(),
  )
  input_pipeline.check(config)
  corpus = corpus_lib.prepare(config)
  (labels,) = words.label_texts(config, corpus).values()
  assert sorted(labels) == ['0.5', '3', 'false', 'true', 'yes']
  for batch in input_pipeline.eval_batches(corpus, config, 'validation'):
    for row, found in zip(batch['inputs'], batch['class0_targets'][:, 0]):
      if row.any():
        i = int(corpus.tokenizer.decode(row.tolist()).split()[0])
        value = values[i % 5]
        text = value if isinstance(value, str) else json.dumps(value)
        assert labels[found] == text


def test_pairs_stay_together(tmp_path):
  _write(tmp_path / 'a.jsonl')
  config = _config(
    tmp_path,
    text_field='en',
    target_field='de',
    objective=source_target.SourceTarget(),
  )
  input_pipeline.check(config)
  corpus = corpus_lib.prepare(config)
  expected = {(_text(i, 9), _text(i + 999, 7)) for i in range(60)}
  decode = corpus.tokenizer.decode
  sources, targets = map(_documents, corpus.streams('train'))
  assert all(s[-1] == 1 and s[0] != 3 for s in (*sources, *targets))
  found = {(decode(s), decode(t)) for s, t in zip(sources, targets)}
  assert found < expected and len(found) > 40
  assert corpus.num_bytes('train') == sum(len(t) for _, t in found)


class LocalPairs(tfds.core.GeneratorBasedBuilder):
  """A dataset of somebody else's."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    text = tfds.features.Text()
    features = {
      'question': text,
      'answer': text,
      'number': np.int64,
      'score': np.float32,
      'flag': np.bool_,
      'parity': tfds.features.ClassLabel(names=['even', 'odd']),
    }
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    return {
      'train': self._generate_examples(40),
      'test': self._generate_examples(9),
    }

  def _generate_examples(self, num):
    for i in range(num):
      yield (
        i,
        {
          'question': _text(i),
          'answer': _text(-i % 999),
          'number': i,
          'score': i / 10,
          'flag': i % 3 == 0,
          'parity': i % 2,
        },
      )


def _tfds_config(tmp_path, **changes):
  settings = {
    'source': 'local_pairs', 'text_field': 'question', 'eval_splits': ('test',)
  }  # fmt: skip
  return _config(tmp_path, **{**settings, **changes})


def test_any_tfds_dataset(tmp_path):
  config = _tfds_config(tmp_path, train_split='train[:50%]')
  input_pipeline.check(config)
  corpus = corpus_lib.prepare(config)
  assert corpus.streams('train[:50%]')[0].num_documents == 20
  assert corpus.streams('test')[0].num_documents == 9
  batch = next(input_pipeline.train_batches(corpus, config, seed=0))
  assert 'word' in corpus.tokenizer.decode(batch['inputs'][0])


def test_classes_of_a_tfds_dataset_are_their_names(tmp_path):
  config = _tfds_config(
    tmp_path,
    target_field='parity',
    objective=classification.Classification(),
    batching=config_lib.Pad(),
  )
  input_pipeline.check(config)
  corpus = corpus_lib.prepare(config)
  assert words.label_texts(config, corpus) == {'class0': ['even', 'odd']}
  number = {_text(i)[:20]: i for i in range(9)}
  for batch in input_pipeline.eval_batches(corpus, config, 'test'):
    for row, found in zip(batch['inputs'], batch['class0_targets'][:, 0]):
      if row.any():
        text = corpus.tokenizer.decode(row.tolist())
        assert found == number[text[:20]] % 2


@pytest.mark.parametrize('field', ['number', 'score', 'flag'])
def test_numbers_of_a_tfds_dataset_are_targets(tmp_path, field):
  """As JSON writes them, in as few digits as their precision has."""
  config = _tfds_config(
    tmp_path, target_field=field, objective=source_target.SourceTarget()
  )
  corpus = corpus_lib.prepare(config)
  (_, targets) = corpus.streams('test')
  found = sorted(map(corpus.tokenizer.decode, _documents(targets)))
  expected = {
    'number': [str(i) for i in range(9)],
    'score': [f'0.{i}' for i in range(9)],
    'flag': ['true' if i % 3 == 0 else 'false' for i in range(9)],
  }
  assert found == sorted(expected[field])


def test_tfds_errors(tmp_path):
  def fails(match, **changes):
    with pytest.raises(ValueError, match=match):
      corpus_lib.prepare(_tfds_config(tmp_path, **changes))

  fails(
    r"no field 'text'; it has \['answer', 'flag', 'number', 'parity', .*\]. "
    'Set data.text_field',
    text_field='text',
  )
  fails("Field 'number' must be text, found int", text_field='number')
  fails(
    r"empty split 'dev' of local_pairs .*; it has \['test', 'train'\]",
    eval_splits=('dev',),
  )
  fails("empty split 'train.:0.' of local_pairs", train_split='train[:0]')


def test_unknown_source_suggests_one():
  config = config_lib.DataConfig(source='instaled_docs')
  with pytest.raises(
    ValueError,
    match="Unknown data.source='instaled_docs'. Did you mean 'installed_docs'",
  ):
    input_pipeline.check(config)


def test_tfds_dataset_that_cannot_be_prepared_here(tmp_path, monkeypatch):
  def refuse(self, **kwargs):
    raise ConnectionError('no network')

  monkeypatch.setattr(LocalPairs, 'download_and_prepare', refuse)
  with pytest.raises(
    ValueError,
    match='cannot prepare it here .ConnectionError: no network.. Prepare it '
    "where .* file_format='array_record'",
  ):
    corpus_lib.prepare(_tfds_config(tmp_path))


def test_unknown_split_of_files(tmp_path):
  _write(tmp_path / 'a.jsonl')
  with pytest.raises(
    ValueError,
    match=r"Unknown or empty split 'test'.*\['train', 'validation'\]. Set",
  ):
    corpus_lib.prepare(_config(tmp_path, eval_splits=('test',)))


@pytest.mark.parametrize(
  'text', ['', ' \n', '{"text": " "}', '{"text": "one"}']
)
def test_corpus_without_text(tmp_path, text):
  (tmp_path / 'a.jsonl').write_text(text)
  with pytest.raises(
    ValueError, match='text_files: the corpus has too little text: .* Give more'
  ):
    corpus_lib.prepare(_config(tmp_path))
  assert not list((tmp_path / 'data').rglob('*.array_record*'))


def test_vocabulary_larger_than_the_corpus_supports(tmp_path):
  _write(tmp_path / 'a.jsonl')
  with pytest.raises(
    ValueError, match=r'vocab_size=8192 .* supports, which is'
  ):
    corpus_lib.prepare(_config(tmp_path, tokenizer=tokenizers.SentencePiece()))


def test_data_dir_that_cannot_be_used(tmp_path):
  (tmp_path / 'file').write_text('x')
  config = _config(tmp_path, data_dir=str(tmp_path / 'file' / 'below'))
  with pytest.raises(
    ValueError, match='below. cannot be written .*T2X_DATA_DIR'
  ):
    corpus_lib.prepare(config)
  with pytest.raises(ValueError, match="'gs://a/b' must be a local directory"):
    corpus_lib.prepare(_config(tmp_path, data_dir='gs://a/b'))


def test_data_dir_comes_from_the_environment(tmp_path, monkeypatch):
  monkeypatch.setenv('T2X_DATA_DIR', str(tmp_path / 'env'))
  assert config_lib.directory(_config(tmp_path, data_dir=None)) == str(
    tmp_path / 'env'
  )
  monkeypatch.delenv('T2X_DATA_DIR')
  default = config_lib.directory(_config(tmp_path, data_dir=None))
  assert default == os.path.expanduser('~/.cache/t2x')


def test_interrupted_preparation_leaves_nothing_half_done(
  tmp_path, monkeypatch
):
  _write(tmp_path / 'a.jsonl')
  config = _config(tmp_path)

  def fail(self, texts):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(tokenizers.BytesTokenizer, 'encode_batch', fail)
    with pytest.raises(KeyboardInterrupt):
      corpus_lib.prepare(config)
  assert not list((tmp_path / 'data' / 'tokens').iterdir())
  assert corpus_lib.prepare(config).num_tokens('train')


def test_lost_examples_are_noticed(tmp_path):
  _write(tmp_path / 'a.jsonl')
  config = _config(tmp_path)
  builder = corpus_lib.open_builder(config)
  path = builder.data_path / 'metadata.json'
  metadata = json.loads(path.read_text())
  metadata['counts']['train'] += 1
  os.chmod(path, stat.S_IWUSR | stat.S_IRUSR)
  path.write_text(json.dumps(metadata))
  with pytest.raises(AssertionError, match='train'):
    builders.prepare(
      builders.text_files_builder(
        str(tmp_path / 'data'), config.files, 'text', None, 'exact'
      )
    )

"""What an export makes of a text is what the run makes of it.

Read by t2x, by `tokenizers` and by `transformers`; texts drawn at random.
"""

import json
import shutil

import extras
import hf_files
import nasty
import numpy as np
import pytest

from t2x.data import tokenizer_loading
from t2x.data import tokenizers
from t2x.interop import framing
from t2x.interop import tokenizer_file
from t2x.models import decoder
from t2x.models import encoder
from t2x.models import encoder_decoder

library = extras.need('tokenizers', extra='huggingface')
transformers = extras.need('transformers', extra='reference')

pytestmark = pytest.mark.reference

TEXTS = nasty.texts(300)
OWN = {
  'sentencepiece': tokenizers.SentencePiece(vocab_size=900),
  'few_sentinels': tokenizers.SentencePiece(vocab_size=2200, num_sentinels=4),
  'bytes': tokenizers.Bytes(),
}
MODELS = {
  'decoder': decoder.DecoderConfig(vocab_size=3000),
  'encoder': encoder.EncoderConfig(vocab_size=3000, num_token_types=2),
  'encoder_decoder': encoder_decoder.EncoderDecoderConfig(vocab_size=3000),
}


@pytest.fixture(scope='module')
def own():
  """Name -> a tokenizer of t2x's own."""
  corpora = {name: hf_files.TEXTS for name in OWN}
  # Where names are common text, and <extra_id_9> may be a piece.
  corpora['few_sentinels'] = nasty.texts(2000, seed=1) + ['<extra_id_9>'] * 500
  return {
    name: tokenizer_loading.train(config, corpora[name])
    for name, config in OWN.items()
  }


def read(directory):
  return tokenizer_loading.read(tokenizers.Pretrained(directory=str(directory)))


def readable(tokenizer, frame, texts):
  """Returns the texts that the run reads: not those of missing sentinels."""
  found = []
  for text in texts:
    try:
      frame.ids(tokenizer, [text])
      found.append(text)
    except ValueError:
      assert frame.reads_sentinels
  return found


@pytest.mark.parametrize('family', list(MODELS))
@pytest.mark.parametrize('name', list(OWN))
def test_any_text_has_the_ids_of_the_run(own, tmp_path, name, family):
  tokenizer = own[name]
  frame = framing.of(MODELS[family], tokenizer)
  tokenizer_file.make_writer(tokenizer, frame)(tmp_path)
  texts = readable(tokenizer, frame, TEXTS)
  assert len(texts) > 250
  # What a run reads, said once more.
  read_one = (
    tokenizer.encode_marked if frame.reads_sentinels else tokenizer.encode
  )
  plain = [read_one(text) for text in texts]
  start, end = [[3], []] if family == 'encoder_decoder' else [[], [3]]
  start = [] if family == 'encoder_decoder' else [3]
  end = [] if family == 'decoder' else [1]
  want = [[*start, *ids, *end] for ids in plain]

  theirs = library.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
  bare = [theirs.encode(t, add_special_tokens=False).ids for t in texts]
  assert bare == plain
  assert [theirs.encode(text).ids for text in texts] == want

  auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert auto(texts, add_special_tokens=False)['input_ids'] == plain
  found = auto(texts)
  assert found['input_ids'] == want
  assert ('token_type_ids' in found) == (family == 'encoder')
  roles = ('pad', 'eos', 'unk', 'bos', 'mask')
  assert [getattr(auto, f'{role}_token_id') for role in roles] == [
    0,
    1,
    2,
    3,
    4,
  ]

  again = read(tmp_path)
  frame = framing.of(MODELS[family], again)
  assert frame.ids(again, texts) == want
  assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)

  # And back: special tokens add nothing, but sentinels in what T5 writes.
  back = tokenizer.decode_marked if frame.reads_sentinels else tokenizer.decode
  for text, ids in zip(texts, want):
    assert back(ids) == again.decode_marked(ids) == theirs.decode(ids)
    assert auto.decode(ids, skip_special_tokens=True) == back(ids)
    if '<extra_id_' not in text:
      assert back(ids) == text


@pytest.mark.parametrize('name', list(OWN))
def test_any_ids_have_the_text_of_the_run(own, tmp_path, name):
  """Half characters too; what else is known of ids is the same."""
  tokenizer = own[name]
  frame = framing.of(MODELS['decoder'], tokenizer)
  tokenizer_file.make_writer(tokenizer, frame)(tmp_path)
  again = read(tmp_path)
  ids = np.random.default_rng(0).integers(0, tokenizer.vocab_size, (200, 9))
  for row in ids.tolist():
    assert again.decode(row) == tokenizer.decode(row)
    assert again.decode_marked(row) == tokenizer.decode_marked(row)
  assert again.token_bytes() == tokenizer.token_bytes()
  assert again.sentinel_ids == tokenizer.sentinel_ids
  every = np.arange(tokenizer.vocab_size)
  np.testing.assert_array_equal(
    again.vocab.is_text(every), tokenizer.vocab.is_text(every)
  )
  for key, array in tokenizer.marks().items():
    np.testing.assert_array_equal(again.marks()[key], array, key)


def test_saved_by_transformers_it_is_still_the_same(own, tmp_path):
  tokenizer = own['sentencepiece']
  for family, config in MODELS.items():
    first, second = tmp_path / family, tmp_path / f'{family}_again'
    frame = framing.of(config, tokenizer)
    tokenizer_file.make_writer(tokenizer, frame)(tmp_path / family)
    transformers.AutoTokenizer.from_pretrained(first).save_pretrained(second)
    again = read(second)
    texts = readable(tokenizer, frame, TEXTS)
    assert framing.of(config, again).ids(again, texts) == (
      frame.ids(tokenizer, texts)
    )
    assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_a_number_is_one_sentinel(own):
  """And names what is missing, however long it is."""
  tokenizer = own['few_sentinels']
  for text in ('<extra_id_03>', '<extra_id_\u0663>', '<extra_id_>'):
    assert tokenizer.encode_marked(text) == tokenizer.encode(text)
  with pytest.raises(ValueError, match=r'^<extra_id_9+>: .* has 4 sentinels'):
    tokenizer.encode_marked(f'<extra_id_{"9" * 9999}>')


# --- Tokenizers of others. ---


@pytest.fixture(scope='module')
def others(tmp_path_factory):
  """Name -> a directory: first files, and `_saved` with a tokenizer.json."""
  root = tmp_path_factory.mktemp('others')
  found = {name: make(root / name) for name, make in hf_files.MAKERS.items()}
  # As AutoTokenizer needs it.
  for name, directory in list(found.items()):
    (directory / 'config.json').write_text(json.dumps({'model_type': name}))
    auto = transformers.AutoTokenizer.from_pretrained(directory)
    found[f'{name}_saved'] = root / f'{name}_saved'
    auto.save_pretrained(found[f'{name}_saved'])
  return found


@pytest.mark.parametrize('family', list(MODELS))
@pytest.mark.parametrize(
  'name', [*hf_files.MAKERS, *(f'{name}_saved' for name in hf_files.MAKERS)]
)
def test_tokenizers_of_others(others, tmp_path, name, family):
  """In a model of any family, whatever their own files put around a text."""
  tokenizer = read(others[name])
  frame = framing.of(MODELS[family], tokenizer)
  if name == 't5':  # Stays a SentencePiece model; transformers converts it.
    if family == 'decoder':
      with pytest.raises(ValueError, match='SentencePiece model alone'):
        tokenizer_file.make_writer(tokenizer, frame)
      return
  want = frame.ids(tokenizer, TEXTS)
  num, end = len(frame.before), len(frame.after)
  plain = [ids[num : len(ids) - end] for ids in want]
  assert (
    not frame.reads_sentinels or num == 0 and frame.after == (tokenizer.eos_id,)
  )
  for as_it_came in (False, True):
    made = tmp_path / str(as_it_came)
    write = tokenizer_file.make_writer(tokenizer, frame, as_it_came=as_it_came)
    write(made)
    # Its class comes from the family where the files name none.
    kind = {'decoder': 'llama', 'encoder': 'bert', 'encoder_decoder': 't5'}
    kind = name.removesuffix('_saved') if as_it_came else kind[family]
    (made / 'config.json').write_text(json.dumps({'model_type': kind}))
    again = read(made)
    assert framing.of(MODELS[family], again).ids(again, TEXTS) == want
    auto = transformers.AutoTokenizer.from_pretrained(made)
    texts = range(len(TEXTS))
    if name == 't5':
      texts = [i for i in texts if hf_files.is_usual(TEXTS[i])]
      assert len(texts) > 50
    else:
      theirs = library.Tokenizer.from_file(str(made / 'tokenizer.json'))
      assert [theirs.encode(text).ids for text in TEXTS] == want
    bare = auto(TEXTS, add_special_tokens=False)['input_ids']
    assert [bare[i] for i in texts] == [plain[i] for i in texts]
    framed = auto(TEXTS)['input_ids']
    assert [framed[i] for i in texts] == [want[i] for i in texts]
    if not as_it_came and name != 't5':
      for role in ('pad', 'bos', 'eos'):
        own = getattr(tokenizer, f'{role}_id')
        assert getattr(auto, f'{role}_token_id') == own


def test_what_an_export_wrote_serves_another_family(own, tmp_path):
  """Sentinels are found and shown by models that write them, and no others."""
  tokenizer = own['sentencepiece']
  first = framing.of(MODELS['decoder'], tokenizer)
  tokenizer_file.make_writer(tokenizer, first)(tmp_path / 'first')
  middle = read(tmp_path / 'first')
  frame = framing.of(MODELS['encoder_decoder'], middle)
  tokenizer_file.make_writer(middle, frame)(tmp_path / 'second')
  texts = readable(tokenizer, frame, TEXTS)
  want = [[*tokenizer.encode_marked(text), 1] for text in texts]
  auto = transformers.AutoTokenizer.from_pretrained(tmp_path / 'second')
  assert auto(texts)['input_ids'] == want
  again = read(tmp_path / 'second')
  assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
  for ids in want:
    shown = auto.decode(ids, skip_special_tokens=True)
    assert shown == tokenizer.decode_marked(ids)


@pytest.mark.parametrize('name', ['gpt2', 'llama_saved'])
def test_settings_of_what_is_around(others, tmp_path, name):
  """They count where there is no tokenizer.json, as in transformers."""
  found = set()
  for number, settings in enumerate(
    (
      {'add_bos_token': False},
      {'add_eos_token': True},
      {'add_bos_token': True, 'add_eos_token': True},
    )
  ):
    copy = shutil.copytree(others[name], tmp_path / str(number))
    file = copy / 'tokenizer_config.json'
    given = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(given | settings))
    ours = read(copy)
    auto = transformers.AutoTokenizer.from_pretrained(copy)
    around = [*ours.prefix_ids, *ours.encode('a text'), *ours.suffix_ids]
    assert around == auto('a text')['input_ids']
    found.add(len(around))
    # The export's file says it by itself.
    made = tmp_path / f'made_{number}'
    frame = framing.of(MODELS['encoder'], ours)
    tokenizer_file.make_writer(ours, frame, as_it_came=True)(made)
    theirs = library.Tokenizer.from_file(str(made / 'tokenizer.json'))
    assert theirs.encode('a text').ids == around
    auto = transformers.AutoTokenizer.from_pretrained(made)
    assert around == auto('a text')['input_ids']
  assert len(found) == (3 if name == 'gpt2' else 1)

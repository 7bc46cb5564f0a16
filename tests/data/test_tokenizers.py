import pathlib

import pytest

from t2x.data import tokenizer_loading
from t2x.data import tokenizers

TEXTS = [pathlib.Path(tokenizers.__file__).read_text(), 'The quick brown fox. ']
HARD = [
  '',
  ' lead and trail ',
  'tabs\tand\r\nlines\n\n\n    indented  twice',
  # Nothing is normalised.
  'e\u0301 \u00e9 \u6f22\u5b57 \U0001f600 \ufeff \ufb01',
  '\u2581 stands\u2581for a space\u2581\u2581',
  '<mask> <extra_id_3> <pad> </s> <0x41>',
  '\x00\x01\x7f',
]


@pytest.fixture(scope='module', params=['sentencepiece', 'bytes'])
def tokenizer(request):
  if request.param == 'bytes':
    return tokenizer_loading.train(tokenizers.Bytes(), TEXTS)
  return tokenizer_loading.train(
    tokenizers.SentencePiece(vocab_size=600), TEXTS
  )


@pytest.mark.parametrize('text', [*HARD, *TEXTS])
def test_text_comes_back_as_it_was(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert all(
    tokenizer.vocab.first_text_id <= i < tokenizer.vocab_size for i in ids
  )


def test_batches_encode_like_single_texts(tokenizer):
  assert tokenizer.encode_batch(HARD) == [tokenizer.encode(t) for t in HARD]


def test_special_ids_add_no_text(tokenizer):
  special = [
    tokenizer.pad_id, tokenizer.bos_id, tokenizer.mask_id, tokenizer.eos_id,
    *tokenizer.sentinel_ids, tokenizer.vocab_size, 10**6,
  ]  # fmt: skip
  assert len(set(special)) == 106
  ids = [i for j in tokenizer.encode('a b c') for i in (*special, j)]
  assert tokenizer.decode(ids) == 'a b c'


def test_marks_stand_for_sentinels(tokenizer):
  text = 'a<extra_id_0> b c <extra_id_99><extra_id_1>'
  ids = tokenizer.encode_marked(text)
  assert tokenizer.decode_marked(ids) == text
  marks = [i for i in ids if i in tokenizer.sentinel_ids]
  assert marks == [tokenizer.sentinel_ids[n] for n in (0, 99, 1)]
  assert tokenizer.decode(ids) == 'a b c '
  assert tokenizer.encode_marked('plain') == tokenizer.encode('plain')
  with pytest.raises(ValueError, match='<extra_id_100>: .* has 100 sentinels'):
    tokenizer.encode_marked('<extra_id_100>')


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
  tokenizer.save(tmp_path / 'new' / 'directory')
  loaded = tokenizer_loading.load(tmp_path / 'new' / 'directory')
  assert loaded.config == tokenizer.config
  assert loaded.vocab == tokenizer.vocab
  assert loaded.fingerprint == tokenizer.fingerprint
  assert loaded.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_training_is_deterministic():
  config = tokenizers.SentencePiece(vocab_size=600)
  first, second = (tokenizer_loading.train(config, TEXTS) for _ in range(2))
  assert first.fingerprint == second.fingerprint
  other = tokenizer_loading.train(config, ['Quite another text. '] + TEXTS)
  assert other.fingerprint != first.fingerprint


def test_pieces_are_learned():
  tokenizer = tokenizer_loading.train(
    tokenizers.SentencePiece(vocab_size=600), TEXTS
  )
  assert tokenizer.vocab_size == 600
  text = 'def __init__(self, config: Bytes)'
  assert len(tokenizer.encode(text)) < 0.6 * len(text)


def test_number_of_sentinels():
  for config in (
    tokenizers.Bytes(num_sentinels=7),
    tokenizers.SentencePiece(num_sentinels=7, vocab_size=500),
  ):
    tokenizer = tokenizer_loading.train(config, TEXTS)
    assert tokenizer.sentinel_ids == tuple(range(5, 12))
    assert tokenizer.decode(tokenizer.encode('<extra_id_6>')) == '<extra_id_6>'


def test_vocabulary_larger_than_the_corpus_supports():
  config = tokenizers.SentencePiece(vocab_size=5000)
  with pytest.raises(
    ValueError, match=r'vocab_size=5000 .* which is (\d+)'
  ) as e:
    tokenizer_loading.train(config, TEXTS)
  largest = int(str(e.value).split('which is ')[1].split('.')[0])
  # The number in the message is the largest that works.
  tokenizer_loading.train(tokenizers.SentencePiece(vocab_size=largest), TEXTS)
  with pytest.raises(ValueError, match=f'which is {largest}'):
    tokenizer_loading.train(
      tokenizers.SentencePiece(vocab_size=largest + 1), TEXTS
    )


def test_vocabulary_smaller_than_the_alphabet():
  config = tokenizers.SentencePiece(vocab_size=370)
  with pytest.raises(
    ValueError, match=r'vocab_size=370 is too small .* least \d'
  ):
    tokenizer_loading.train(config, TEXTS)


@pytest.mark.parametrize(
  'text', ['\u2581' * 50, '\u2581\n\u2581', '\n\n', '\x00' * 9, '', None]
)
def test_text_that_nothing_can_be_fitted_to(text):
  texts = [] if text is None else [text] * 20
  for size in (362, 8192):
    with pytest.raises(
      ValueError, match=r'holds nothing that .* set data\.tokenizer=bytes\.$'
    ) as error:
      tokenizer_loading.train(tokenizers.SentencePiece(vocab_size=size), texts)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('text', ['aaab' * 99, '\u6211\u53bb' * 99, 'a\u2581b'])
def test_a_text_without_blanks_loses_none(text):
  """Their piece is there although the trainer has seen none."""
  tokenizer = tokenizer_loading.train(
    tokenizers.SentencePiece(vocab_size=364), [text]
  )
  for hard in (*HARD, text, ' ', 'a b'):
    assert tokenizer.decode(tokenizer.encode(hard)) == hard


def test_what_stands_for_a_space_inside_is_not_learned():
  texts = ['ab cd ' + '\u2581' * 6 + ' '] * 50
  config = tokenizers.SentencePiece(vocab_size=368)
  pieces = tokenizer_loading.train(config, texts).pieces()
  assert '\u2581' in pieces and not [p for p in pieces if '\u2581' * 3 in p]


def test_bad_settings():
  with pytest.raises(
    ValueError, match=r'data\.tokenizer\.vocab_size=300 must be more than 361'
  ):
    tokenizers.SentencePiece(vocab_size=300)
  with pytest.raises(
    ValueError, match=r'data\.tokenizer\.num_sentinels=-1; it is 0'
  ):
    tokenizers.Bytes(num_sentinels=-1)


def test_nothing_to_load(tmp_path):
  with pytest.raises(ValueError, match='No tokenizer in .* that of a run'):
    tokenizer_loading.load(tmp_path)

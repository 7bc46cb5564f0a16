"""Streams: joined, their pieces are the text, wherever characters are cut."""

import hf_files
import pytest

from t2x import streaming
from t2x.data import tokenizers

TEXTS = [
  'The quick brown fox.',
  'déjà vu — 漢字 🙂🙂 ok',
  '  two  spaces\nand lines\n',
  '🙂',
  'a',
]


@pytest.fixture(scope='module')
def kinds(tmp_path_factory):
  root = tmp_path_factory.mktemp('tokenizers')
  read = lambda name: tokenizers.read(
    tokenizers.Pretrained(directory=str(hf_files.MAKERS[name](root / name)))
  )
  return {
    'bytes': tokenizers.BytesTokenizer(tokenizers.Bytes()),
    'own': tokenizers.train(
      tokenizers.SentencePiece(vocab_size=500), hf_files.TEXTS
    ),
    'gpt2': read('gpt2'),
    'llama': read('llama'),
  }


def test_a_prompt_that_ends_within_a_character(kinds):
  """The character is told with its end, and nothing after it is lost."""
  tokenizer = kinds['bytes']
  ids = tokenizer.encode('a\u6f22b')
  for cut in (2, 3):
    stream = streaming.TextStream(tokenizer, ids[:cut])
    text = ''.join(stream.add([i]) for i in ids[cut:]) + stream.finish()
    assert text == '\u6f22b'


@pytest.mark.parametrize('kind', ['bytes', 'own', 'gpt2', 'llama'])
@pytest.mark.parametrize('size', [1, 3])
def test_pieces_join_to_the_text(kinds, kind, size):
  tokenizer = kinds[kind]
  for before in ([], tokenizer.encode('Before it')):
    for text in TEXTS:
      ids = tokenizer.encode(text)
      stream = streaming.TextStream(tokenizer, before)
      pieces = [stream.add(ids[i : i + size]) for i in range(0, len(ids), size)]
      pieces.append(stream.finish())
      whole = tokenizer.decode([*before, *ids])
      assert ''.join(pieces) == whole[len(tokenizer.decode(before)) :]
      assert not any('\ufffd' in piece for piece in pieces[:-1])
  assert len([piece for piece in pieces if piece]) >= 1


def test_half_a_character_waits_for_the_rest(kinds):
  tokenizer = kinds['bytes']
  stream = streaming.TextStream(tokenizer)
  assert [stream.add([i]) for i in tokenizer.encode('🙂')] == ['', '', '', '🙂']
  assert stream.add(tokenizer.encode('é')[:1]) == ''
  assert stream.finish() == '\ufffd'


def test_stop_strings_never_show(kinds):
  tokenizer = kinds['bytes']
  cases = [
    ('one two three', ['two'], 'one '),
    ('aab', ['ab'], 'a'),
    ('x\n\ny', ['\n\n', 'y'], 'x'),
    ('x\ny', ['\n\n'], 'x\ny'),
    ('ends with the', ['then'], 'ends with the'),
    ('aaab', ['aab', 'b'], 'a'),
  ]
  for text, stop, want in cases:
    stream = streaming.TextStream(tokenizer, stop=stop)
    got = []
    for i in tokenizer.encode(text):
      got.append(stream.add([i]))
      assert want.startswith(''.join(got)), 'Nothing is taken back.'
    got.append(stream.finish())
    assert ''.join(got) == want
    assert stream.stopped == (want != text)
    assert stream.add(tokenizer.encode('more')) == '' or not stream.stopped
  with pytest.raises(ValueError, match="stop holds ''"):
    streaming.TextStream(tokenizer, stop=[''])

"""Streams: joined, their pieces are the text, wherever characters are cut."""

import json
import os
import random

import extras
import hf_files
import pytest

from t2x.data import tokenizer_loading
from t2x.data import tokenizers
from t2x.inference import text_stream

TEXTS = [
  'The quick brown fox.',
  'déjà vu — 漢字 🙂🙂 ok',
  '  two  spaces\nand lines\n',
  '🙂',
  'a',
]


PIECES = (
  '\u2581', '\u2581\u2581', '\u2581say', '\u2581hello', 'hello', 'world',
  '\u2581world', '漢', '.', '\u2581.', "n't", '\n', 'é', '\ufffd',
)  # fmt: skip
KINDS = (
  'bytes', 'own', 'bert', 'gpt2', 'roberta', 't5', 'llama', 'fallback',
  'metaspace',
)  # fmt: skip


def byte_fallback(directory, is_metaspace=False):
  """Writes a tokenizer.json as Llama's: of a broken run, no byte is text."""
  import tokenizers as library

  decoders = library.decoders
  special = ('<unk>', '<s>', '</s>')
  names = (*special, *(f'<0x{b:02X}>' for b in range(256)), *PIECES)
  model = library.models.BPE(
    vocab={name: i for i, name in enumerate(names)},
    merges=[],
    unk_token='<unk>',
    byte_fallback=True,
  )
  made = library.Tokenizer(model)
  made.add_special_tokens(list(special))
  made.add_tokens([library.AddedToken('<plain>', special=False)])
  if is_metaspace:
    made.pre_tokenizer = library.pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
      [decoders.ByteFallback(), decoders.Metaspace()]
    )
  else:
    made.pre_tokenizer = library.pre_tokenizers.Metaspace(split=False)
    made.decoder = decoders.Sequence(
      [
        decoders.Replace('\u2581', ' '),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(' ', 1, 0),
      ]
    )
  directory.mkdir()
  made.save(str(directory / 'tokenizer.json'))
  roles = dict(zip(('unk_token', 'bos_token', 'eos_token'), special))
  roles |= {'tokenizer_class': 'PreTrainedTokenizerFast'}
  (directory / 'tokenizer_config.json').write_text(json.dumps(roles))
  return directory


MAKERS = hf_files.MAKERS | {
  'fallback': byte_fallback,
  'metaspace': lambda directory: byte_fallback(directory, True),
}


@pytest.fixture(scope='module')
def kinds(tmp_path_factory):
  root = tmp_path_factory.mktemp('tokenizers')
  read = lambda name: tokenizer_loading.read(
    tokenizers.Pretrained(directory=str(MAKERS[name](root / name)))
  )
  return {
    'bytes': tokenizers.BytesTokenizer(tokenizers.Bytes(num_sentinels=3)),
    'own': tokenizer_loading.train(
      tokenizers.SentencePiece(vocab_size=500), hf_files.TEXTS
    ),
  } | {name: read(name) for name in KINDS[2:]}


class Draws:
  """Tokens of every kind at random: special, out of range, broken bytes."""

  def __init__(self, tokenizer, seed):
    self.rng = random.Random(seed)
    size = tokenizer.vocab_size
    pieces = tokenizer.token_bytes()
    spaces = [i for i in range(size) if pieces[i].startswith(b' ')]
    bytes_ = [i for i in range(size) if pieces[i][1:] == b'' < pieces[i]]
    high = [i for i in bytes_ if pieces[i][0] > 127]
    special = [i for i in range(size) if not tokenizer.shown([i])]
    encoded = [
      tokenizer.encode(text) for text in ('漢字', '🙂', ' say', 'a\ufffd b')
    ]
    self._choices = [
      *([i] for found in (spaces, high, special) for i in found[:1]),
      *([-1], [size], [10**6]),
      *encoded,
    ]
    self._pools = [p for p in (range(size), spaces, high, special) if p]

  def ids(self, most):
    found = []
    for _ in range(self.rng.randrange(most + 1)):
      pool = self.rng.choice([*self._pools, None])
      found += (
        self.rng.choice(self._choices) if pool is None else
        [self.rng.choice(pool)]
      )  # fmt: skip
    return found

  def stops(self, text):
    found = [self.rng.choice([' ', 'he', '\ufffd', ' w', 'ab'])]
    for _ in range(2):
      start = self.rng.randrange(len(text) + 1)
      found.append(text[start : start + self.rng.choice([1, 2, 4])])
    return [s for s in found if s][: self.rng.randrange(4)]


def cut_naively(text, stops):
  """Returns the text before the stop string that is whole first."""
  for end in range(1, len(text) + 1):
    found = [stop for stop in stops if text[:end].endswith(stop)]
    if found:
      return text[: end - max(map(len, found))]
  return text


def places_naively(tokenizer, before, ids, text):
  """Returns how much of the text the tokens before each one have."""
  whole = tokenizer.decode([*before, *ids])
  alike = lambda ids: len(os.path.commonprefix([tokenizer.decode(ids), whole]))
  starts = [alike([*before, *ids[:i]]) - alike(before) for i in range(len(ids))]
  return [min(max([0, *starts[: i + 1]]), len(text)) for i in range(len(ids))]


@pytest.mark.parametrize('kind', KINDS)
def test_any_tokens_join_to_the_whole(kinds, kind):
  """However they are cut, with a prompt and stop strings; places as well."""
  tokenizer = kinds[kind]
  draws = Draws(tokenizer, seed=KINDS.index(kind))
  for case in range(60):
    before, ids = draws.ids(8), draws.ids(12)
    whole = text_stream.continuation(tokenizer, before, ids)
    stops = draws.stops(whole)
    stream = text_stream.TextStream(tokenizer, before, stops)
    parts, left = [], ids
    while left:
      size = draws.rng.choice([1, 1, 2, 5])
      parts.append(stream.add(left[:size]))
      left = left[size:]
    text = ''.join(parts) + stream.finish()
    assert text == cut_naively(whole, stops), (case, before, ids, stops)
    assert text == text_stream.cut(whole, stops)
    found = [stream.place(number) for number in range(len(ids))]
    known = places_naively(tokenizer, before, ids, text)
    if stream.stopped:  # Tokens after a stop string are not looked at.
      found = [place for place in found if place is not None]
      known = known[: len(found)]
    assert found == known, (case, before, ids, stops)


@pytest.mark.parametrize('kind', KINDS)
def test_a_text_that_begins_with_its_prompt(kinds, kind):
  """Of a prompt in tokens, all of it is told as one text, with places."""
  tokenizer = kinds[kind]
  draws = Draws(tokenizer, seed=KINDS.index(kind))
  for _ in range(30):
    prompt, ids = draws.ids(8), draws.ids(6)
    stream = text_stream.TextStream(tokenizer)
    text = stream.echo(prompt) + stream.add(ids) + stream.finish()
    assert text == tokenizer.decode([*prompt, *ids])
    found = [stream.place(i) for i in range(len(prompt + ids))]
    assert found == places_naively(tokenizer, [], prompt + ids, text)
  stream = text_stream.TextStream(tokenizer, stop=['a'])
  prompt, ids = tokenizer.encode('say a'), tokenizer.encode(' b a')
  text = stream.echo(prompt) + stream.add(ids) + stream.finish()
  start = tokenizer.decode(prompt)
  assert text.startswith(start) and text[len(start) :].strip() == 'b'
  assert stream.stopped


@pytest.mark.reference
@pytest.mark.parametrize('kind', [k for k in KINDS[2:] if k != 'llama'])
def test_texts_are_those_of_transformers(kinds, kind):
  """But of sentencepiece's own files with bytes, where its text stands."""
  transformers = extras.need('transformers', extra='reference')
  classes = {
    'bert': 'BertTokenizer', 'gpt2': 'GPT2Tokenizer', 't5': 'T5Tokenizer',
    'roberta': 'RobertaTokenizer',
  }  # fmt: skip
  made = getattr(transformers, classes.get(kind, 'AutoTokenizer'))
  tokenizer = kinds[kind]
  other = made.from_pretrained(str(tokenizer.root))
  draws = Draws(tokenizer, seed=1)
  for _ in range(60):
    ids = [i for i in draws.ids(10) if 0 <= i < tokenizer.vocab_size]
    expected = other.decode(
      ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    found = tokenizer.decode(ids)
    if kind == 't5':  # sentencepiece drops all spaces at the start, not one.
      found, expected = found.lstrip(' '), expected.lstrip(' ')
    assert found == expected, ids


def test_a_blank_after_a_special_token_stays(kinds):
  for kind in ('llama', 't5', 'fallback', 'metaspace'):
    tokenizer = kinds[kind]
    ids = tokenizer.encode('say hello')
    more = tokenizer.encode('world')
    stream = text_stream.TextStream(tokenizer)
    pieces = [stream.add([i]) for i in [*ids, tokenizer.eos_id, *more]]
    assert ''.join(pieces) + stream.finish() == 'say hello world'


def test_a_blank_after_a_sentinel_stays(kinds):
  """As transformers' T5 writes it."""
  tokenizer = kinds['t5']
  ids = tokenizer.encode_marked('one<extra_id_3> two <extra_id_0>')
  assert tokenizer.decode_marked(ids) == 'one<extra_id_3> two<extra_id_0>'


def test_places_of_a_text_that_the_tokenizer_changes(kinds):
  """Case, accents and spaces that are lost: still in order, and near."""
  tokenizer = kinds['bert']
  text = 'The  Quick, quick fox'
  ids = tokenizer.encode(text)
  found = text_stream.places(tokenizer, ids, text)
  assert found == sorted(found) and 0 <= found[0] and found[-1] < len(text)
  ends = [*found[1:], len(text)]
  parts = [text[start:end].lower() for start, end in zip(found, ends)]
  assert ''.join(parts) == text.lower()
  assert all(
    part.strip().encode() == tokenizer.token_bytes()[i].strip()
    for part, i in zip(parts, ids)
  )


def test_a_prompt_that_ends_within_a_character(kinds):
  """The character is told with its end, and nothing after it is lost."""
  tokenizer = kinds['bytes']
  ids = tokenizer.encode('a\u6f22b')
  for cut in (2, 3):
    stream = text_stream.TextStream(tokenizer, ids[:cut])
    text = ''.join(stream.add([i]) for i in ids[cut:]) + stream.finish()
    assert text == '\u6f22b'


@pytest.mark.parametrize('kind', ['bytes', 'own', 'gpt2', 'llama'])
@pytest.mark.parametrize('size', [1, 3])
def test_pieces_join_to_the_text(kinds, kind, size):
  tokenizer = kinds[kind]
  for before in ([], tokenizer.encode('Before it')):
    for text in TEXTS:
      ids = tokenizer.encode(text)
      stream = text_stream.TextStream(tokenizer, before)
      pieces = [stream.add(ids[i : i + size]) for i in range(0, len(ids), size)]
      pieces.append(stream.finish())
      whole = tokenizer.decode([*before, *ids])
      assert ''.join(pieces) == whole[len(tokenizer.decode(before)) :]
      assert not any('\ufffd' in piece for piece in pieces[:-1])
  assert len([piece for piece in pieces if piece]) >= 1


def test_half_a_character_waits_for_the_rest(kinds):
  tokenizer = kinds['bytes']
  stream = text_stream.TextStream(tokenizer)
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
    stream = text_stream.TextStream(tokenizer, stop=stop)
    got = []
    for i in tokenizer.encode(text):
      got.append(stream.add([i]))
      assert want.startswith(''.join(got)), 'Nothing is taken back.'
    got.append(stream.finish())
    assert ''.join(got) == want
    assert stream.stopped == (want != text)
    assert stream.add(tokenizer.encode('more')) == '' or not stream.stopped
  with pytest.raises(ValueError, match="stop holds ''"):
    text_stream.TextStream(tokenizer, stop=[''])

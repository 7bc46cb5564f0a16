"""Texts that are held to something: each of them meets it."""

import functools
import json
import re

from flax import nnx
import hf_files
import jsonschema
import numpy as np
import pytest
import tiny

from t2x.data import tokenizer_loading
from t2x.data import tokenizers
from t2x.decode import constrained
from t2x.inference import constraints
from t2x.inference import generation
from t2x.inference import keyword_constraints
from t2x.inference import trained_model
from t2x.models import encoder_decoder
from t2x.models import model as model_lib
from t2x.parallel import mesh as mesh_lib

SAMPLING = generation.Sampling()
SCHEMA = {
  'type': 'object',
  'properties': {
    'name': {'type': 'string', 'maxLength': 4},
    'kinds': {'type': 'array', 'items': {'enum': ['a', 'b']}, 'maxItems': 2},
    'is_new': {'type': 'boolean'},
  },
  'required': ['name', 'is_new'],
  'additionalProperties': False,
}


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A model that was not trained: it would write anything."""
  config = tiny.experiment_of(tmp_path_factory.mktemp('run'), data__length=64)
  return trained_model.Trained(
    config=config,
    model=model_lib.make(config.model, rngs=nnx.Rngs(0)),
    tokenizer=tokenizers.BytesTokenizer(config.data.tokenizer),
    step=0,
    mesh=mesh_lib.make(
      mesh_lib.MeshConfig(data=1), [__import__('jax').devices()[0]]
    ),
    labels={},
  )


@pytest.fixture(scope='module')
def controls(trained):
  return constraints.ConstraintFactory(trained)


def write(trained, made, num_tokens=50, num=6, **options):
  return generation.generate_text(
    trained, ['the run'] * num, num_tokens=num_tokens, control=made, **options
  )


@pytest.mark.parametrize(
  'pattern',
  [
    '[0-9]{4}-[0-9]{2}',
    '(yes|no|perhaps)',
    'a?b{2,3}[^a-z]',
    '(é|漢|🙂){2}',
    '"([^"\\\\]|\\\\.){0,5}"',
  ],
)
def test_a_regular_expression(trained, controls, pattern):
  made = controls.make(num_tokens=50, regex=pattern)
  texts = write(trained, made)
  assert all(re.fullmatch(pattern, text) for text in texts)
  assert len(set(texts)) > 1
  assert texts == write(trained, made)  # The control given is not used up.


def test_a_json_schema(trained, controls):
  made = controls.make(num_tokens=56, json_schema=SCHEMA)
  for text in write(trained, made, num_tokens=56):
    jsonschema.validate(json.loads(text), SCHEMA)


def test_a_grammar(trained, controls):
  made = controls.make(
    num_tokens=50,
    grammar="""
      start: "let " name "=" sum
      sum: num | num "+" sum
      name: /[a-z]/
      num: /[0-9]/
    """,
  )
  for text in write(trained, made):
    assert re.match(r'let [a-z]=\d(\+\d)*', text)


def test_a_text_that_is_cut_is_the_beginning_of_one(trained, controls):
  made = controls.make(num_tokens=5, regex='[a-z]{9}')
  assert all(re.fullmatch('[a-z]{5}', text) for text in write(trained, made, 5))


def test_every_prompt_is_drawn_as_it_asks(trained, controls):
  made = controls.make(num_tokens=8, regex='[0-9]{6}')
  settings = [generation.Sampling(temperature=0), SAMPLING]
  found = generation.generation(
    trained,
    ['the run', 'a'],
    num_tokens=8,
    control=made,
    sampling=settings,
    seed=3,
  )
  assert found.ended == [True, True]
  assert [len(row) for row in found.log_probs] == [6, 6]
  common = {'num_tokens': 8, 'control': made, 'seed': 3}
  greedy = generation.generation(
    trained, ['the run'], sampling=settings[0], **common
  )
  assert found.tokens[0] == greedy.tokens[0]
  np.testing.assert_allclose(found.log_probs[0], greedy.log_probs[0], atol=1e-5)
  other = generation.generation(trained, ['', 'a'], sampling=SAMPLING, **common)
  assert found.tokens[1] == other.tokens[1]
  cut = generation.generation(trained, ['a'], **common | {'num_tokens': 3})
  assert cut.ended == [False]


def test_messages(trained, controls):
  made = controls.make(num_tokens=8, regex='[0-9]+')
  write = functools.partial(generation.generate_text, trained, control=made)
  with pytest.raises(ValueError, match='ignore_end: a text that is held to a'):
    write(['a'], num_tokens=4, ignore_end=True)
  with pytest.raises(ValueError, match='Prompt 1 has 100 tokens'):
    write(['a', 'b' * 99], num_tokens=4)
  with pytest.raises(ValueError, match='2 settings and there are 1 prompts'):
    write(['a'], num_tokens=4, sampling=[SAMPLING] * 2)
  config = encoder_decoder.EncoderDecoderConfig(vocab_size=9)
  answers = encoder_decoder.EncoderDecoder(config, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='EncoderDecoder cannot be held to a ru'):
    constrained.generate(answers, [[3]], num_tokens=4, control=made)


@pytest.mark.parametrize('name', sorted(hf_files.MAKERS))
def test_tokenizers_of_others(name, tmp_path):
  """What each token adds to a text is what their own decoding says."""
  directory = str(hf_files.MAKERS[name](tmp_path / name))
  tokenizer = tokenizer_loading.read(tokenizers.Pretrained(directory=directory))
  pieces = tokenizer.token_bytes()
  assert len(pieces) == tokenizer.vocab_size
  text = 'the quick brown fox'
  ids = tokenizer.encode(text)
  joined = b''.join(pieces[i] for i in ids).decode()
  assert joined.strip() == tokenizer.decode(ids).strip()
  rule = constraints.RuleCompiler(tokenizer, tokenizer.vocab_size).regex(
    '[ ]?the.*'
  )
  for token in ids[:4]:
    assert rule.allows(token)
    rule.advance(token)


def test_what_cannot_be_met_is_refused(controls):
  wrong = [
    ({'regex': '(a'}, 'regular expression .* cannot be followed'),
    ({'regex': r'[^\x00-\U0010FFFF]'}, 'no text of this vocabulary'),
    ({'grammar': 'start: nothing'}, 'grammar cannot be followed'),
    ({'json_schema': '{"type":'}, 'JSON schema cannot be read'),
    ({'json_schema': {'type': 'number', 'minimum': 3, 'maximum': 1}}, 'Unsat'),
    ({'regex': 'a', 'keywords': ['b']}, 'one rule'),
    ({'keywords': ['a' * 30]}, '31 tokens, and the text may have 20'),
    ({'keywords': ['']}, 'is empty'),
  ]
  for given, message in wrong:
    with pytest.raises(ValueError, match=message):
      controls.make(num_tokens=20, **given)


def test_letters_that_no_token_has():
  """A vocabulary without a byte for everything: said where it is met."""

  class Letters(tokenizers.BytesTokenizer):
    def token_bytes(self):
      return [p if p in b'ab' and p else b'' for p in super().token_bytes()]

  tokenizer = Letters(tokenizers.Bytes())
  rules = constraints.RuleCompiler(tokenizer, tokenizer.vocab_size)
  with pytest.raises(ValueError, match='cannot be'):
    rules.regex('c')
  rule = rules.regex('ac')
  rule.advance(tokenizer.encode('a')[0])
  with pytest.raises(ValueError, match='cannot be'):
    rule.allowed()


def test_a_rule_that_breaks_ends_its_text_alone(trained):
  """With the reason; the others are written on."""

  class Broken(keyword_constraints.Keywords):
    def advance(self, token):
      raise ValueError('nothing goes on from here')

  own = dict(num_tokens=9, vocab_size=384, ends=(1,))
  made = Broken([[(5,)]], **own)
  made.copy = lambda: made
  with pytest.raises(ValueError, match='nothing goes on'):
    write(trained, made, num=1)


# Keywords.


def bits(made):
  return np.unpackbits(made.allowed().view(np.uint8), bitorder='little')


@pytest.mark.parametrize('seed', range(30))
def test_keywords_are_there_whatever_is_drawn(seed):
  """Random words that overlap, just enough tokens, and the worst of luck."""
  rng = np.random.default_rng(seed)
  vocab_size, ends = 6, (0,)
  words = [
    [
      tuple(rng.integers(1, 4, rng.integers(1, 4)).tolist())
      for _ in range(rng.integers(1, 3))
    ]
    for _ in range(rng.integers(1, 4))
  ]
  least = sum(min(map(len, word)) for word in words)
  num_tokens = least + int(rng.integers(0, 4))
  made = keyword_constraints.Keywords(
    words, num_tokens=num_tokens, vocab_size=vocab_size, ends=ends
  )
  text = []
  while len(text) < num_tokens:
    allowed = np.flatnonzero(bits(made)[:vocab_size])
    assert len(allowed)
    assert set(made.raised()) <= set(range(vocab_size))
    # A model that would rather write something else.
    other = [t for t in allowed if t == 5]
    token = int(rng.choice(other if other and rng.random() < 0.7 else allowed))
    if token in ends:
      break
    text.append(token)
    made.advance(token)
  has = lambda form: any(
    tuple(text[i : i + len(form)]) == form for i in range(len(text))
  )
  assert not made.missing
  assert all(any(has(form) for form in word) for word in words)


def test_keywords_in_texts_of_a_model(trained, controls):
  words = ['zebra', 'ox']
  made = controls.make(num_tokens=24, keywords=words)
  texts = write(trained, made, num_tokens=24)
  # Whole words, at least where they begin.
  assert all(f' {word}' in text for text in texts for word in words)
  # Raised enough, they come before they must.
  where = [max(text.index(word) for word in words) for text in texts]
  assert min(where) < 24 - len(' zebra')


def test_what_is_raised_grows(controls):
  made = controls.make(num_tokens=24, keywords=['zebra'])
  (z,) = made.raised()  # The space before it.
  early = made.raised()[z]
  for _ in range(12):
    made.advance(7)
  assert made.raised()[z] > early > 0

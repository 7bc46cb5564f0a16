"""Banned words and keywords in texts of runs: of every kind of tokenizer.

Each is compared with a plain search in what is printed.
"""

import dataclasses

from flax import nnx
import hf_files
import jax
import numpy as np
import pytest
import tiny

from t2x.data import tokenizer_loading
from t2x.data import tokenizers
from t2x.decode import beams
from t2x.inference import constraints
from t2x.inference import generation
from t2x.inference import trained_model
from t2x.models import decoder
from t2x.models import encoder_decoder
from t2x.parallel import mesh as mesh_lib

PROMPTS = ['the quick', 'a b"', 'the run\n', 'no st'] * 4
NUM_TOKENS = 14
NAMES = ['bytes', *sorted(hf_files.MAKERS)]


def tokenizer_of(name, directory):
  if name == 'bytes':
    return tokenizers.BytesTokenizer(tokenizers.Bytes(num_sentinels=4))
  files = str(hf_files.MAKERS[name](directory / name))
  return tokenizer_loading.read(tokenizers.Pretrained(directory=files))


def make(name, directory, answers=False) -> trained_model.Trained:
  """A model that was not trained: it would write anything."""
  base = tiny.experiment_of(directory, data__length=64)
  tokenizer = tokenizer_of(name, directory)
  kind = decoder.DecoderConfig
  if answers:
    kind = encoder_decoder.EncoderDecoderConfig
  size = {'num_layers': 1, 'embed_dim': 8}
  config = kind(vocab_size=tokenizer.vocab_size, **size)
  return trained_model.Trained(
    config=dataclasses.replace(base, model=config),
    model=_model(config),
    tokenizer=tokenizer,
    step=0,
    mesh=mesh_lib.make(mesh_lib.MeshConfig(data=1), jax.devices()[:1]),
    labels={},
  )


def _model(config):
  if isinstance(config, decoder.DecoderConfig):
    return decoder.Decoder(config, rngs=nnx.Rngs(0))
  return encoder_decoder.EncoderDecoder(config, rngs=nnx.Rngs(0))


def draw_words(rng, texts, num):
  """Parts of texts that are written without a ban."""
  words = []
  while len(words) < num:
    text = texts[int(rng.integers(len(texts)))].replace('\ufffd', '')
    start, size = int(rng.integers(max(len(text), 1))), int(rng.integers(1, 4))
    words += [text[start : start + size]] if text[start : start + size] else []
  return words


@pytest.mark.parametrize('name', NAMES)
def test_what_is_banned_is_in_no_text(name, tmp_path):
  trained = make(name, tmp_path)
  rng = np.random.default_rng(0)
  common = {'num_tokens': NUM_TOKENS, 'ignore_end': True}
  plain = generation.generate_text(trained, PROMPTS, **common)
  hit = 0
  for seed in range(3):
    words = draw_words(rng, plain, 6)
    banned = trained.banned(words)
    texts = generation.generate_text(
      trained, PROMPTS, seed=seed, **common,
      sampling=generation.Sampling(banned_words=banned),
    )  # fmt: skip
    for prompt, text in zip(PROMPTS, texts):
      assert not [word for word in words if word in text], (words, text)
      # Nor do the prompt's end and a text's beginning make one.
      spans = range(1, max(map(len, words)))
      edges = [prompt[-n:] + text[: max(map(len, words)) - n] for n in spans]
      assert not [
        (w, e) for w in words for n, e in zip(spans, edges)
        if w in e and w not in prompt[-n:]
      ]  # fmt: skip
    hit += sum(any(word in text for word in words) for text in plain)
  assert hit > 5


@pytest.mark.parametrize('name', ['bytes', 't5'])
def test_answers_and_their_sentinels(name, tmp_path):
  trained = make(name, tmp_path, answers=True)
  sentinels = [*trained.tokenizer.sentinel_ids]
  bias = dict.fromkeys(sentinels, 6.0)  # So that they are written.
  write = lambda **more: generation.generate_text(
    trained, PROMPTS, num_tokens=NUM_TOKENS, ignore_end=True,
    sampling=generation.Sampling(bias=bias, **more),
  )  # fmt: skip
  assert any('id_1' in text for text in write())
  texts = write(banned_words=trained.banned(['id_1', '><', 'e']))
  assert any('extra' in text for text in write()) and not any(
    word in text for text in texts for word in ('id_1', '><', 'e')
  )


def test_words_in_texts_and_searches(tmp_path):
  """Keywords with bans beside them, drawn and searched for."""
  trained = make('bytes', tmp_path)
  words, banned = ['ox', 'zebra'], trained.banned(['q', 'xx', 'a"', '\n'])
  sampling = generation.Sampling(banned_words=banned)
  made = constraints.ConstraintFactory(trained).make(
    num_tokens=30, keywords=words
  )
  texts = generation.generate_text(
    trained, PROMPTS, num_tokens=30, control=made, sampling=sampling
  )
  found = generation.search_text(
    trained, PROMPTS[:2], num_tokens=24, keywords=words, sampling=sampling,
    beams=beams.BeamConfig(num_beams=4), num_best=2,
  )  # fmt: skip
  for text in [*texts, *(text for best in found for text, _ in best)]:
    assert all(f' {word}' in f' {text}' for word in words)
    assert not any(word in text for word in ('q', 'xx', 'a"', '\n'))

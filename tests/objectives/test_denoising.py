"""BART's noise and UL2's denoisers, by counts and by putting texts together."""

import dataclasses
import math

import numpy as np
import pytest

from t2x.objectives import denoising
from t2x.objectives import lexicon as lexicon_lib
from t2x.objectives import noise
from t2x.objectives import rows as rows_lib
from t2x.objectives import span_corruption
from t2x.objectives import ul2
from t2x.objectives import vocab as vocab_lib

V, FIRST, LENGTH, ROWS = 1000, 105, 128, 200
EVERY = np.zeros(V, bool)
ENDS = np.arange(V) == 999  # The full stop.
VOCAB = vocab_lib.Vocab(
  size=V,
  lexicon=lexicon_lib.Lexicon(
    begins_V=~EVERY, breaks_V=EVERY, ends_V=ENDS, counts_V=np.ones(V)
  ),
)
NOTHING = denoising.Denoising(permute=False, infill=0.0)


def source(stop=False):
  """Rows of two documents of 60 and 40 tokens, with starts and ends."""
  rng = np.random.default_rng(0)
  text = lambda n: rng.permutation(np.arange(FIRST, 999))[:n]
  rows = [np.r_[3, text(60), 1, 3, text(40), 1] for _ in range(ROWS)]
  tokens = np.array(rows, np.int32)
  if stop:
    tokens[:, 10:60:10] = 999
  segments = np.repeat([1, 2], [62, 42])
  return rows_lib.Rows(tokens, np.tile(segments, (ROWS, 1)).astype(np.int32))


def documents(config, stop=False, seed=0):
  """Yields text, encoder's and decoder's ids, ends left out."""
  raw = source(stop)
  keys = noise.keys(seed, np.arange(ROWS))
  batch = config.examples(raw, keys=keys, vocab=VOCAB, length=LENGTH)
  for row in range(ROWS):
    for segment in (1, 2):
      text = raw.tokens[row][raw.segments[row] == segment][1:-1]
      encoder = batch['encoder_inputs'][row]
      encoder = encoder[batch['encoder_segments'][row] == segment]
      decoder = batch['targets'][row][batch['segments'][row] == segment]
      assert encoder[-1] == decoder[-1] == vocab_lib.EOS
      yield text.tolist(), encoder[:-1].tolist(), decoder[:-1].tolist()


def test_the_decoder_has_the_text_and_the_encoder_without_noise_too():
  for text, encoder, decoder in documents(NOTHING):
    assert text == encoder == decoder
  for text, _, decoder in documents(denoising.Denoising()):
    assert text == decoder


def sentences(ids):
  """Splits after full stops."""
  cuts = [i + 1 for i, token in enumerate(ids[:-1]) if token == 999]
  return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)])]


def test_sentences_are_permuted():
  config = dataclasses.replace(NOTHING, permute=True)
  firsts = []
  for text, encoder, _ in documents(config, stop=True):
    parts = sentences(text)
    if len(parts) < 3:
      continue
    # Some order of whole sentences, the last of which has no full stop.
    first = next(p for p in parts if encoder[: len(p)] == p)
    rest = list(parts)
    rest.remove(first)
    left = encoder[len(first) :]
    while rest:
      found = next(p for p in rest if left[: len(p)] == p)
      rest.remove(found)
      left = left[len(found) :]
    assert not left
    firsts.append(parts.index(first))
  counts = np.bincount(firsts, minlength=6)
  want = len(firsts) / 6
  assert (abs(counts - want) < 4 * math.sqrt(want)).all()


@pytest.mark.parametrize('chance', [0.0, 0.4, 1.0])
def test_documents_are_rotated(chance):
  config = dataclasses.replace(NOTHING, rotate=chance)
  moved = []
  for text, encoder, _ in documents(config):
    place = text.index(encoder[0])
    assert encoder == text[place:] + text[:place]
    moved.append(place > 0)
  want = chance * (1 - 1 / 50)
  spread = math.sqrt(0.25 / len(moved))
  assert np.mean(moved) == pytest.approx(want, abs=4 * spread)


@pytest.mark.parametrize('name', ['mask', 'delete'])
def test_tokens_are_masked_or_left_out(name):
  config = dataclasses.replace(NOTHING, **{name: 0.3})
  num = lost = 0
  for text, encoder, _ in documents(config):
    kept = [t for t in encoder if t != vocab_lib.MASK]
    assert kept == [t for t in text if t in set(kept)]
    assert len(encoder) == (len(text) if name == 'mask' else len(kept))
    num, lost = num + len(text), lost + len(text) - len(kept)
  assert lost / num == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / num))


def test_runs_of_poisson_lengths_become_one_mask():
  config = dataclasses.replace(NOTHING, infill=0.3)
  lost = masks = num = 0
  for text, encoder, _ in documents(config):
    assert len(encoder) <= len(text)
    kept = [t for t in encoder if t != vocab_lib.MASK]
    assert kept == [t for t in text if t in set(kept)]
    assert len(text) - len(kept) == round(0.3 * len(text))
    lost, num = lost + len(text) - len(kept), num + 1
    masks += len(encoder) - len(kept)
  # Lengths have the mean 3; the last of a document's 15 tokens is cut.
  assert 2.4 < lost / masks < 3.05


# --- UL2. ---


def restored(encoder, decoder):
  """Puts each dropped span where its sentinel stands."""
  spans, name = {}, None
  for token in decoder:
    if token in VOCAB.sentinel_ids:
      spans[name := token] = []
    else:
      spans[name].append(token)
  text = []
  for token in encoder:
    text += spans.pop(token) if token in VOCAB.sentinel_ids else [token]
  assert not spans
  return text


def test_both_sides_are_the_text_and_modes_come_by_their_weights():
  counts = dict.fromkeys(ul2.MODES, 0)
  shares = {}
  for text, encoder, decoder in documents(ul2.UL2()):
    mode = ul2.MODES[VOCAB.sentinel_ids[::-1].index(encoder[0])]
    assert restored(encoder[1:], decoder) == text
    counts[mode] += 1
    dropped = [t for t in decoder if t not in VOCAB.sentinel_ids]
    shares.setdefault(mode, []).append(len(dropped) / len(text))
  total = sum(counts.values())
  for mode, want in (('R', 2 / 7), ('S', 1 / 7), ('X', 4 / 7)):
    spread = math.sqrt(want * (1 - want) / total)
    assert counts[mode] / total == pytest.approx(want, abs=4 * spread)
  assert np.ptp(shares['R']) < 0.03
  assert np.mean(shares['S']) == pytest.approx(0.25, abs=0.08)
  assert max(shares['X']) == pytest.approx(0.5, abs=0.02)


def test_one_regular_denoiser_is_span_corruption():
  config = ul2.UL2(denoisers=(ul2.Denoiser(),))
  plain = span_corruption.SpanCorruption()
  dropped = lambda own: np.mean(
    [
      sum(t not in VOCAB.sentinel_ids for t in decoder)
      for _, _, decoder in documents(own)
    ]
  )
  assert dropped(config) == dropped(plain)


def test_sequential_alone_is_a_prefix_language_model():
  config = ul2.UL2(denoisers=(ul2.Denoiser(mode='S', rate=0.5),))
  cuts = []
  for text, encoder, decoder in documents(config):
    prefix, suffix = encoder[1:-1], decoder[1:]
    assert encoder[-1] == decoder[0] == VOCAB.sentinel_ids[0]
    assert prefix + suffix == text and suffix
    cuts.append(len(suffix) / len(text))
  assert np.mean(cuts) == pytest.approx(0.5, abs=0.06)
  assert min(cuts) < 0.1 and max(cuts) > 0.9


def test_settings_out_of_range():
  with pytest.raises(ValueError, match='infill=1.5; it is a share'):
    denoising.Denoising(infill=1.5)
  with pytest.raises(ValueError, match='mean_span=0; it is above 0'):
    denoising.Denoising(mean_span=0)
  with pytest.raises(ValueError, match='rate=0.6 of mode S; it is at most 0.5'):
    ul2.Denoiser(mode='S', rate=0.6)
  with pytest.raises(ValueError, match='denoisers is empty'):
    ul2.UL2(denoisers=())

"""Text from a model, one prompt a row: drawn, or by beam search.

Rows are padded on the right and each writes at its own index, so a row stands
at the same positions alone and in any batch. The arrays' shapes depend only on
the number of rows and on the capacity of the cache, both rounded up, so that
the programs of decode_loop.py compile once for many calls.

Shape suffixes: B batch (padded).
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t2x.decode import beams as beams_lib
from t2x.decode import decode_loop
from t2x.decode import hypotheses
from t2x.decode import prefill
from t2x.decode import required_words
from t2x.decode import sampling as sampling_lib
from t2x.decode import word_starts
from t2x.layers import dropout

Sampling = sampling_lib.SamplingConfig
_DRAWS = ('temperature', 'top_k', 'top_p', 'min_p', 'typical_p')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
  """What `generate` returns, one entry for each prompt.

  Attributes:
    tokens: the new tokens, without the prompt, the end token and padding.
    log_probs: the log-probability of each of them under the model itself, that
      is before temperature, top-k and top-p.
    ended: whether the row met its end token before `num_tokens`, or the end of
      what it is held to, or had no token left that is not banned.
  """

  tokens: list[list[int]]
  log_probs: list[list[float]]
  ended: list[bool]


def generate(
  model: decode_loop.Model,
  prompts: Sequence[Sequence[int]],
  *,
  num_tokens: int,
  sampling: Sampling | Sequence[Sampling] | None = None,
  seed: int = 0,
  keys_B: jax.Array | None = None,
  **options: Any,
) -> Generation:
  """Goes on with the prompts or, with an encoder-decoder, answers them.

  Inside `sharding.use(mesh, rules)` rows and cache are split as the rules say;
  outside, this runs where the model is.

  >>> from flax import nnx
  >>> from t2x.models import decoder
  >>> config = decoder.DecoderConfig(vocab_size=9, num_layers=2)
  >>> model = decoder.Decoder(config, rngs=nnx.Rngs(0))
  >>> [len(row) for row in generate(model, [[1, 2], [3]], num_tokens=5).tokens]
  [5, 5]

  Args:
    model: a `Decoder` or an `EncoderDecoder`.
    prompts: token ids of each row: a text to go on with, or a source.
    num_tokens: the most new tokens of a row.
    sampling: how tokens are drawn, for all rows or for each; None means from
      the model's distribution. Other values share a compiled program as long
      as they ask for the same processors.
    seed: what row i draws depends on `seed`, on i and on its prompt alone.
    keys_B: a key for each prompt, instead of `seed`.
    **options: of `prefill.Options`: eos_id, pad_id, max_length, ...

  Returns:
    The new tokens and their log-probabilities.

  Raises:
    ValueError: an encoder, no or empty prompts, a prompt that is too long, ids
      outside the vocabulary, a setting out of range; before any compilation.
  """
  own = prefill.Options(**options)
  request = prefill.check(model, prompts, num_tokens, own)
  num_rows, vocab_size = request.num_rows, model.config.vocab_size
  configs = configs_of(sampling, len(prompts))
  settings = sampling_lib.rows(configs, num_rows, vocab_size)
  keys_B = row_keys(keys_B, seed, len(prompts), num_rows)
  state = decode_loop.decode(
    model,
    **request.start(),
    keys_B=keys_B,
    ended_B=np.arange(num_rows) >= len(prompts),
    num_tokens=np.int32(num_tokens),
    pad_id=np.int32(own.pad_id),
    ends_BE=request.ends_BE,
    settings=settings,
    history=sampling_lib.begin(settings, request.histories, vocab_size),
  )
  return _to_lists(state, len(prompts))


def beam_search(
  model: decode_loop.Model,
  prompts: Sequence[Sequence[int]],
  *,
  num_tokens: int,
  beams: beams_lib.BeamConfig = beams_lib.BeamConfig(),
  num_best: int = 1,
  sampling: Sampling | None = None,
  words: Sequence[required_words.Word] = (),
  texts: word_starts.Words | None = None,
  **options: Any,
) -> hypotheses.Hypotheses:
  """Searches for the continuations, or answers, of highest score.

  >>> from flax import nnx
  >>> from t2x.models import decoder
  >>> config = decoder.DecoderConfig(vocab_size=9, num_layers=2)
  >>> model = decoder.Decoder(config, rngs=nnx.Rngs(0))
  >>> found = beam_search(model, [[1, 2], [3]], num_tokens=5, num_best=2)
  >>> [len(texts) for texts in found.tokens]
  [2, 2]

  Args:
    model: a `Decoder` or an `EncoderDecoder`.
    prompts: as for `generate`.
    num_tokens: the most new tokens of a text.
    beams: how many, and when the search ends.
    num_best: texts of each prompt that are returned.
    sampling: bias, penalties, banned words and least length; they act on the
      log-probabilities, as in Hugging Face's beam search.
    words: that each text must hold, each as token ids in one form or several.
    texts: of these words, by which they are there whatever the tokens.
    **options: as for `generate`.

  Returns:
    The best texts of each prompt, best first.

  Raises:
    ValueError: as `generate`; more texts are asked for than there are beams,
      the settings draw tokens, or no text is left that holds the words.
  """
  if not 1 <= num_best <= beams.num_beams:
    raise ValueError(
      f'num_best={num_best}, and the search keeps beams.num_beams='
      f'{beams.num_beams} texts. Ask for 1 to {beams.num_beams}, or keep more.'
    )
  sampling = sampling or Sampling()
  if any(
    getattr(sampling, name) != getattr(Sampling(), name) for name in _DRAWS
  ):
    raise ValueError(
      'beam_search draws nothing: leave temperature, top_k, top_p, min_p and '
      'typical_p of its sampling as they are, or use generate.'
    )
  if words and beams.num_groups > 1:
    raise ValueError(
      f'beams.num_groups={beams.num_groups} with words that must be there: '
      'beams are shared out among those already. Leave one of them out.'
    )
  required_words.check(words, num_tokens)
  own = prefill.Options(**options)
  request = prefill.check(model, prompts, num_tokens, own)
  vocab_size = model.config.vocab_size
  num_rows = request.num_rows * beams.num_beams
  settings = sampling_lib.rows([sampling], num_rows, vocab_size)
  histories = [p for p in request.histories for _ in range(beams.num_beams)]
  found = beams_lib.search(
    model,
    **request.start(),
    live_B=np.arange(request.num_rows) < len(prompts),
    num_tokens=np.int32(num_tokens),
    ends_E=np.array(request.ends, np.int32),
    config=beams,
    settings=settings,
    history=sampling_lib.begin(settings, histories, vocab_size),
    words=_required(words, texts, request.histories),
  )
  result = hypotheses.to_lists(found, len(prompts), num_best)
  if not all(result.tokens):
    raise ValueError(
      f'No text of {num_tokens} tokens was found'
      + (' that holds all words' if words else '')
      + ': what is banned leaves none. Ban less'
      + (', or ask for fewer words.' if words else '.')
    )
  return result


def _required(words, texts, prompts) -> required_words.Words | None:
  if not words:
    return None
  own = None if texts is None else word_starts.arrays(texts, prompts)
  return required_words.make(words, own)


def _to_lists(state: decode_loop.State, num_prompts: int) -> Generation:
  counts = np.asarray(state.count_B)[:num_prompts]
  tokens_BN = np.asarray(state.tokens_BN)
  log_probs_BN = np.asarray(state.log_probs_BN)
  cut = lambda rows: [row[:n].tolist() for row, n in zip(rows, counts)]
  return Generation(
    tokens=cut(tokens_BN),
    log_probs=cut(log_probs_BN),
    ended=np.asarray(state.ended_B)[:num_prompts].tolist(),
  )


def configs_of(sampling, num_prompts: int) -> Sequence[Sampling]:
  """Returns the settings of each prompt."""
  if sampling is None or isinstance(sampling, Sampling):
    return [sampling or Sampling()] * num_prompts
  if len(sampling) != num_prompts:
    raise ValueError(
      f'sampling has {len(sampling)} settings and there are {num_prompts} '
      'prompts; give one for all, or one for each.'
    )
  return sampling


def row_keys(keys_B, seed: int, num_prompts: int, num_rows: int) -> jax.Array:
  """Returns a key for each row, from those of the prompts or from a seed."""
  if keys_B is None:
    return dropout.row_keys(jax.random.key(seed), jnp.arange(num_rows))
  if keys_B.shape != (num_prompts,):
    raise ValueError(
      f'keys_B has the shape {keys_B.shape} and there are {num_prompts} '
      'prompts; give one key for each, jax.random.split(key, num_prompts).'
    )
  return keys_B[np.minimum(np.arange(num_rows), num_prompts - 1)]

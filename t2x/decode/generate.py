"""Generation for a batch of prompts, by sampling or beam search.

Rows are padded on the right and each continues at its own index, so a row has
the same positions alone and in any batch. The shapes of arrays depend only on
the number of rows and the capacity of the caches, both rounded up, so that the
programs of decode_loop.py compile once for many calls.

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
  """Result of `generate`: lists with one entry for each prompt.

  Attributes:
    tokens: new tokens, without the prompt, the end token and padding.
    log_probs: log-probability of each new token under the model itself, before
      temperature, top-k and top-p.
    ended: whether the row reached an end token within `num_tokens`, completed
      the constraint that it follows, or had all next tokens banned.
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
  """Continues prompts; an encoder-decoder answers them.

  Inside `sharding.use(mesh, rules)` rows and caches are sharded by the rules;
  outside, this runs on the devices that hold the model.

  >>> from flax import nnx
  >>> from t2x.models import decoder
  >>> config = decoder.DecoderConfig(vocab_size=9, num_layers=2)
  >>> model = decoder.Decoder(config, rngs=nnx.Rngs(0))
  >>> [len(row) for row in generate(model, [[1, 2], [3]], num_tokens=5).tokens]
  [5, 5]

  Args:
    model: a `Decoder` or an `EncoderDecoder`.
    prompts: token ids of each prompt: a sequence to continue, or a source.
    num_tokens: the most new tokens of each prompt.
    sampling: sampling settings, one for all prompts or one for each; None draws
      from the model's distribution. Settings that use the same logit processors
      share a compiled program.
    seed: random seed; the draws of row i depend only on `seed`, i and the
      prompt of the row.
    keys_B: random key of each prompt, which replaces `seed`.
    **options: fields of `prefill.GenerationOptions`, such as eos_id.

  Returns:
    The new tokens and their log-probabilities.

  Raises:
    ValueError: the model is an encoder, prompts are missing, empty or too long,
      ids are outside the vocabulary, or a setting is out of range. It is raised
      before any compilation.
  """
  request = prefill.check(
    model, prompts, num_tokens, prefill.GenerationOptions(**options)
  )
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
    pad_id=np.int32(request.options.pad_id),
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
  texts: word_starts.WordFinder | None = None,
  **options: Any,
) -> hypotheses.Hypotheses:
  """Searches for the continuations of highest score, by beam search.

  >>> from flax import nnx
  >>> from t2x.models import decoder
  >>> config = decoder.DecoderConfig(vocab_size=9, num_layers=2)
  >>> model = decoder.Decoder(config, rngs=nnx.Rngs(0))
  >>> result = beam_search(model, [[1, 2], [3]], num_tokens=5, num_best=2)
  >>> [len(tokens) for tokens in result.tokens]
  [2, 2]

  Args:
    model: a `Decoder` or an `EncoderDecoder`.
    prompts: token ids of each prompt: a sequence to continue, or a source.
    num_tokens: the most new tokens of a hypothesis.
    beams: settings of the search.
    num_best: number of hypotheses of each prompt that are returned.
    sampling: bias, penalties, banned words and least length; they act on the
      log-probabilities, as in Hugging Face's beam search.
    words: words that each hypothesis must contain, each as the token ids of one
      form or several.
    texts: strings of these words, which then count however they are tokenized;
      None if only the forms count.
    **options: fields of `prefill.GenerationOptions`, such as eos_id.

  Returns:
    The hypotheses of each prompt, best first.

  Raises:
    ValueError: as `generate`; `num_best` exceeds the number of beams, a setting
      is for random drawing, or no hypothesis contains the words.
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
  request = prefill.check(
    model, prompts, num_tokens, prefill.GenerationOptions(**options)
  )
  vocab_size = model.config.vocab_size
  num_rows = request.num_rows * beams.num_beams
  settings = sampling_lib.rows([sampling], num_rows, vocab_size)
  histories = [p for p in request.histories for _ in range(beams.num_beams)]
  state = beams_lib.search(
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
  result = hypotheses.to_lists(state, len(prompts), num_best)
  if not all(result.tokens):
    raise ValueError(
      f'No text of {num_tokens} tokens was found'
      + (' that holds all words' if words else '')
      + ': what is banned leaves none. Ban less'
      + (', or ask for fewer words.' if words else '.')
    )
  return result


def _required(
  words: Sequence[required_words.Word],
  texts: word_starts.WordFinder | None,
  prompts: Sequence[Sequence[int]],
) -> required_words.RequiredWords | None:
  if not words:
    return None
  arrays = None if texts is None else word_starts.arrays(texts, prompts)
  return required_words.make(words, arrays)


def _to_lists(state: decode_loop.DecodeState, num_prompts: int) -> Generation:
  counts = np.asarray(state.count_B)[:num_prompts]
  tokens_BN = np.asarray(state.tokens_BN)
  log_probs_BN = np.asarray(state.log_probs_BN)
  cut = lambda rows: [row[:n].tolist() for row, n in zip(rows, counts)]
  return Generation(
    tokens=cut(tokens_BN),
    log_probs=cut(log_probs_BN),
    ended=np.asarray(state.ended_B)[:num_prompts].tolist(),
  )


def configs_of(
  sampling: Sampling | Sequence[Sampling] | None, num_prompts: int
) -> Sequence[Sampling]:
  """Returns the sampling settings of each prompt.

  Args:
    sampling: settings of all prompts or of each; None for the default.
    num_prompts: number of prompts.

  Raises:
    ValueError: the number of settings is not that of prompts.
  """
  if sampling is None or isinstance(sampling, Sampling):
    return [sampling or Sampling()] * num_prompts
  if len(sampling) != num_prompts:
    raise ValueError(
      f'sampling has {len(sampling)} settings and there are {num_prompts} '
      'prompts; give one for all, or one for each.'
    )
  return sampling


def row_keys(
  keys_B: jax.Array | None, seed: int, num_prompts: int, num_rows: int
) -> jax.Array:
  """Returns the random key of each row of a padded batch.

  Args:
    keys_B: keys of the prompts; None makes them from `seed`.
    seed: random seed.
    num_prompts: number of prompts.
    num_rows: number of rows.

  Raises:
    ValueError: the number of keys is not that of prompts.
  """
  if keys_B is None:
    return dropout.row_keys(jax.random.key(seed), jnp.arange(num_rows))
  if keys_B.shape != (num_prompts,):
    raise ValueError(
      f'keys_B has the shape {keys_B.shape} and there are {num_prompts} '
      'prompts; give one key for each, jax.random.split(key, num_prompts).'
    )
  return keys_B[np.minimum(np.arange(num_rows), num_prompts - 1)]

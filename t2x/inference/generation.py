"""Generates text with a trained run: by sampling, or by beam search.

trained = loading.load('runs/quickstart')
generation.generate_text(trained, ['The function'], num_tokens=20)
"""

from collections.abc import Sequence
import functools
import logging

from t2x.decode import beams as beams_lib
from t2x.decode import constrained
from t2x.decode import generate as generate_lib
from t2x.decode import requests
from t2x.decode import sampling as sampling_lib
from t2x.inference import text_stream
from t2x.inference import trained_model

_log = logging.getLogger(__name__)

Sampling = sampling_lib.SamplingConfig
Trained = trained_model.Trained


def generate_text(
  trained: Trained,
  prompts: Sequence[str],
  *,
  num_tokens: int,
  sampling: Sampling | Sequence[Sampling] | None = None,
  seed: int = 0,
  ignore_end: bool = False,
  max_length: int | None = None,
  control: requests.Constraint | None = None,
  stop: Sequence[str] = (),
) -> list[str]:
  """Returns a sampled continuation of, or answer to, each prompt.

  There are two engines. Without `control`, all prompts run as one batch in one
  compiled loop (`decode.generate`). With `control`, the engine of the server
  (`decode.engine`, continuous batching over a paged cache) runs them token by
  token, and the constraint is followed between tokens on the host
  (`decode.constrained`).

  Args:
    trained: a decoder or an encoder-decoder.
    prompts: texts to continue; for an encoder-decoder source texts, in which
      <extra_id_0>, <extra_id_1>, ... stand for its sentinels.
    num_tokens: greatest number of new tokens of a text.
    sampling: temperature, top-k, penalties and the like, for all prompts or one
      for each; None for the settings of the checkpoint.
    seed: seed of the sampling.
    ignore_end: whether a text goes on past its end token.
    max_length: greatest number of tokens of a sequence, new ones included; None
      for the length that the model was trained on.
    control: constraint of each text at its beginning, from
      `constraints.Controls`, for a decoder alone; None for no constraint.
    stop: strings before the first of which a text ends.

  Raises:
    ValueError: a prompt is longer than the context, the model is an encoder,
      a control cannot be followed, or is given beside ignore_end.
  """
  text_stream.check_stop(stop)
  result = generation(
    trained,
    prompts,
    num_tokens=num_tokens,
    sampling=sampling,
    seed=seed,
    ignore_end=ignore_end,
    max_length=max_length,
    control=control,
  )
  texts = trained.detokenize(prompts, result.tokens)
  return [text_stream.cut(text, stop) for text in texts]


def generation(
  trained: Trained,
  prompts: Sequence[str],
  *,
  num_tokens: int,
  sampling: Sampling | Sequence[Sampling] | None = None,
  seed: int = 0,
  ignore_end: bool = False,
  max_length: int | None = None,
  control: requests.Constraint | None = None,
) -> generate_lib.Generation:
  """Returns the tokens of `generate_text` and their log-probabilities.

  Arguments, errors and the choice of the engine are those of `generate_text`.
  """
  if control is not None and ignore_end:
    raise ValueError('ignore_end: a text that is held to a rule ends with it.')
  rows = trained.prompt_ids(prompts)
  engine = generate_lib.generate
  if control is not None:
    engine = functools.partial(constrained.generate, control=control)
  with trained.decoding():
    return engine(
      trained.decoding_model,
      rows,
      num_tokens=num_tokens,
      sampling=_calibrated(trained, sampling),
      seed=seed,
      **trained.decode_options(ignore_end=ignore_end, max_length=max_length),
    )


def search_text(
  trained: Trained,
  prompts: Sequence[str],
  *,
  num_tokens: int,
  beams: beams_lib.BeamConfig | None = None,
  num_best: int = 1,
  sampling: Sampling | None = None,
  keywords: Sequence[str] = (),
  max_length: int | None = None,
) -> list[list[tuple[str, float]]]:
  """Returns the best texts of each prompt with their scores, by beam search.

  Args:
    trained: a decoder or an encoder-decoder.
    prompts: texts, as for `generate_text`.
    num_tokens: greatest number of new tokens of a text.
    beams: number of beams, length penalty and the end of the search; None for
      the settings of the checkpoint.
    num_best: number of texts to return for each prompt.
    sampling: penalties, banned words and least length; None for the settings of
      the checkpoint.
    keywords: words that each text must contain.
    max_length: greatest number of tokens of a sequence, as for `generate_text`.

  Returns:
    For each prompt (text, score) pairs, the best first.

  Raises:
    ValueError: `generate.beam_search` raises it.
  """
  defaults = trained.generation
  with trained.decoding():
    result = generate_lib.beam_search(
      trained.decoding_model,
      trained.prompt_ids(prompts),
      num_tokens=num_tokens,
      beams=beams or beams_lib.BeamConfig(**defaults.search),
      num_best=num_best,
      sampling=trained.calibrated(sampling or Sampling(**defaults.searching)),
      words=trained.keyword_ids(keywords),
      texts=trained.keyword_texts(keywords),
      **trained.decode_options(max_length=max_length),
    )
  best = []
  for prompt, tokens, scores in zip(prompts, result.tokens, result.scores):
    texts = trained.detokenize([prompt] * len(tokens), tokens)
    best.append(list(zip(texts, scores)))
  return best


def _calibrated(
  trained: Trained, sampling: Sampling | Sequence[Sampling] | None
) -> Sampling | list[Sampling]:
  if isinstance(sampling, Sequence):
    return [trained.calibrated(config) for config in sampling]
  return trained.calibrated(sampling)

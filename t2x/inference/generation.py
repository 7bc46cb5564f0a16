"""Texts that a trained run writes.

trained = loading.load('runs/quickstart')
generation.generate_text(trained, ['The function'], num_tokens=20)
"""

from collections.abc import Sequence
import logging
from typing import Any

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
  control: requests.Control | None = None,
  stop: Sequence[str] = (),
) -> list[str]:
  """Returns the text that follows each prompt (or answers it).

  Args:
    trained: what `load` returned.
    prompts: texts; an encoder-decoder takes them as sources, in which
      <extra_id_0>, <extra_id_1>, ... stand for its sentinels.
    num_tokens: the most new tokens of each.
    sampling: temperature, top-k, penalties, ..., for all prompts or for each;
      None for what the checkpoint says.
    seed: of what is drawn.
    ignore_end: go on past the end token.
    max_length: the most tokens of a sequence, new ones included; default the
      length that the model was trained on.
    control: what each text of a decoder is held to, at its beginning; see
      `constraints.Controls`.
    stop: a text ends before the first of these.

  Raises:
    ValueError: a prompt longer than the context, a model that is an encoder,
      a control that cannot be followed, or one beside ignore_end.
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
  texts = trained.texts(prompts, result.tokens)
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
  control: requests.Control | None = None,
) -> generate_lib.Generation:
  """As `generate_text`, with its arguments and errors; returns tokens.

  Returns:
    The tokens of each text, with their log-probabilities.
  """
  if control is not None and ignore_end:
    raise ValueError('ignore_end: a text that is held to a rule ends with it.')
  rows = trained.prompt_ids(prompts)
  sampling = _calibrated(trained, sampling)
  options = trained.decode_options(ignore_end=ignore_end, max_length=max_length)
  common = {'num_tokens': num_tokens, 'sampling': sampling, 'seed': seed}
  with trained.decoding():
    if control is None:
      return generate_lib.generate(trained.writer, rows, **common, **options)
    return constrained.write(
      trained.writer, rows, control=control, **common, **options
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
    trained: what `load` returned.
    prompts: as for `generate_text`.
    num_tokens: the most new tokens of each.
    beams: how many, and when the search ends; None for what the checkpoint
      says of the end.
    num_best: texts of each prompt.
    sampling: penalties, banned words and least length; None likewise.
    keywords: words that each text must hold.
    max_length: as for `generate_text`.

  Raises:
    ValueError: as `generate.beam_search`.
  """
  own = trained.generation
  with trained.decoding():
    result = generate_lib.beam_search(
      trained.writer,
      trained.prompt_ids(prompts),
      num_tokens=num_tokens,
      beams=beams or beams_lib.BeamConfig(**own.search),
      num_best=num_best,
      sampling=trained.calibrated(sampling or Sampling(**own.searching)),
      words=trained.keyword_ids(keywords),
      texts=trained.keyword_texts(keywords),
      **trained.decode_options(max_length=max_length),
    )
  found = []
  for prompt, tokens, scores in zip(prompts, result.tokens, result.scores):
    texts = trained.texts([prompt] * len(tokens), tokens)
    found.append(list(zip(texts, scores)))
  return found


def _calibrated(trained: Trained, sampling: Any) -> Any:
  if isinstance(sampling, Sequence):
    return [trained.calibrated(config) for config in sampling]
  return trained.calibrated(sampling)

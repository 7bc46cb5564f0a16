"""Constrained generation for a batch of prompts."""

from collections.abc import Sequence
from typing import Any

from t2x.decode import engine as engine_lib
from t2x.decode import generate as generate_lib
from t2x.decode import prefill
from t2x.decode import prompts as prompts_lib
from t2x.decode import requests
from t2x.decode import sampling as sampling_lib
from t2x.models import decoder

Sampling = sampling_lib.SamplingConfig

_MOST_SLOTS = 16


def generate(
  model: decoder.Decoder,
  prompts: Sequence[Sequence[int]],
  *,
  num_tokens: int,
  control: requests.Constraint,
  sampling: Sampling | Sequence[Sampling] | None = None,
  seed: int = 0,
  **options: Any,
) -> generate_lib.Generation:
  """Generates as `generate.generate`, with every sequence under a constraint.

  Args:
    model: a decoder.
    prompts: token ids of each prompt.
    num_tokens: the most new tokens of each prompt.
    control: the constraint; each sequence follows it from its own beginning.
    sampling: sampling settings, one for all prompts or one for each; None draws
      from the model's distribution.
    seed: random seed; see `generate`.
    **options: eos_id, pad_id, start_id and max_length of
      `prefill.GenerationOptions`.

  Returns:
    As `generate`; a sequence that completes the constraint has ended.

  Raises:
    ValueError: as `generate` and `Engine`; the constraint cannot be followed.
  """
  if not isinstance(model, decoder.Decoder):
    raise ValueError(
      f'{type(model).__name__} cannot be held to a rule: only a decoder can. '
      'Leave the rule out.'
    )
  request = prefill.check(
    model, prompts, num_tokens, prefill.GenerationOptions(**options)
  )
  configs = generate_lib.configs_of(sampling, len(prompts))
  config = engine_lib.EngineConfig(
    num_slots=min(prompts_lib.power_of_two(len(prompts)), _MOST_SLOTS),
    max_waiting=len(prompts),
    max_length=request.limit,
  )
  engine = engine_lib.Engine(model, config)
  sequences = [
    engine.add(
      engine_lib.Request(
        prompt=prompt.tolist(),
        num_tokens=num_tokens,
        sampling=row_sampling,
        seed=seed,
        row=row,
        ends=tuple(request.ends),
        control=control.begin(prompt.tolist()),
      )
    )
    for row, (prompt, row_sampling) in enumerate(zip(request.rows, configs))
  ]
  while engine.is_busy:
    engine.step()
  for sequence in sequences:
    if sequence.error:
      raise ValueError(sequence.error)
  return generate_lib.Generation(
    tokens=[sequence.tokens for sequence in sequences],
    log_probs=[sequence.log_probs for sequence in sequences],
    ended=[sequence.reason == 'stop' for sequence in sequences],
  )

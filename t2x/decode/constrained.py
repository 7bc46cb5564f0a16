"""Texts that are held to what a control says, written all at once."""

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


def write(
  model: decoder.Decoder,
  prompts: Sequence[Sequence[int]],
  *,
  num_tokens: int,
  control: requests.Control,
  sampling: Sampling | Sequence[Sampling] | None = None,
  seed: int = 0,
  **options: Any,
) -> generate_lib.Generation:
  """As `generate.generate`, with texts that are held to a control.

  Args:
    model: a decoder.
    prompts: token ids of each row.
    num_tokens: the most new tokens of a row.
    control: of each text, at its beginning.
    sampling: as for `generate`.
    seed: as for `generate`.
    **options: eos_id, pad_id, start_id and max_length of `prefill.Options`.

  Returns:
    As `generate`; a text whose control is done has ended.

  Raises:
    ValueError: as `generate` and `Engine`; the control cannot be followed.
  """
  if not isinstance(model, decoder.Decoder):
    raise ValueError(
      f'{type(model).__name__} cannot be held to a rule: only a decoder can. '
      'Leave the rule out.'
    )
  own = prefill.Options(**options)
  request = prefill.check(model, prompts, num_tokens, own)
  configs = generate_lib.configs_of(sampling, len(prompts))
  config = engine_lib.EngineConfig(
    num_slots=min(prompts_lib.power_of_two(len(prompts)), _MOST_SLOTS),
    max_waiting=len(prompts),
    max_length=request.limit,
  )
  engine = engine_lib.Engine(model, config)
  texts = [
    engine.add(
      engine_lib.Request(
        prompt=prompt.tolist(),
        num_tokens=num_tokens,
        sampling=drawn,
        seed=seed,
        row=row,
        ends=tuple(request.ends),
        control=control.begin(prompt.tolist()),
      )
    )
    for row, (prompt, drawn) in enumerate(zip(request.rows, configs))
  ]
  while engine.is_busy:
    engine.step()
  for text in texts:
    if text.error:
      raise ValueError(text.error)
  return generate_lib.Generation(
    tokens=[text.tokens for text in texts],
    log_probs=[text.log_probs for text in texts],
    ended=[text.reason == 'stop' for text in texts],
  )

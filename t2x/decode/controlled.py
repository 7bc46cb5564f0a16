"""Texts that are held to what a control says, written all at once."""

from collections.abc import Sequence

from t2x.decode import engine as engine_lib
from t2x.decode import generate as generate_lib
from t2x.decode import texts as texts_lib
from t2x.models import decoder

Sampling = engine_lib.Sampling


def write(
  model: decoder.Decoder,
  prompts: Sequence[Sequence[int]],
  *,
  num_tokens: int,
  control: texts_lib.Control,
  sampling: Sampling | Sequence[Sampling] | None = None,
  seed: int = 0,
  ends: tuple[int, ...] = (),
  max_length: int | None = None,
) -> generate_lib.Generation:
  """As `generate.generate`, with texts that are held to a control.

  Args:
    model: a decoder.
    prompts: token ids of each row.
    num_tokens: the most new tokens of a row.
    control: of each text, at its beginning.
    sampling: as for `generate`.
    seed: as for `generate`.
    ends: tokens that end a text.
    max_length: see `EngineConfig`.

  Raises:
    ValueError: as `Engine`; the control cannot be followed.
  """
  configs = generate_lib.configs_of(sampling, len(prompts))
  config = engine_lib.EngineConfig(
    num_slots=min(len(prompts), 16),
    max_waiting=len(prompts),
    max_length=max_length,
  )
  engine = engine_lib.Engine(model, config)
  texts = [
    engine.add(
      engine_lib.Request(
        prompt=prompt,
        num_tokens=num_tokens,
        sampling=own,
        seed=seed,
        row=row,
        ends=ends,
        control=control.copy(),
      )
    )
    for row, (prompt, own) in enumerate(zip(prompts, configs))
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

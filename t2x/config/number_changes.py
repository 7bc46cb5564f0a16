"""Changes of the numbers that the same settings give, for runs begun before.

A run keeps the names of those that it began with (numbers.json); one that goes
on is told of each later one that concerns it. Whoever changes what a config
computes adds an entry at the end of `CHANGES`.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses

from t2x.config import experiment
from t2x.data import config as data_config
from t2x.layers import low_rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
  """One change.

  Attributes:
    name: unlike any other; it stays for good.
    date: day of the change, as 2026-11-30.
    text: one sentence on what is computed now.
    concerns: whether runs of a config are changed by it.
  """

  name: str
  date: str
  text: str
  concerns: Callable[[experiment.Experiment], bool] = lambda config: True


def _has_landmarks(config: experiment.Experiment) -> bool:
  return any(
    isinstance(kind, low_rank.Nystromformer) for kind in config.model.kinds
  )


_NOTHING_DRAWN = 'causal_lm', 'source_target', 'classification'

CHANGES: tuple[Change, ...] = (
  Change(
    name='schedule_ends',
    date='2026-11-30',
    text='The learning rate takes its peak at the last update of the warmup '
    'and its final value at the last update of the run; both came one update '
    'later, and wsd with a short decay never decayed.',
    concerns=lambda c: (
      c.optim.schedule.shape in ('cosine', 'linear', 'wsd')
      or (c.optim.schedule.shape == 'inverse_sqrt')
      and c.optim.schedule.warmup_steps > 0
    ),
  ),
  Change(
    name='sampling_ends',
    date='2026-11-30',
    text='train.sampling replaces its whole share at the last of its `steps`, '
    'one step sooner than before.',
    concerns=lambda c: c.train.sampling is not None,
  ),
  Change(
    name='draws_by_example',
    date='2026-11-30',
    text='What is drawn for an example (masks, spans, prefixes, orders) goes '
    'by the example and its visit, not by its number since the start: the '
    'rows and their order are as before, their masks are others.',
    concerns=lambda c: any(
      own.objective.kind not in _NOTHING_DRAWN
      for own in data_config.parts(c.data).values()
    ),
  ),
  Change(
    name='tokens_of_padded_rows',
    date='2026-11-30',
    text='train.num_tokens counts the tokens that padded rows hold, where it '
    'counted their padding too, so that a run is longer.',
    concerns=lambda c: (
      c.train.num_tokens is not None and not data_config.is_full(c.data)
    ),
  ),
  Change(
    name='landmarks_of_no_token',
    date='2026-11-30',
    text='A landmark of a Nystromformer that has no token, in rows of fewer '
    'tokens than landmarks, is no part of what is inverted; it changed what '
    'such rows give.',
    concerns=_has_landmarks,
  ),
)


def since(
  known: Sequence[str], config: experiment.Experiment
) -> tuple[Change, ...]:
  """Returns the changes that concern a config and that a run does not know."""
  return tuple(c for c in CHANGES if c.name not in known and c.concerns(config))

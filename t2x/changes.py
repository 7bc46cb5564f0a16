"""Changes of the numbers that the same settings give, for runs begun before.

A run keeps the names of those that it began with (numbers.json); one that goes
on is told of each later one that concerns it. Whoever changes what a config
computes adds an entry at the end of `CHANGES`.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses

from t2x import experiment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
  """One change.

  Attributes:
    name: unlike any other; it stays for good.
    date: when, as 2026-11-30.
    text: what is computed now, in one sentence.
    concerns: whether runs of a config are changed by it.
  """

  name: str
  date: str
  text: str
  concerns: Callable[[experiment.Experiment], bool] = lambda config: True


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
)


def since(
  known: Sequence[str], config: experiment.Experiment
) -> tuple[Change, ...]:
  """Returns the changes that concern a config and that a run does not know."""
  return tuple(c for c in CHANGES if c.name not in known and c.concerns(config))

"""The batch sizes that a run has had: where its data stands.

A run's position is a step and the segments up to it, each of one batch size and
one order of the rows. It is saved with every checkpoint, so that whichever is
gone on from says what was read.
"""

from collections.abc import Sequence
import dataclasses
from fractions import Fraction
import math
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
  """Steps of one batch size.

  Attributes:
    step: steps before it.
    batch_size: rows a step.
    order: names what the rows' order is a function of; segments of one order
      that follow each other go through it together.
    epoch: steps in which every row is read once.
    tokens: tokens that a step reads, on average.
  """

  step: int = 0
  batch_size: int
  order: str = ''
  epoch: int = 1
  tokens: float = 1.0


def to_json(segments: Sequence[Segment], step: int) -> dict[str, Any]:
  """Returns a position after so many steps."""
  return {'step': step, 'history': [dataclasses.asdict(s) for s in segments]}


def from_json(position: dict[str, Any]) -> list[Segment]:
  """Returns the segments of a position; none of one before there were any."""
  return [Segment(**s) for s in position.get('history', ())]


def going_on(before: Sequence[Segment], now: Segment) -> list[Segment]:
  """Returns the segments of a run that goes on as `now` says."""
  kept = [s for s in before if s.step < now.step]
  same = lambda s: (s.order, s.batch_size) == (now.order, now.batch_size)
  return kept if kept and same(kept[-1]) else [*kept, now]


def change(before: Sequence[Segment], after: Sequence[Segment]) -> str:
  """Returns where the data goes on, if it does not as it did, else nothing."""
  was, now = before[-1], after[-1]
  if now in before or not now.step:
    return ''
  if was.order != now.order:
    return (
      'What the order of the data depends on (its text, data.length, data.'
      'batching, data.objective, data.train_split or train.seed) has changed: '
      f'at step {now.step} the order of the data begins anew, so that what was '
      'read before may be read again before the rest is.'
    )
  return (
    f'data.batch_size={was.batch_size} up to step {now.step} and '
    f'{now.batch_size} from there: the data goes on at the rows that are next, '
    f'and none is left out or read twice. An epoch is now {now.epoch} steps.'
  )


def of_one_order(segments: Sequence[Segment]) -> list[Segment]:
  """Returns the last segments that go through one order together."""
  start = len(segments) - 1
  while start and segments[start - 1].order == segments[-1].order:
    start -= 1
  return list(segments[start:])


def lengths(segments: Sequence[Segment]) -> list[int]:
  """Returns the steps of each segment but the last, which goes on."""
  starts = [s.step for s in segments]
  return [b - a for a, b in zip(starts, starts[1:])]


def num_steps(
  segments: Sequence[Segment],
  *,
  epochs: float | None = None,
  tokens: int | None = None,
) -> int:
  """Returns the steps of a run that reads so many epochs or tokens in all."""
  last = segments[-1]
  # As written: 1.1 epochs of 10 steps are 11, and not 12 by a rounding.
  if epochs is not None:
    left, each = Fraction(str(epochs)), lambda s: Fraction(1, s.epoch)
  else:
    assert tokens is not None
    left, each = Fraction(tokens), lambda s: Fraction(str(s.tokens))
  for segment, steps in zip(segments, lengths(segments)):
    left -= steps * each(segment)
  return max(last.step + math.ceil(left / each(last)), last.step, 1)

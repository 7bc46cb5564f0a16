"""The position of a run in its data, across changes of the batch size.

A position is a step and the segments up to it, each of one batch size and one
order of the rows. It is saved with every checkpoint, so that any checkpoint
says what was read before it.
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
    step: number of steps before the segment.
    batch_size: number of rows in a step.
    order: a hash of everything that decides the order of the rows; consecutive
      segments of one order read it one after the other.
    epoch: number of steps in which every row is read once.
    tokens: average number of tokens that a step reads.
  """

  step: int = 0
  batch_size: int
  order: str = ''
  epoch: int = 1
  tokens: float = 1.0


def to_json(segments: Sequence[Segment], step: int) -> dict[str, Any]:
  """Returns the position after `step` steps, for JSON."""
  return {'step': step, 'history': [dataclasses.asdict(s) for s in segments]}


def from_json(position: dict[str, Any]) -> list[Segment]:
  """Returns the segments of a position; none if an older run wrote it."""
  return [Segment(**s) for s in position.get('history', ())]


def continued(before: Sequence[Segment], now: Segment) -> list[Segment]:
  """Returns the segments of a run that is continued.

  Args:
    before: segments of the run so far.
    now: segment that starts at the step where the run is continued.
  """
  kept = [s for s in before if s.step < now.step]
  same = lambda s: (s.order, s.batch_size) == (now.order, now.batch_size)
  return kept if kept and same(kept[-1]) else [*kept, now]


def change(before: Sequence[Segment], after: Sequence[Segment]) -> str:
  """Returns a message on how the data changes when a run is continued.

  Args:
    before: segments of the run so far.
    after: segments of the continued run; see `continued`.

  Returns:
    The message; empty if nothing changes.
  """
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
  """Returns the last segments that share one order of the rows."""
  start = len(segments) - 1
  while start and segments[start - 1].order == segments[-1].order:
    start -= 1
  return list(segments[start:])


def lengths(segments: Sequence[Segment]) -> list[int]:
  """Returns the number of steps of each segment except the last, open one."""
  starts = [s.step for s in segments]
  return [b - a for a, b in zip(starts, starts[1:])]


def num_steps(
  segments: Sequence[Segment],
  *,
  epochs: float | None = None,
  tokens: int | None = None,
) -> int:
  """Returns the number of steps of a run, at least 1.

  Args:
    segments: segments of the run.
    epochs: epochs to read in all; None if `tokens` is given.
    tokens: tokens to read in all; used if `epochs` is None.
  """
  last = segments[-1]
  # Exact decimals: 1.1 epochs of 10 steps are 11, not 12 by rounding up.
  if epochs is not None:
    left, each = Fraction(str(epochs)), lambda s: Fraction(1, s.epoch)
  else:
    assert tokens is not None
    left, each = Fraction(tokens), lambda s: Fraction(str(s.tokens))
  for segment, steps in zip(segments, lengths(segments)):
    left -= steps * each(segment)
  return max(last.step + math.ceil(left / each(last)), last.step, 1)

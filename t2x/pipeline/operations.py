"""What a stage can do in a tick, which parts it holds, what needs what.

A model is cut into `num_stages` x `num_chunks` parts, numbered in depth order;
a stage holds one part of each chunk. Placement 'loop' deals the parts round
and round, so that part p + 1 is always one stage further and the last stage
passes to the first. Placement 'v' goes down the stages in even chunks and back
up in odd ones (Qi et al., 2024, https://arxiv.org/abs/2405.15362), so that
where the direction turns the next part is on the same stage.

An `Op` is (operation, microbatch, chunk) in the order of one stage, or
(operation, microbatch, part) where the whole model is meant.
"""

from typing import Any
from typing import Literal
from typing import get_args

IDLE, FORWARD, BACKWARD, WEIGHT, RECOMPUTE = range(5)
LETTERS = ' FBWR'

Placement = Literal['loop', 'v']
PLACEMENTS = get_args(Placement)
Op = tuple[int, int, int]


def part(stage: Any, chunk: Any, num_stages: int, placement: str) -> Any:
  """The part that a stage holds of a chunk: integers or integer arrays."""
  if placement == 'v':
    stage = stage + (chunk % 2) * (num_stages - 1 - 2 * stage)
  return chunk * num_stages + stage


def stage_of(part: Any, num_stages: int, placement: str) -> Any:
  """The stage that holds a part."""
  chunk, stage = part // num_stages, part % num_stages
  if placement == 'v':
    stage = stage + (chunk % 2) * (num_stages - 1 - 2 * stage)
  return stage


def chunk_of(part: Any, num_stages: int) -> Any:
  """The chunk that a part is of."""
  return part // num_stages


def kinds(*, training: bool, recompute: bool) -> tuple[int, ...]:
  """The operations that each microbatch needs on each part, in order."""
  if not training:
    return (FORWARD,)
  if recompute:
    return (FORWARD, RECOMPUTE, BACKWARD, WEIGHT)
  return (FORWARD, BACKWARD, WEIGHT)


def needs(
  operation: int, part: int, num_parts: int, *, recompute: bool
) -> tuple[tuple[int, int], ...]:
  """The (operation, part) of the same microbatch that must come before.

  An operation uses what the same part made before it, and a message of the
  part before (F) or after (B).
  """
  return tuple(
    (other, part + step)
    for other, step in steps(operation, recompute=recompute)
    if 0 <= part + step < num_parts
  )


def steps(operation: int, *, recompute: bool) -> tuple[tuple[int, int], ...]:
  """What `needs` is made of: operations, and how many parts further."""
  return {
    FORWARD: ((FORWARD, -1),),
    RECOMPUTE: ((FORWARD, 0),),
    BACKWARD: ((RECOMPUTE if recompute else FORWARD, 0), (BACKWARD, 1)),
    WEIGHT: ((BACKWARD, 0),),
  }[operation]

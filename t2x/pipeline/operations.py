"""The operations of a schedule, their dependencies, and the parts of stages.

A model is cut into `num_stages` x `num_chunks` parts, numbered in order of
depth. A stage holds one part of each chunk. With placement 'loop' part p + 1 is
on the stage after that of part p, and the first stage follows the last. With
placement 'v' the parts of even chunks go down the stages and those of odd
chunks go back up (Qi et al., 2024, https://arxiv.org/abs/2405.15362). Where the
direction turns, the next part is on the same stage.

An `Op` is (operation, microbatch, chunk) in the order of one stage, and
(operation, microbatch, part) for the whole model.
"""

from typing import Literal
from typing import TypeVar
from typing import get_args

import numpy as np

IDLE, FORWARD, BACKWARD, WEIGHT, RECOMPUTE = range(5)
LETTERS = ' FBWR'

Placement = Literal['loop', 'v']
PLACEMENTS = get_args(Placement)
Op = tuple[int, int, int]
Ints = TypeVar('Ints', int, np.ndarray)


def part(stage: Ints, chunk: Ints, num_stages: int, placement: str) -> Ints:
  """Returns the part of a chunk that a stage holds.

  Args:
    stage: index of the stage, or an array of indices.
    chunk: index of the chunk, or an array of indices.
    num_stages: number of stages, S.
    placement: one of `PLACEMENTS`.
  """
  if placement == 'v':
    stage = stage + (chunk % 2) * (num_stages - 1 - 2 * stage)
  return chunk * num_stages + stage


def stage_of(part: Ints, num_stages: int, placement: str) -> Ints:
  """Returns the stage that holds a part.

  Args:
    part: index of the part, or an array of indices.
    num_stages: number of stages, S.
    placement: one of `PLACEMENTS`.
  """
  chunk, stage = part // num_stages, part % num_stages
  if placement == 'v':
    stage = stage + (chunk % 2) * (num_stages - 1 - 2 * stage)
  return stage


def chunk_of(part: Ints, num_stages: int) -> Ints:
  """Returns the chunk that a part belongs to.

  Args:
    part: index of the part, or an array of indices.
    num_stages: number of stages, S.
  """
  return part // num_stages


def kinds(*, training: bool, recompute: bool) -> tuple[int, ...]:
  """Returns the operations of each microbatch on each part, in order.

  Args:
    training: whether there are backward passes.
    recompute: whether there is an R before every B.
  """
  if not training:
    return (FORWARD,)
  if recompute:
    return (FORWARD, RECOMPUTE, BACKWARD, WEIGHT)
  return (FORWARD, BACKWARD, WEIGHT)


def needs(
  operation: int, part: int, num_parts: int, *, recompute: bool
) -> tuple[tuple[int, int], ...]:
  """Returns the operations that an operation depends on.

  They belong to the same microbatch: an earlier operation on the same part, and
  the one that makes the message of the part before (for F) or after (for B).

  Args:
    operation: kind of the operation.
    part: index of its part.
    num_parts: number of parts, P.
    recompute: whether there is an R before every B.

  Returns:
    A pair (operation, part) for each.
  """
  return tuple(
    (other, part + step)
    for other, step in steps(operation, recompute=recompute)
    if 0 <= part + step < num_parts
  )


def steps(operation: int, *, recompute: bool) -> tuple[tuple[int, int], ...]:
  """Returns the operations that an operation depends on, for any part.

  Args:
    operation: kind of the operation.
    recompute: whether there is an R before every B.

  Returns:
    A pair (operation, its part minus the part of `operation`) for each.
  """
  return {
    FORWARD: ((FORWARD, -1),),
    RECOMPUTE: ((FORWARD, 0),),
    BACKWARD: ((RECOMPUTE if recompute else FORWARD, 0), (BACKWARD, 1)),
    WEIGHT: ((BACKWARD, 0),),
  }[operation]

"""Detects collectives that would deadlock a pipeline's program.

The stages of a pipeline run one program and do different things: a loop that
runs on one device may not run on another. A collective that names its groups
waits for its group alone; a collective-permute waits for all devices of the
program. If some of them do not run it, it hangs, or receives the data of
another permute, and the numbers are wrong.
"""

from collections.abc import Iterator

from t2x.hlo import execution
from t2x.hlo import module as module_lib
from t2x.pipeline import executor
from t2x.pipeline import tick

_PERMUTES = ('collective-permute', 'collective-permute-start')


class DivergenceError(ValueError):
  """A collective-permute lies in a loop or branch that not all devices run."""


def check(text: str) -> None:
  """Checks that a program's stages cannot wait for each other for ever.

  Args:
    text: the program, as `compiled.as_text()` prints it.

  Raises:
    DivergenceError: a collective-permute runs in a loop or a branch that
      devices need not enter alike.
  """
  module = module_lib.parse(text)
  scope = execution.Scope(module, module.computations[module.entry])
  for permute, inside in _permutes(scope, None):
    raise DivergenceError(
      f'The collective-permute {permute.name} '
      f'({permute.op_name or "no op_name"}) lies in the {inside.op} '
      f'{inside.name} ({inside.op_name or "no op_name"}), which the stages of '
      'the pipeline do not run alike. It waits for all devices while some do '
      'something else: the step would hang, or compute wrong numbers. Find '
      'what sends from device to device within a layer: ring attention (set '
      'rules.context_attention=all_to_all), a dimension split over devices '
      'that the layer rolls, slices or pads (leave it whole, by its rule), '
      "a product that the compiler cuts into a ring (a TPU's collective "
      'matmul; see compiler_options). Or set pipeline.uniform=true: all stages '
      'then do whatever one of them does, at a higher price.'
    )


def _permutes(
  scope: execution.Scope, inside: module_lib.Instruction | None
) -> Iterator[tuple[module_lib.Instruction, module_lib.Instruction]]:
  """Yields permutes in divergent code, each with that loop or conditional.

  Args:
    scope: the computation to search, with those that it calls.
    inside: the divergent loop or conditional around it; None for none.
  """
  for instruction in scope.computation.instructions.values():
    if inside and instruction.op in _PERMUTES:
      if not _is_exchange(instruction):
        yield instruction, inside
    within = inside
    if not inside and _may_differ(scope, instruction):
      within = instruction
    for called in execution.callees(scope, instruction):
      yield from _permutes(called, within)


def _may_differ(
  scope: execution.Scope, instruction: module_lib.Instruction
) -> bool:
  """Whether some devices may run a loop's or a branch's body more often."""
  if instruction.op != 'while':
    # In the program of one of several slices, permutes have no name.
    return instruction.op == 'conditional' and not _is_exchange(instruction)
  if tick.LOOP in instruction.op_name:
    return True
  return execution.trip_count(scope, instruction) is None


def _is_exchange(instruction: module_lib.Instruction) -> bool:
  """Whether this sends between stages, which all devices run alike."""
  return executor.EXCHANGE in instruction.op_name

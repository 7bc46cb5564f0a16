"""Exchanges that would wait for devices that never come.

The stages of a pipeline run one program and do different things: a loop that
runs on one device may not run on another. A collective that names its groups
waits for its group alone; a collective-permute waits for all devices of the
program. Where some of them are elsewhere it hangs, or takes what another
permute sent, and the numbers are wrong.
"""

from collections.abc import Iterator

from t2x.hlo import execution
from t2x.hlo import module as module_lib
from t2x.pipeline import executor
from t2x.pipeline import tick

_PERMUTES = ('collective-permute', 'collective-permute-start')


class DivergenceError(ValueError):
  """An exchange of all devices lies where not all of them come."""


def check(text: str) -> None:
  """Raises where a program's stages would wait for each other for ever.

  Args:
    text: of `compiled.as_text()`.

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
  """Yields permutes with what they lie in that devices may not run alike."""
  for instruction in scope.computation.instructions.values():
    if inside and instruction.op in _PERMUTES:
      if not _is_exchange(instruction):
        yield instruction, inside
    within = inside
    if not inside and _may_differ(scope, instruction):
      within = instruction
    for called in execution.called(scope, instruction):
      yield from _permutes(called, within)


def _may_differ(
  scope: execution.Scope, instruction: module_lib.Instruction
) -> bool:
  """Whether devices may run what it holds unlike often."""
  if instruction.op != 'while':
    # In the program of one of several slices, permutes have no name.
    return instruction.op == 'conditional' and not _is_exchange(instruction)
  if tick.LOOP in instruction.op_name:
    return True
  return execution.trip_count(scope, instruction) is None


def _is_exchange(instruction: module_lib.Instruction) -> bool:
  """Whether all devices read the same in the table: that one of them sends."""
  return executor.EXCHANGE in instruction.op_name

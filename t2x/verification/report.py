"""Reports of `t2x.verification.verify`: a table, text and JSON."""

from collections.abc import Iterator
from collections.abc import Sequence
import math
import textwrap
from typing import Any

from t2x.verification import deviation

_CHECKS = ('weights', 'loss', 'gradients', 'update', 'trajectory')
_MOST_NAMED = 4  # Parameters that are named at the first difference.


def header(layouts: Sequence[str]) -> str:
  """Returns the first line of the table."""
  return _row('layout', layouts, _CHECKS, 'ok', 'worst parameter')


def row(verdict: deviation.Verdict, layouts: Sequence[str]) -> str:
  """Returns the table's line of a layout: its largest deviations.

  Args:
    verdict: verdict of the layout.
    layouts: texts of all layouts in the table, which set the width.
  """
  cells = [_number(_largest(verdict, name)) for name in _CHECKS]
  ok = 'yes' if verdict.ok else 'NO'
  path = worst_parameter(verdict)
  return _row(verdict.layout, layouts, cells, ok, path)


def steps(verdict: deviation.Verdict) -> Iterator[str]:
  """Yields a line for each check, then one for each parameter."""
  for check in verdict.checks:
    path, value = check.worst
    where = path and f'  {path}'
    yield f'  step {check.step:<4}{check.name:<11}{_number(value):>8}{where}'
  yield '  worst of all steps:'
  for path, value in verdict.by_parameter().items():
    yield f'    {_number(value):>8}  {path}'


def explanation(verdict: deviation.Verdict) -> str:
  """Returns a text that explains deviations and the tolerance."""
  measure = (
    'A deviation is max|a - b| / max(max|b|, 1e-3 x the largest entry of the '
    'tree); of an update, in changes of the weights; of a loss, relative, and '
    'at step k of the trajectory divided by k.'
  )
  reason = (
    f'Tolerance {_number(verdict.tolerance)}, and of losses '
    f'{_number(verdict.loss_tolerance)}. In float32, sums in another order '
    'differ by 1e-7 to 3e-5, most of it in the updates of Muon; a term that '
    'is missing or in the wrong place shows from 1e-3 on. A loss is a mean of '
    'terms of one sign: it loses less by rounding, and hides more.'
  )
  return f'{textwrap.fill(measure, 80)}\n{textwrap.fill(reason, 80)}'


def parting(verdict: deviation.Verdict) -> str:
  """Describes the first check that fails; returns '' if none does."""
  if verdict.ok:
    return ''
  first = verdict.past[0]
  text = (
    f'{verdict.layout}: the numbers first part in {_place(first)} '
    f'({_number(first.worst[1])})'
  )
  check = _first_by_parameter(verdict)
  if check is None:
    return f'{text}, and no gradient or update with it.'
  if check is not first:
    text += f'; with it {_place(check)}'
  past = {p: d for p, d in check.deviations.items() if d > verdict.tolerance}
  worst = sorted(past, key=lambda path: -past[path])
  text += f', {len(past)} of {len(check.deviations)} parameters:'
  lines = [f'\n  {_number(past[p]):>8}  {p}' for p in worst[:_MOST_NAMED]]
  more = len(worst) - _MOST_NAMED
  return text + ''.join(lines) + (f'\n  and {more} more' if more > 0 else '')


def to_json(verdict: deviation.Verdict) -> dict[str, Any]:
  """Returns a layout's JSON entry; a deviation that is not finite is null."""
  return {
    'layout': verdict.layout,
    'max_relative_deviation': _finite(verdict.largest(of_loss=False)),
    'worst_parameter': worst_parameter(verdict),
    'tolerance': verdict.tolerance,
    'max_loss_deviation': _finite(verdict.largest(of_loss=True)),
    'loss_tolerance': verdict.loss_tolerance,
    'ok': verdict.ok,
    'first_parting': None if verdict.ok else _entry(verdict.past[0]),
    'steps': [_entry(check) for check in verdict.checks],
    'parameters': {p: _finite(d) for p, d in verdict.by_parameter().items()},
  }


def worst_parameter(verdict: deviation.Verdict) -> str:
  """Returns the parameter of largest deviation in the first check that fails.

  If no check of parameters fails, it is that of the largest deviation of all.
  """
  first = _first_by_parameter(verdict)
  return first.worst[0] if first else next(iter(verdict.by_parameter()))


def _first_by_parameter(verdict: deviation.Verdict) -> deviation.Check | None:
  """Returns the first check of parameters that exceeds the tolerance."""
  return next((c for c in verdict.past if not c.of_loss), None)


def _entry(check: deviation.Check) -> dict[str, Any]:
  path, value = check.worst
  return {
    'step': check.step,
    'check': check.name,
    'parameter': path or None,
    'deviation': _finite(value),
  }


def _place(check: deviation.Check) -> str:
  if check.name == 'weights':
    return 'the weights as drawn'
  return f'the {check.name} of step {check.step}'


def _largest(verdict: deviation.Verdict, name: str) -> float:
  return max(c.worst[1] for c in verdict.checks if c.name == name)


def _finite(value: float) -> float | None:
  return value if math.isfinite(value) else None


def _number(value: float) -> str:
  return '0' if value == 0.0 else f'{value:.1e}'


def _row(
  first: str,
  layouts: Sequence[str],
  cells: Sequence[str],
  ok: str,
  last: str,
) -> str:
  width = max(map(len, ('layout', *layouts)))
  numbers = ''.join(f'{cell:>11}' for cell in cells)
  return f'{first:<{width}}{numbers}  {ok:<4}{last}'

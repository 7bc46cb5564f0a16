"""The progress of a run: a bar at a terminal, lines elsewhere."""

from collections.abc import Mapping
import sys
import time
from typing import Any

_LINE_SECONDS = 5.0  # Between progress lines where there is no terminal.


class Progress:
  """A bar at the foot of a terminal; elsewhere a line every few seconds.

  Args:
    num_steps: steps in all.
    start_step: steps taken so far.
    header: printed once at the start.
  """

  def __init__(self, num_steps: int, start_step: int, header: str):
    self._num_steps = num_steps
    self._first: tuple[int, float] | None = None
    self._next = 0.0
    self._bar = _make_bar() if sys.stdout.isatty() else None
    if header:
      self._print(header)
    if self._bar is not None:
      self._bar.start()
      self._bar.add_task('compiling', total=num_steps, completed=start_step)

  def write(self, row):
    step = row['step']
    text = f'{_summary(row)}  ETA {self._eta(step)}'
    now = time.monotonic()
    if self._bar is not None:
      task = self._bar.task_ids[0]
      self._bar.update(task, completed=step, description=text)
    elif now >= self._next or step == self._num_steps:
      self._next = now + _LINE_SECONDS
      self._print(f'step {step}/{self._num_steps}  {text}')
    for line in _eval_lines(row):
      self._print(line)

  def _print(self, text):
    if self._bar is None:
      print(text, flush=True)
    else:  # Above the bar.
      self._bar.console.print(text, markup=False, highlight=False)

  def _eta(self, step):
    """Goes by the rows since the first, whose step compiled the program."""
    now = time.monotonic()
    if self._first is None:
      self._first = step, now
    first_step, start = self._first
    if step == first_step:
      return '-'
    per_step = (now - start) / (step - first_step)
    return _duration(per_step * max(0, self._num_steps - step))

  def flush(self):
    pass

  def close(self):
    if self._bar is not None:
      self._bar.stop()


def _make_bar():
  # Only needed at a terminal.
  from rich import progress

  return progress.Progress(
    progress.BarColumn(bar_width=20),
    progress.MofNCompleteColumn(),
    progress.TextColumn('{task.description}', markup=False),
    refresh_per_second=4,
  )


def _summary(row: Mapping[str, Any]) -> str:
  tokens = row.get('tokens_per_second')
  speed = '' if tokens is None else f'  {tokens:,.0f} tokens/s'
  # Where terms are weighted, the loss alone does not say what is learned.
  names = [n for n in row if f'_{n}'.endswith('_nll') and '/' not in n]
  is_all = row.get('loss') == row.get('nll') or None in map(row.get, names)
  terms = '' if is_all else ''.join(f'  {n} {_number(row, n)}' for n in names)
  return f'loss {_number(row, "loss")}{terms}{speed}'


def _eval_lines(row: Mapping[str, Any]) -> list[str]:
  """Returns one line for each evaluated set."""
  sets: dict[str, list[str]] = {}
  for name in row:
    if name.startswith('eval/'):
      _, title, metric = name.split('/', 2)
      sets.setdefault(title, []).append(f'{metric} {_number(row, name)}')
  return [
    f'step {row["step"]}  eval {title}: {"  ".join(values)}'
    for title, values in sets.items()
  ]


def _number(row: Mapping[str, Any], name: str) -> str:
  if name in row.get('non_finite', ()):
    return 'not finite'
  value = row.get(name)
  return '-' if value is None else f'{value:.4g}'


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}'

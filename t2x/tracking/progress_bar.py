"""Shows the progress of a run: a bar at a terminal, lines elsewhere."""

from collections.abc import Mapping
import sys
import time
from typing import Any

_LINE_SECONDS = 5.0  # Between progress lines where there is no terminal.


class Progress:
  """Shows a bar at the foot of a terminal; elsewhere a line every few seconds.

  Args:
    num_steps: number of steps that the run takes in all.
    start_step: number of steps taken so far.
    header: text printed once at the start; empty for none.
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

  def write(self, row: Mapping[str, Any]) -> None:
    """Shows the row of a step, and one line for each set evaluated in it."""
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

  def _print(self, text: str) -> None:
    if self._bar is None:
      print(text, flush=True)
    else:  # Above the bar.
      self._bar.console.print(text, markup=False, highlight=False)

  def _eta(self, step: int) -> str:
    """Returns the time left, estimated from the steps after the first row's.

    The first step took longer: the program was compiled in it.
    """
    now = time.monotonic()
    if self._first is None:
      self._first = step, now
    first_step, start = self._first
    if step == first_step:
      return '-'
    per_step = (now - start) / (step - first_step)
    return _duration(per_step * max(0, self._num_steps - step))

  def flush(self) -> None:
    """Does nothing: rows are shown as they are written."""

  def close(self) -> None:
    """Takes the bar off the terminal's foot; a last state of it stays."""
    if self._bar is not None:
      self._bar.stop()


def _make_bar() -> Any:
  """Returns a `rich.progress.Progress`."""
  # Imported here, since it is needed at a terminal alone.
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

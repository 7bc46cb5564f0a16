"""A schedule as text to look at, and as CSV to keep.

  # name=zb_h1 microbatches=8 chunks=1 placement=loop recompute=0 training=1
  tick,stage 0,stage 1
  0,F0,
  1,F1,F0

An entry is the operation's letter, the microbatch and, where a stage has
several, `.` and the chunk; an idle stage has none.
"""

import functools
import re

import numpy as np

from t2x import paths
from t2x import reading
from t2x.pipeline import operations as ops
from t2x.pipeline import schedule as schedule_lib

# No more digits than an int32 holds.
_ENTRY = re.compile(r'([FBWR])(\d{1,9})(?:\.(\d{1,9}))?')
_KEYS = (
  'name',
  'microbatches',
  'chunks',
  'placement',
  'recompute',
  'training',
)


def entry(schedule: schedule_lib.Schedule, tick: int, stage: int) -> str:
  """What a stage does in a tick: 'F3', 'B0.1', or '' if nothing."""
  kind = schedule.operation_TS[tick, stage]
  if kind == ops.IDLE:
    return ''
  micro = schedule.microbatch_TS[tick, stage]
  chunk = schedule.chunk_TS[tick, stage]
  return f'{ops.LETTERS[kind]}{micro}' + f'.{chunk}' * (schedule.num_chunks > 1)


def text(schedule: schedule_lib.Schedule) -> str:
  """Returns a line for each stage, with a column for each tick."""
  ticks = range(schedule.num_ticks)
  lines = []
  entries = [
    [entry(schedule, tick, stage) for tick in ticks]
    for stage in range(schedule.num_stages)
  ]
  width = max(map(len, (e for row in entries for e in row)))
  label = len(str(schedule.num_stages - 1))
  for stage, row in enumerate(entries):
    line = ' '.join((e or '.').ljust(width) for e in row).rstrip()
    lines.append(f'stage {stage:{label}}  {line}')
  return '\n'.join(lines)


def to_csv(schedule: schedule_lib.Schedule) -> str:
  """Returns the table with a line for each tick, and what else it is."""
  values = (
    schedule.name,
    schedule.num_microbatches,
    schedule.num_chunks,
    schedule.placement,
    int(schedule.recompute),
    int(schedule.training),
  )
  stages = range(schedule.num_stages)
  lines = [
    '# ' + ' '.join(f'{key}={value}' for key, value in zip(_KEYS, values)),
    ','.join(['tick', *(f'stage {stage}' for stage in stages)]),
  ]
  for tick in range(schedule.num_ticks):
    entries = [entry(schedule, tick, stage) for stage in stages]
    lines.append(','.join([str(tick), *entries]))
  return '\n'.join(lines) + '\n'


def read(path: str) -> schedule_lib.Schedule:
  """Reads a table from a file, local or remote.

  Raises:
    ValueError: there is no such file, or it holds no table; it is named.
  """
  file = paths.path(path)
  if not file.exists():
    raise ValueError(
      f'{path}: there is no such file. A run keeps a copy of its table, '
      'WORKDIR/schedule.csv; scripts/show_schedule.py --csv=FILE writes one.'
    )
  text = reading.text(file)
  try:
    return _parsed(text)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error


@functools.lru_cache(maxsize=4)
def _parsed(text: str) -> schedule_lib.Schedule:
  """As `from_csv`, once for a text: a search for layouts reads it often."""
  return from_csv(text)


def from_csv(text: str) -> schedule_lib.Schedule:
  """Reads a table that `to_csv` wrote, perhaps changed by hand.

  Raises:
    ValueError: a line is not of that form, which is named; or whatever
      `Schedule` refuses.
  """
  lines = text.splitlines()
  if len(lines) < 3:
    raise ValueError(
      f'A schedule has a line of settings, one of names and one for each '
      f'tick; here are {len(lines)} lines.'
    )
  values = _settings(lines[0])
  stages = lines[1].split(',')[1:]
  if lines[1].split(',')[0] != 'tick' or not stages:
    raise ValueError(
      f"line 2: {lines[1]!r} is not of the form 'tick,stage 0,stage 1,...'."
    )
  tables = np.zeros((3, len(lines) - 2, len(stages)), np.int32)
  for tick, line in enumerate(lines[2:]):
    cells = line.split(',')
    if len(cells) != 1 + len(stages) or cells[0] != str(tick):
      raise ValueError(
        f'line {tick + 3}: {line!r}; tick {tick} and {len(stages)} entries '
        'are needed.'
      )
    for stage, cell in enumerate(cells[1:]):
      match = _ENTRY.fullmatch(cell.strip())
      if match:
        letter, micro, chunk = match.groups()
        kind = ops.LETTERS.index(letter)
        tables[:, tick, stage] = kind, int(micro), int(chunk or 0)
      elif cell.strip():
        raise ValueError(
          f'line {tick + 3}, stage {stage}: {cell!r} is no entry; they are '
          "like 'F3' or, with chunks, 'F3.1'."
        )
  return schedule_lib.Schedule(
    operation_TS=tables[0],
    microbatch_TS=tables[1],
    chunk_TS=tables[2],
    **values,
  )


def _settings(line: str) -> dict:
  pairs = [word.partition('=') for word in line.removeprefix('#').split()]
  found = {key: value for key, _, value in pairs}
  numbers = [found.get(key, '') for key in _KEYS if key != 'placement'][1:]
  if set(found) != set(_KEYS) or not all(n.isdigit() for n in numbers):
    keys = ' '.join(f'{key}=...' for key in _KEYS)
    raise ValueError(f"line 1: {line!r} is not of the form '# {keys}'.")
  return {
    'name': found['name'],
    'num_microbatches': int(found['microbatches']),
    'num_chunks': int(found['chunks']),
    'placement': found['placement'],
    'recompute': found['recompute'] != '0',
    'training': found['training'] != '0',
  }

"""Formats a schedule's table as text, and writes and reads it as CSV.

  # name=zb_h1 microbatches=8 chunks=1 placement=loop recompute=0 training=1
  tick,stage 0,stage 1
  0,F0,
  1,F1,F0

An entry is the letter of the operation and the microbatch. Where a stage has
several chunks, `.` and the chunk follow. The entry of an idle stage is empty.
"""

import re
from typing import Any

import numpy as np

from t2x.pipeline import operations as ops
from t2x.pipeline import table as table_lib

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


def entry(table: table_lib.Table, tick: int, stage: int) -> str:
  """Returns the entry of a tick and a stage: 'F3', 'B0.1', or '' if idle."""
  kind = table.operation_TS[tick, stage]
  if kind == ops.IDLE:
    return ''
  micro = table.microbatch_TS[tick, stage]
  chunk = table.chunk_TS[tick, stage]
  return f'{ops.LETTERS[kind]}{micro}' + f'.{chunk}' * (table.num_chunks > 1)


def text(table: table_lib.Table) -> str:
  """Returns a table with a line for each stage and a column for each tick."""
  ticks = range(table.num_ticks)
  lines = []
  entries = [
    [entry(table, tick, stage) for tick in ticks]
    for stage in range(table.num_stages)
  ]
  width = max(map(len, (e for row in entries for e in row)))
  label = len(str(table.num_stages - 1))
  for stage, row in enumerate(entries):
    line = ' '.join((e or '.').ljust(width) for e in row).rstrip()
    lines.append(f'stage {stage:{label}}  {line}')
  return '\n'.join(lines)


def to_csv(table: table_lib.Table) -> str:
  """Returns a table as CSV: its settings, then a line for each tick."""
  values = (
    table.name,
    table.num_microbatches,
    table.num_chunks,
    table.placement,
    int(table.recompute),
    int(table.training),
  )
  stages = range(table.num_stages)
  lines = [
    '# ' + ' '.join(f'{key}={value}' for key, value in zip(_KEYS, values)),
    ','.join(['tick', *(f'stage {stage}' for stage in stages)]),
  ]
  for tick in range(table.num_ticks):
    entries = [entry(table, tick, stage) for stage in stages]
    lines.append(','.join([str(tick), *entries]))
  return '\n'.join(lines) + '\n'


def parse_csv(text: str) -> dict[str, Any]:
  """Returns the fields of a table in the form of `to_csv`.

  Raises:
    ValueError: a line has another form; the message gives the line.
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
  return {
    'operation_TS': tables[0],
    'microbatch_TS': tables[1],
    'chunk_TS': tables[2],
    **values,
  }


def _settings(line: str) -> dict[str, Any]:
  pairs = [word.partition('=') for word in line.removeprefix('#').split()]
  given = {key: value for key, _, value in pairs}
  numbers = [given.get(key, '') for key in _KEYS if key != 'placement'][1:]
  if set(given) != set(_KEYS) or not all(n.isdigit() for n in numbers):
    keys = ' '.join(f'{key}=...' for key in _KEYS)
    raise ValueError(f"line 1: {line!r} is not of the form '# {keys}'.")
  return {
    'name': given['name'],
    'num_microbatches': int(given['microbatches']),
    'num_chunks': int(given['chunks']),
    'placement': given['placement'],
    'recompute': given['recompute'] != '0',
    'training': given['training'] != '0',
  }

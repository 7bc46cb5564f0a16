r"""A pipeline schedule: its table, bubbles and memory, and a drawing.

python scripts/show_schedule.py --schedule=zb_h1 --stages=4 --microbatches=8 \
    [--chunks=1] [--recompute] [--costs=F,B,W] [--svg=FILE] [--csv=FILE]
    [--json]
python scripts/show_schedule.py --schedule=generated --limit=12 --chunks=2 \
    --stages=4 --microbatches=16 --costs=1,1.3,0.8 [--placement=v] --csv=FILE
python scripts/show_schedule.py --schedule=FILE.csv

Prints a line for each stage with a column for each tick (F forward, B gradient
of the input, W gradient of the weights, R forward again; then the microbatch,
and the chunk if there are several), and what the schedule costs:

- bubble: 1 - work / (stages x span), the span from the first operation to the
  last over all stages, where an operation waits for nothing but its stage and
  what it needs.
- bubble_executed: the same as the executor runs it, in lock-step: a tick lasts
  as long as its dearest operation. The drawing shows this one.
- bubble_per_stage: the idle share between a stage's own first and last
  operation, which the papers on zero bubbles report.
- peak_in_flight: microbatches of a stage's parts between F and W, at most (of
  two chunks, a part is half of the stage's layers).
- uniform: what a device has to do with `pipeline.uniform=true`, where all do
  whatever one of them does in a tick, over what is its own.

--schedule is gpipe, one_f_one_b, interleaved, breadth_first, zb_h1, zb_h2 or
zb_v; `generated` for one that is made for the costs, with at most --limit in
flight on a stage, and its chunks in a --placement (`v`: there and back); or a
table that --csv has kept, perhaps changed by hand. A run takes it by
`--set pipeline.schedule=FILE.csv`. --chunks are parts a stage; without it the
schedule's own: 2 for interleaved, breadth_first and zb_v, otherwise 1. --svg
draws a Gantt chart, as .png where the name ends so. --json prints one object,
whose `table` has for each tick and stage the operation, microbatch and chunk,
or null where the stage is idle.
"""

import json
import pathlib
import sys
from typing import Any

from absl import flags

from t2x import main
from t2x.pipeline import operations as ops
from t2x.pipeline import schedule as schedule_lib
from t2x.pipeline import schedules
from t2x.pipeline import simulation
from t2x.pipeline import table_search

_SCHEDULE = flags.DEFINE_string('schedule', None, 'Its name.', required=True)
_STAGES = flags.DEFINE_integer('stages', None, 'Stages.')
_MICROBATCHES = flags.DEFINE_integer(
  'microbatches', None, 'Microbatches of a step.'
)
_CHUNKS = flags.DEFINE_integer('chunks', None, 'Default: of the schedule.')
_RECOMPUTE = flags.DEFINE_bool('recompute', False, 'An R before every B.')
_COSTS = flags.DEFINE_string('costs', '1,1,1', 'Of F, B, W and perhaps R.')
_LIMIT = flags.DEFINE_float('limit', None, 'Of a generated one, in flight.')
_PLACEMENT = flags.DEFINE_enum(
  'placement', None, ['loop', 'v'], "Of a generated one's chunks: loop or v."
)
_SVG = flags.DEFINE_string('svg', None, 'File to draw to, .svg or .png.')
_CSV = flags.DEFINE_string('csv', None, 'File to write the table to.')
_JSON = flags.DEFINE_bool('json', False, 'Print one JSON object.')


def show() -> None:
  costs = simulation.parse_costs(_COSTS.value)
  table = make(costs)
  simulated = table.simulate(costs)
  if _SVG.value:
    table.draw(_SVG.value, costs)
  if _CSV.value:
    file = pathlib.Path(_CSV.value)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(table.to_csv(), encoding='utf-8')
  if _JSON.value:
    print(json.dumps(to_json(simulated)))
    return
  print(table.text())
  print(figures(simulated))
  for name in (_SVG.value, _CSV.value):
    if name:
      print(f'Written: {name}')


def make(costs: simulation.Costs) -> schedule_lib.Schedule:
  """Returns the table that the flags ask for."""
  name = _SCHEDULE.value
  numbers = {'stages': _STAGES.value, 'microbatches': _MICROBATCHES.value}
  given = [n for n, value in numbers.items() if value is not None]
  if name.endswith('.csv'):
    others = {
      'chunks': _CHUNKS.value,
      'recompute': _RECOMPUTE.value or None,
      'limit': _LIMIT.value,
      'placement': _PLACEMENT.value,
    }
    given += [n for n, value in others.items() if value is not None]
    if given:
      sys.exit(f'error: --{given[0]}: {name} says it itself; leave it out.')
    return schedule_lib.read(name)
  if len(given) < len(numbers):
    sys.exit(f'error: --schedule={name} needs --stages and --microbatches.')
  limit = _LIMIT.value
  if (name == 'generated') != (limit is not None):
    sys.exit(
      'error: --limit, how much may be in flight on a stage, and '
      '--schedule=generated go together; give both or neither.'
    )
  if _PLACEMENT.value and limit is None:
    sys.exit('error: --placement is of --schedule=generated alone.')
  sizes: dict[str, Any] = {f'num_{key}': n for key, n in numbers.items()}
  sizes['recompute'] = _RECOMPUTE.value
  if _CHUNKS.value is not None:
    sizes['num_chunks'] = _CHUNKS.value
  if limit is not None:
    sizes['placement'] = _PLACEMENT.value or 'loop'
    return table_search.search(**sizes, limit=limit, costs=costs)
  return schedules.make(name, **sizes)


def to_json(simulated: simulation.Simulation) -> dict:
  table = simulated.schedule
  entries = [
    [
      {'operation': ops.LETTERS[kind], 'microbatch': m, 'chunk': c}
      if kind != ops.IDLE
      else None
      for kind, m, c in zip(*row)
    ]
    for row in zip(
      table.operation_TS.tolist(),
      table.microbatch_TS.tolist(),
      table.chunk_TS.tolist(),
    )
  ]
  return {
    'schedule': table.name,
    'stages': table.num_stages,
    'microbatches': table.num_microbatches,
    'chunks': table.num_chunks,
    'placement': table.placement,
    'ticks': table.num_ticks,
    'bubble': simulated.bubble,
    'bubble_executed': simulated.bubble_executed,
    'bubble_per_stage': list(simulated.bubble_per_stage),
    'peak_in_flight': list(simulated.peak_in_flight),
    'uniform': simulated.uniform,
    'table': entries,
  }


def figures(simulated: simulation.Simulation) -> str:
  """The numbers below the table."""
  table = simulated.schedule
  per_stage = ' '.join(f'{share:.1%}' for share in simulated.bubble_per_stage)
  chunks = f'{table.num_chunks} chunk{"s" * (table.num_chunks > 1)} a stage'
  in_flight = ' '.join(map(str, simulated.peak_in_flight))
  return (
    f'\n{table.name}: {table.num_stages} stages, {table.num_microbatches} '
    f'microbatches, {chunks}\n'
    f'ticks             {table.num_ticks}\n'
    f'bubble            {simulated.bubble:.2%}\n'
    f'bubble_executed   {simulated.bubble_executed:.2%}\n'
    f'bubble_per_stage  {per_stage}\n'
    f'peak_in_flight    {in_flight}\n'
    f'uniform           {simulated.uniform:.2f} x the work'
  )


if __name__ == '__main__':
  main.app_run(show)

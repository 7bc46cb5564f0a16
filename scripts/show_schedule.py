r"""A pipeline schedule: its table, bubbles and memory, and a drawing.

python scripts/show_schedule.py --schedule=zb_h1 --stages=4 --microbatches=8 \
    [--chunks=1] [--recompute] [--costs=F,B,W] [--svg=FILE] [--csv=FILE]
    [--json]

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
- peak_in_flight: microbatches of a stage's parts between F and W, at most.

--schedule is gpipe, one_f_one_b, interleaved, breadth_first, zb_h1, zb_h2 or
zb_v. --chunks are parts a stage; without it the schedule's own: 2 for
interleaved, breadth_first and zb_v, otherwise 1. --svg draws a Gantt chart, as
.png where the name ends so; --csv keeps the table. --json prints one object,
whose `table` has for each tick and stage the operation, microbatch and chunk,
or null where the stage is idle.
"""

import json
import pathlib

from absl import flags

from t2x import main
from t2x.pipeline import operations as ops
from t2x.pipeline import schedules
from t2x.pipeline import simulation

_SCHEDULE = flags.DEFINE_string('schedule', None, 'Its name.', required=True)
_STAGES = flags.DEFINE_integer('stages', None, 'Stages.', required=True)
_MICROBATCHES = flags.DEFINE_integer(
  'microbatches', None, 'Microbatches of a step.', required=True
)
_CHUNKS = flags.DEFINE_integer('chunks', None, 'Default: of the schedule.')
_RECOMPUTE = flags.DEFINE_bool('recompute', False, 'An R before every B.')
_COSTS = flags.DEFINE_string('costs', '1,1,1', 'Of F, B, W and perhaps R.')
_SVG = flags.DEFINE_string('svg', None, 'File to draw to, .svg or .png.')
_CSV = flags.DEFINE_string('csv', None, 'File to write the table to.')
_JSON = flags.DEFINE_bool('json', False, 'Print one JSON object.')


def show() -> None:
  costs = simulation.parse_costs(_COSTS.value)
  table = schedules.make(
    _SCHEDULE.value,
    num_stages=_STAGES.value,
    num_microbatches=_MICROBATCHES.value,
    num_chunks=_CHUNKS.value,
    recompute=_RECOMPUTE.value,
  )
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
    'table': entries,
  }


def figures(simulated: simulation.Simulation) -> str:
  """The numbers below the table."""
  table = simulated.schedule
  per_stage = ' '.join(f'{share:.1%}' for share in simulated.bubble_per_stage)
  in_flight = ' '.join(map(str, simulated.peak_in_flight))
  return (
    f'\n{table.name}: {table.num_stages} stages, {table.num_microbatches} '
    f'microbatches, {table.num_chunks} chunks a stage\n'
    f'ticks             {table.num_ticks}\n'
    f'bubble            {simulated.bubble:.2%}\n'
    f'bubble_executed   {simulated.bubble_executed:.2%}\n'
    f'bubble_per_stage  {per_stage}\n'
    f'peak_in_flight    {in_flight}'
  )


if __name__ == '__main__':
  main.app_run(show)

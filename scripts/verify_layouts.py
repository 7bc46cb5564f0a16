r"""Does a layout compute what one device does?

python scripts/verify_layouts.py --experiment=gpt2_tiny \
    --layout data=2,fsdp=2,tensor=2 --layout context=4,train.accumulate=2

Trains the experiment a few steps on one device and in each layout, on devices
that the CPU simulates (or on real ones, with JAX_PLATFORMS=tpu or cuda), in
float32 and from the same seed: `t2x/verification/verify.py` says what is
compared. Shrink a large experiment: --set model.num_layers=2 --set
data.batch_size=8. Of several processes, each takes its part of a layout and all
of the reference:

python scripts/launch_local.py --num_processes=2 --devices_per_process=4 -- \
    scripts/verify_layouts.py --experiment=gpt2_tiny --layout data=4,tensor=2

Exit code 1 where a layout is past the tolerance. With --json the last line is
an object with a list `layouts`; of each, `layout`, `max_relative_deviation`,
`worst_parameter`, `tolerance`, `ok`, and more.
"""

import json
import sys

from absl import flags
import jax

from t2x import main as main_lib
from t2x.config import catalog
from t2x.config import experiment
from t2x.config import layout_flag
from t2x.multihost import processes
from t2x.parallel import simulated_devices
from t2x.verification import report
from t2x.verification import verify


def main() -> None:
  flags.DEFINE_string(
    'experiment', None, 'NAME of experiments/NAME.py, or a path.'
  )
  flags.DEFINE_string('config', None, 'A saved config.json instead.')
  flags.DEFINE_multi_string(
    'layout',
    [],
    'Sizes of mesh axes, and settings of this layout alone, as in '
    'data=2,tensor=2,rules.norm_length=context,tensor; may repeat. What has no '
    '"=" belongs to the value before it. Axes that are not named have size 1. '
    '--set is for all layouts and for the one device.',
  )
  flags.DEFINE_integer('steps', 5, 'Steps that are compared.', lower_bound=1)
  flags.DEFINE_float(
    'tolerance',
    verify.TOLERANCE,
    'Largest deviation that is rounding.',
    lower_bound=0.0,
  )
  flags.DEFINE_bool('details', False, 'Show every step and every parameter.')
  flags.DEFINE_bool('json', False, 'End with a line of JSON.')
  main_lib.define_set_flag()
  main_lib.define_process_flags()
  main_lib.app_run(_main)


def _main() -> None:
  values = flags.FLAGS
  layouts = layout_flag.parse_all(values.layout)
  config = main_lib.resolve(lambda: catalog.load(values.experiment))
  _simulate(max(layout.num_devices for layout in layouts))
  main_lib.use_compilation_cache()
  with main_lib.joined_processes():
    ok = _show(config, layouts)
  if not ok:
    sys.exit(1)


def _simulate(num: int) -> None:
  """Asks for so many devices of the CPU, before the first is touched."""
  if jax.config.values['jax_platforms'] is None:
    jax.config.update('jax_platforms', 'cpu')
  simulated_devices.ask_for(num)


def _show(
  config: experiment.Experiment, layouts: list[layout_flag.Layout]
) -> bool:
  """Prints what is found, as it is found; returns whether all is well."""
  values = flags.FLAGS
  say = _say if processes.is_primary() else lambda _: None
  names = [layout.text for layout in layouts]
  found = []
  for verdict in verify.verify(
    config, layouts, num_steps=values.steps, tolerance=values.tolerance
  ):
    if not found:
      say(_title(config, values) + '\n\n' + report.header(names))
    found.append(verdict)
    say(report.row(verdict, names))
    if values.details:
      say('\n'.join(report.steps(verdict)))
  say('\n' + report.explanation(found[0]))
  for verdict in found:
    if not verdict.ok:
      say('\n' + report.parting(verdict))
  if values.json:
    say(json.dumps({'layouts': [report.to_json(v) for v in found]}))
  return all(verdict.ok for verdict in found)


def _title(config: experiment.Experiment, values) -> str:
  data = config.data
  return (
    f'{values.experiment or values.config}: {values.steps} steps of '
    f'{data.batch_size} x {data.length} tokens against one device, in float32'
  )


def _say(text: str) -> None:
  print(text, flush=True)


if __name__ == '__main__':
  main()

r"""What a run would cost on a TPU or GPU pod, by its compiler, on a laptop.

python scripts/plan.py --experiment=llama2_7b --topology=v5e:4x4 \
    [--num_slices=2] [--layout=fsdp=16] [--set NAME=VALUE ...] \
    [--html=FILE] [--json]
python scripts/plan.py --experiment=llama2_7b --topology=v5e:4x4 --search \
    [--most=6] [--processes=2] [--seconds=900] [--cache=DIR]
python scripts/plan.py --experiment=llama2_7b --topology=v5e:4x4 --estimate

Compiles the run's train step for the topology and prints, of one device: memory
by part and module, and whether it fits; FLOPs of the model and of the program;
what is sent, along which mesh axis, and whether products run beside it; the
least time of a step by a roofline model; and warnings with a remedy.

--topology is a kind of TPU and the shape of a slice in chips (v4, v5e, v5p,
v6e, 7x: v5e:4x4, v5p:4x4x8), or a kind of GPU and their number in a node
(h100:8); there are --num_slices of them. `cpu:8` are devices that this machine
simulates. TPUs need the extra `plan`, GPUs `plan-gpu`; no accelerator is
touched. Without --layout the experiment's own mesh is taken. --json prints the
same as one object in the last line, --html writes a page.

--search looks for the layout, recomputation and microbatches that take the
least time: all that can be are estimated, the --most promising compiled,
--processes at a time, until --seconds are over. What was compiled is kept in
--cache, so that the same command goes on. --estimate prints what a step should
cost without compiling anything.
"""

import json
import os
import pathlib
import sys

# This machine's own accelerators are left alone.
os.environ['JAX_PLATFORMS'] = 'cpu'

from absl import flags

from t2x import main as main_lib
from t2x.config import layout_advice
from t2x.cost_model import estimate
from t2x.hardware import machines
from t2x.planning import advice as advice_lib
from t2x.planning import estimate_text
from t2x.planning import memory
from t2x.planning import page
from t2x.planning import plan as plan_lib
from t2x.planning import remedies
from t2x.planning import search
from t2x.planning import target_flags
from t2x.planning import text as text_lib
from t2x.planning import trials
from t2x.tracking import text_table


def main() -> None:
  target_flags.define()
  flags.DEFINE_string('html', None, 'File to write the page to.')
  flags.DEFINE_bool('json', False, 'Print one JSON object in the last line.')
  flags.DEFINE_bool('advice', True, 'Warn of what could be mended.')
  flags.DEFINE_bool('estimate', False, 'Only estimate, in seconds.')
  flags.DEFINE_bool('search', False, 'Look for the fastest layout.')
  flags.DEFINE_integer('most', 6, 'Layouts to compile.', lower_bound=1)
  flags.DEFINE_integer(
    'processes', None, 'At a time; default one a core.', lower_bound=1
  )
  flags.DEFINE_integer(
    'seconds', 900, 'After which none is waited for.', lower_bound=1
  )
  flags.DEFINE_string('cache', None, 'Default ~/.cache/t2x/plans.')
  main_lib.app_run(_main)


def _main() -> None:
  values = flags.FLAGS
  if values.search and (values.layout or values.html or values.estimate):
    sys.exit(
      'error: --search looks for the layout and prints a table: leave out '
      '--layout, --html and --estimate.'
    )
  for name in ('most', 'processes', 'seconds', 'cache'):
    if flags.FLAGS[name].present and not values.search:
      sys.exit(f'error: --{name} is for --search: give both, or neither.')
  if values.estimate and values.html:
    sys.exit('error: --estimate prints lines alone: leave out --html.')
  name, config = target_flags.experiment_of()
  devices = target_flags.devices()
  if values.search:
    _search(name, config, len(devices))
    return
  config = target_flags.laid_out(config, devices)
  if values.estimate:
    _estimate(name, config, devices)
    return
  where = text_lib.where(values.topology, values.num_slices)
  if not values.json:  # The compiler says nothing until it is done.
    print(f'Compiling for {where} ...', file=sys.stderr, flush=True)
  plan = plan_lib.make(config, values.topology, values.num_slices)
  advice = []
  if values.advice:
    advice = advice_lib.of(config, plan, target_flags.flags_for)
  print(text_lib.text(name, plan, advice))
  if values.html:
    file = pathlib.Path(values.html)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page.page(name, plan, advice), encoding='utf-8')
    print(f'The page is {file}')
  if values.json:
    print(json.dumps({'experiment': name, **text_lib.to_json(plan, advice)}))


def _estimate(name: str, config, devices) -> None:
  values = flags.FLAGS
  found = estimate.step(config, len(devices))
  limit = memory.limit_of(machines.chip_of(devices[0].device_kind))
  where = values.topology, values.num_slices
  print(text_lib.title(name, *where, found.sizes) + ', estimated\n')
  print(estimate_text.text(found, limit))
  if limit is not None and found.peak_bytes > limit:
    said = remedies.remedy(config, *where, target_flags.flags_for)
    print(f'\nwarning: {said}')
  if values.json:
    told = {
      'experiment': name,
      'topology': values.topology,
      'num_slices': values.num_slices,
    }
    print(json.dumps({**told, **estimate_text.to_json(found, limit)}))


def _search(name: str, config, num_devices: int) -> None:
  values = flags.FLAGS
  where = values.topology, values.num_slices
  found = search.candidates(config, *where)
  fitting = sum(c.fits for c in found)
  ways = f'{len(found)} ways to run {name} on {text_lib.where(*where)}'
  _say(f'{ways}; {fitting} should fit.')
  if not found:
    layout_advice.check(config, num_devices, num_slices=values.num_slices)
    return
  trials.check(name, found, values.topology, num_devices)
  root = os.environ.get('T2X_DATA_DIR') or '~/.cache/t2x'
  cache = values.cache or os.path.join(root, 'plans')
  results = trials.compile_best(
    found,
    *where,
    command=[sys.executable, os.path.abspath(__file__)],
    cache=pathlib.Path(cache).expanduser(),
    most=values.most,
    processes=values.processes or os.cpu_count() or 1,
    seconds=values.seconds,
    say=_say,
  )
  print()
  rows = trials.table(results)
  print('\n'.join(text_table.aligned(rows, '<<>>>>>>')))
  for note in trials.notes(results):
    print(note)
  if values.json:
    ranked = [
      {
        'settings': r.candidate.settings,
        'plan': r.plan and {**r.plan, 'experiment': name},
      }
      for r in results
    ]
    print(json.dumps({'experiment': name, 'ranked': ranked}))


def _say(text: str) -> None:
  print(text, flush=True)


if __name__ == '__main__':
  main()

r"""What a sweep costs beyond its trials, and how large a study may grow.

python scripts/bench_sweep.py [--json] [--only=NAMES] [--trials=10000]

overhead   seconds that a sweep adds to each of 20 trials that take a moment
large      seconds to open, to suggest in, and to list a study of many trials
page       seconds and bytes of the report of 1,000 trials with 20 rows each
workers    trials lost or suggested twice by 8 workers in one study of 1,000
start      seconds before the first step of the first trial of a rate sweep, and
           of those that differ from it in the rate alone
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

os.environ['JAX_PLATFORMS'] = 'cpu'

from absl import flags

from t2x.config import catalog
from t2x.sweeps import definition
from t2x.sweeps import ownership
from t2x.sweeps import points
from t2x.sweeps import report
from t2x.sweeps import scheduler as scheduler_lib
from t2x.sweeps import search
from t2x.sweeps import space
from t2x.sweeps import study as study_lib
from t2x.sweeps import text
from t2x.sweeps.launchers import launcher as launcher_lib
from t2x.sweeps.launchers import local

_ROOT = pathlib.Path(__file__).parents[1]
_TRIAL = """
import json, pathlib, sys
workdir = pathlib.Path(sys.argv[1].partition('=')[2])
workdir.mkdir(parents=True, exist_ok=True)
row = {'step': 1, 'step_seconds': 0.0, 'eval/validation/loss': 1.0}
(workdir / 'metrics.jsonl').write_text(json.dumps(row) + '\\n')
(workdir / 'finished.json').write_text(json.dumps({'step': 1}))
"""


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  names = ('overhead', 'large', 'page', 'workers', 'start')
  parser.add_argument('--json', action='store_true')
  parser.add_argument('--only', default=','.join(names))
  parser.add_argument('--trials', type=int, default=10_000)
  parser.add_argument('--rounds', type=int, default=3)
  args = parser.parse_args()
  flags.FLAGS(sys.argv[:1])
  results = {}
  with tempfile.TemporaryDirectory() as directory:
    root = pathlib.Path(directory)
    for name in args.only.split(','):
      if name not in names:
        parser.error(f'--only={name}: it is among {", ".join(names)}.')
      found = globals()[f'_{name}'](root / name, args)
      results[name] = found
      for key, value in found.items():
        print(f'{name}: {key} {value}', flush=True)
  if args.json:
    print(json.dumps(results))


def _facts(num: int, **changes) -> study_lib.Facts:
  ranges = {
    'optim.learning_rate': space.LogUniform(1e-5, 1.0),
    'optim.weight_decay': space.Uniform(0.0, 1.0),
  }
  fields = {
    'parameters': ranges,
    'search': search.RandomSearch(num_trials=num),
    **changes,
  }
  return study_lib.Facts(
    experiment='gpt2_tiny',
    config=catalog.load('gpt2_tiny'),
    sweep=definition.Sweep(**fields),
  )


def _overhead(root: pathlib.Path, args: argparse.Namespace) -> dict:
  """Compares a sweep of trials with the trials themselves, in rounds."""
  root.mkdir()
  script = root / 'trial.py'
  script.write_text(_TRIAL)
  added = []
  for i in range(args.rounds):
    own = []
    for j in range(10):
      start = time.perf_counter()
      subprocess.run(
        [sys.executable, str(script), f'--workdir={root}/own{i}-{j}'],
        check=True,
      )
      own.append(time.perf_counter() - start)
    study = study_lib.create(root / f'study{i}', _facts(20))
    worker = scheduler_lib.Scheduler(
      study,
      local.LocalLauncher(local.LocalConfig(devices=1)),
      ownership.Workers(study.directory),
      command=lambda run, workdir: [
        sys.executable,
        str(script),
        f'--workdir={workdir}',
      ],
      say=lambda line: None,
    )
    start = time.perf_counter()
    worker.run()
    each = (time.perf_counter() - start) / 20
    added.append(each - statistics.median(own))
  return {
    'seconds added to a trial': round(statistics.median(added), 4),
    'limit': 0.3,
  }


def _recorded(root: pathlib.Path, num: int, rows: int) -> study_lib.Study:
  """Returns a new study of complete trials with so many rows each."""
  facts = _facts(num)
  study = study_lib.create(root, facts)
  sampled = search.RandomSearch(num_trials=num).points(facts.sweep.parameters)
  for i, point in enumerate(sampled):
    found = points.candidate(facts.config, facts.sweep, point)
    trial = study.begin(found, found.key, 'bench')
    last = float(i % 997)
    for step in range(1, rows + 1):
      study.report(trial, step, last + 1 / step)
    study.finish(trial, 'complete', last, seconds=1.0)
  return study


def _large(root: pathlib.Path, args: argparse.Namespace) -> dict:
  start = time.perf_counter()
  facts = _recorded(root, args.trials, rows=0).facts
  recorded = time.perf_counter() - start
  start = time.perf_counter()
  again = study_lib.read(root)
  opened = time.perf_counter() - start
  start = time.perf_counter()
  listed = len(text.table(again).splitlines())
  list_seconds = time.perf_counter() - start
  # The same study as a search by results.
  tpe = definition.Sweep(
    parameters=facts.sweep.parameters,
    search=search.Tpe(num_trials=args.trials + 1),
  )
  again.facts = study_lib.Facts(
    experiment=facts.experiment, config=facts.config, sweep=tpe
  )
  start = time.perf_counter()
  again.suggest()
  suggested = time.perf_counter() - start
  assert listed
  return {
    'trials': args.trials,
    'seconds to record one': round(recorded / args.trials, 5),
    'seconds to open': round(opened, 3),
    'seconds to list': round(list_seconds, 3),
    'seconds to suggest': round(suggested, 3),
    'limit': 2.0,
  }


def _page(root: pathlib.Path, args: argparse.Namespace) -> dict:
  num, rows = 1000, 20
  _recorded(root, num, rows)
  start = time.perf_counter()
  page, *_ = report.write(root)
  seconds = time.perf_counter() - start
  return {
    'trials': num,
    'seconds': round(seconds, 2),
    'seconds limit': 20.0,
    'bytes': pathlib.Path(page).stat().st_size,
    'bytes limit': 5_000_000,
  }


def _work(directory: str) -> None:
  """A worker whose trials are over at once."""
  flags.FLAGS(sys.argv[:1])
  study = study_lib.read(directory)
  worker = scheduler_lib.Scheduler(
    study,
    _AtOnce(),
    ownership.Workers(study.directory),
    command=lambda run, workdir: ['true'],
    say=lambda line: None,
    poll_seconds=0.0,
  )
  worker.run()


class _AtOnce:
  """A launcher whose jobs end as they begin, with a row and all steps."""

  stays: bool = True

  @property
  def devices(self) -> points.Devices:
    return points.Devices(number=1)

  def check(self) -> None:
    pass

  def render(self, jobs) -> str:
    return str(jobs)

  def find(self, job) -> None:
    return None

  def logs(self, handle, num_lines: int = 20) -> str:
    return ''

  def submit(self, jobs):
    for job in jobs:
      workdir = pathlib.Path(job.workdir)
      workdir.mkdir(parents=True)  # A second time fails.
      row = {'step': 1, 'eval/validation/loss': 1.0}
      (workdir / 'metrics.jsonl').write_text(json.dumps(row) + '\n')
      (workdir / 'finished.json').write_text('{"step": 1}')
    return [{} for _ in jobs]

  def state(self, handle):
    return launcher_lib.JobState(phase='ended')

  def cancel(self, handle) -> None:
    pass

  def close(self) -> None:
    pass


def _workers(root: pathlib.Path, args: argparse.Namespace) -> dict:
  num, workers = 1000, 8
  found = {}
  for name, way in (
    ('random', search.RandomSearch(num_trials=num)),
    ('tpe', search.Tpe(num_trials=num // 4)),
  ):
    facts = _facts(num, search=way)
    study = study_lib.create(root / name, facts)
    context = multiprocessing.get_context('spawn')
    children = [
      context.Process(target=_work, args=(str(root / name),))
      for _ in range(workers)
    ]
    start = time.perf_counter()
    for child in children:
      child.start()
    for child in children:
      child.join()
    seconds = time.perf_counter() - start
    trials = study.trials()
    keys = {trial.key for trial in trials}
    done = [t for t in trials if t.state == 'complete']
    found |= {
      f'{name}: trials': len(trials),
      f'{name}: complete': len(done),
      f'{name}: suggested twice': len(trials) - len(keys),
      f'{name}: exit statuses': [child.exitcode for child in children],
      f'{name}: seconds': round(seconds, 1),
    }
  return found


def _start(root: pathlib.Path, args: argparse.Namespace) -> dict:
  """Seconds until the first step begins, from an empty compilation cache."""
  root.mkdir()
  os.environ['JAX_COMPILATION_CACHE_DIR'] = str(root / 'cache')
  made = local.LocalLauncher(local.LocalConfig(devices=1))
  seconds = []
  for i in range(args.rounds + 1):
    workdir = root / f'run{i}'
    job = launcher_lib.LaunchJob(
      name=f'start-{i}',
      command=(
        'python',
        'experiments/gpt2_tiny.py',
        f'--workdir={workdir}',
        '--set',
        f'optim.learning_rate={1e-3 * (i + 1)}',
        '--set',
        'train.num_steps=3',
        '--set',
        'data.eval_splits=()',
      ),
      workdir=str(workdir),
      log=str(root / f'{i}.log'),
      group='start',
    )
    start = time.perf_counter()
    (handle,) = made.submit([job])
    rows = workdir / 'metrics.jsonl'
    while not (rows.exists() and rows.stat().st_size):
      if made.state(handle).is_over:
        raise SystemExit(made.logs(handle))
      time.sleep(0.02)
    first_row = time.perf_counter() - start
    while not made.state(handle).is_over:
      time.sleep(0.02)
    told = [json.loads(line) for line in rows.read_text().splitlines()]
    step = statistics.median(row['step_seconds'] for row in told[1:])
    seconds.append(first_row - step)
  made.close()
  later = statistics.median(seconds[1:])
  return {
    'seconds before the first step': round(seconds[0], 2),
    'of a later trial': round(later, 2),
    'ratio': round(seconds[0] / later, 2),
    'limit': 5.0,
  }


if __name__ == '__main__':
  main()

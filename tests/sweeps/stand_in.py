"""A process that leaves what a run leaves, without computing anything.

It takes a run's command line, goes on from the rows that are there, saves on
SIGTERM and ends. Its loss after a step is (log10(rate) + 2)**2 + 1 / step, with
a little of the seed, so that 1e-2 is the best rate. Of several processes, the
first does this; others wait for its end, and it for them, as JAX does.

STEPS: steps in all. PAUSE: seconds after each. DIE=STEP:TIMES: exit status 3
after a step, so many times. NAN_ABOVE: rate above which the loss is not finite.
SILENT: metrics have other names. NO_ROWS: nothing is written.
"""

import contextlib
import json
import math
import os
import pathlib
import signal
import sys
import time


def main() -> None:
  workdir, settings = pathlib.Path(), {}
  arguments = iter(sys.argv[1:])
  for argument in arguments:
    if argument == '--set':
      name, _, value = next(arguments).partition('=')
      settings[name] = value
    elif argument.startswith('--workdir='):
      workdir = pathlib.Path(argument.partition('=')[2])
  rate = float(settings.get('optim.learning_rate', '1e-3'))
  seed = int(settings.get('train.seed', '0'))
  stopped = []
  signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
  env = os.environ.get
  workdir.mkdir(parents=True, exist_ok=True)
  others = [a for a in sys.argv if a.startswith('--process_id=')]
  if others and others[0] != '--process_id=0':
    with open(workdir / 'others', 'a') as f:
      f.write(f'{os.getpid()}\n')
    while not stopped and not (workdir / 'finished.json').exists():
      time.sleep(0.02)
    return
  with open(workdir / 'starts', 'a') as f:
    f.write(f'{os.getpid()}\n')
  seen = os.environ.get('CUDA_VISIBLE_DEVICES', '')
  began = time.time()
  if env('NO_ROWS'):
    return
  stop = [a for a in sys.argv if a.startswith('--stop_after=')]
  stop_after = int(stop[0].partition('=')[2]) if stop else 10**9
  rows = workdir / 'metrics.jsonl'
  done = len(rows.read_text().splitlines()) if rows.exists() else 0
  die, _, times = env('DIE', '0:0').partition(':')
  metric = 'other' if env('SILENT') else 'eval/train/loss'
  steps = int(env('STEPS', '8'))
  with open(rows, 'a', buffering=1) as f:
    for step in range(done + 1, min(steps, stop_after) + 1):
      loss = (math.log10(rate) + 2) ** 2 + 1 / step + 1e-3 * seed
      row = {'step': step, 'step_seconds': 0.5, metric: loss}
      if rate > float(env('NAN_ABOVE', 'inf')):
        row |= {metric: None, 'non_finite': [metric], 'num_skipped': 10}
      f.write(json.dumps(row) + '\n')
      if 'non_finite' in row:
        sys.exit('error: values that are not finite')
      starts = len((workdir / 'starts').read_text().splitlines())
      if step == int(die) and starts <= int(times):
        print('died as asked', flush=True)
        sys.exit(3)
      if step == stop_after < steps:
        (workdir / 'stopped.json').write_text(json.dumps({'step': step}))
        return
      if stopped:
        return
      time.sleep(float(env('PAUSE', '0')))
  if others:
    _wait_for_another(workdir, stopped)
    if stopped:
      return
  had = {'seen': seen, 'began': began, 'ended': time.time()}
  (workdir / 'accelerators').write_text(json.dumps(had))
  (workdir / 'finished.json').write_text(json.dumps({'step': steps}))


def _wait_for_another(workdir: pathlib.Path, stopped: list[int]) -> None:
  """Waits while the last of the others does not run: it was killed, say."""
  import psutil  # The many runs of one process start sooner without it.

  others = workdir / 'others'
  while not stopped:
    with contextlib.suppress(OSError, IndexError, psutil.NoSuchProcess):
      last = psutil.Process(int(others.read_text().split()[-1]))
      if last.status() != psutil.STATUS_ZOMBIE:
        return
    time.sleep(0.02)


if __name__ == '__main__':
  main()

"""The most promising layouts of a search, compiled.

results = plan_trials.compile_best(found, 'v5e:4x4', 1, command=..., ...)

Those that should fit and take the least time are compiled in processes of
their own, and ranked by what the compiler says. What was compiled once is kept
on disk.
"""

from collections.abc import Callable
from collections.abc import Sequence
from concurrent import futures
import dataclasses
import hashlib
import json
import os
import pathlib
import subprocess
import tempfile
import time
from typing import Any

from t2x.compilation import fingerprint
from t2x.config import experiment
from t2x.config import overrides
from t2x.planning import remedies
from t2x.planning import search
from t2x.planning import text as text_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """What the compiler says of a candidate.

  Attributes:
    candidate: it.
    plan: as `text.to_json`; None where time was up or it failed.
    note: why there is none, or ''.
  """

  candidate: search.Candidate
  plan: dict[str, Any] | None
  note: str = ''


def check(
  name: str,
  found: Sequence[search.Candidate],
  topology: str,
  num_devices: int,
) -> None:
  """Raises ValueError where all candidates are clearly too large.

  Args:
    name: of the experiment.
    found: candidates, the leanest first where none should fit.
    topology: that they are for.
    num_devices: of it.
  """
  best = found[0]
  if best.fits or best.peak <= search.MARGIN * best.limit:
    return
  said = remedies.too_large(best.config, topology, num_devices, best.limit)
  raise ValueError(
    f'{name} on {topology}: {said} The leanest way ({short(best)}) takes '
    f'{best.peak / 2**30:,.1f} GiB, and a device has '
    f'{best.limit / 2**30:,.2f}.'
  )


def compile_best(
  found: Sequence[search.Candidate],
  topology: str,
  num_slices: int,
  *,
  command: Sequence[str],
  cache: pathlib.Path,
  most: int,
  processes: int,
  seconds: float,
  say: Callable[[str], None],
) -> list[Result]:
  """Compiles candidates in order, several at a time; the fastest first.

  Args:
    found: candidates, the most promising first.
    topology: as for `target_devices.devices`.
    num_slices: of it.
    command: that plans one: it is given --config, --topology, --num_slices
      and --json, and prints a plan as its last line.
    cache: directory of what was compiled before.
    most: how many to compile.
    processes: at a time.
    seconds: after which none is waited for.
    say: told what was compiled.
  """
  end = time.monotonic() + seconds

  def one(candidate: search.Candidate) -> Result:
    file = cache / f'{_key(candidate, topology, num_slices)}.json'
    if file.is_file():
      say(f'{short(candidate)}: known')
      return Result(candidate=candidate, plan=json.loads(file.read_text()))
    left = end - time.monotonic()
    if left <= 0:
      return Result(candidate=candidate, plan=None, note='time was up')
    with tempfile.TemporaryDirectory() as directory:
      saved = pathlib.Path(directory) / 'config.json'
      saved.write_text(overrides.dumps(candidate.config))
      flags = [f'--config={saved}', f'--topology={topology}']
      flags += [f'--num_slices={num_slices}', '--json', '--noadvice']
      start = time.monotonic()
      try:
        done = subprocess.run(
          [*command, *flags], capture_output=True, text=True, timeout=left
        )
      except subprocess.TimeoutExpired:
        return Result(candidate=candidate, plan=None, note='time was up')
    if done.returncode:
      last = (done.stderr.strip() or done.stdout.strip()).splitlines()
      note = last[-1] if last else f'exit status {done.returncode}'
      note = note.removeprefix('error: ')
      return Result(candidate=candidate, plan=None, note=note)
    plan = json.loads(done.stdout.strip().splitlines()[-1])
    cache.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f'.{os.getpid()}')
    part.write_text(json.dumps(plan))
    part.replace(file)
    say(f'{short(candidate)}: {time.monotonic() - start:.0f} s')
    return Result(candidate=candidate, plan=plan)

  with futures.ThreadPoolExecutor(processes) as pool:
    chosen = [c for c in found if c.fits] or found
    results = list(pool.map(one, chosen[:most]))
  return sorted(results, key=_compiled_order)


def _compiled_order(result: Result):
  plan = result.plan
  if plan is None or not plan['roofline']:
    return (2, 0.0)
  return (0 if plan['fits'] else 1, plan['roofline']['seconds'])


def short(candidate: search.Candidate) -> str:
  """Returns the settings that say something, in a line."""
  kept = [
    s.removeprefix('mesh.')
    for s in candidate.settings
    if not s.endswith('=1') and not s.startswith('mesh.dcn.data')
  ]
  return ' '.join(kept)


def _key(candidate: search.Candidate, topology: str, num_slices: int) -> str:
  source = fingerprint.of_source(candidate.config)
  outer = experiment.OUTER_SETTINGS
  config = {
    name: value
    for name, value in overrides.flatten(source['config']).items()
    if not name.startswith(tuple(outer))
  }
  parts = [
    config,
    source['code'],
    source['libraries'],
    fingerprint.compilers(),
    topology,
    num_slices,
  ]
  text = json.dumps(parts, sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()[:24]


def table(results: Sequence[Result]) -> list[list[str]]:
  """Returns a row of cells for each result, under a header."""
  rows = [
    ['', 'settings', 'peak GiB', 'estimated', 'step', 'estimated', 'MFU', 'by']
  ]
  for i, result in enumerate(results, 1):
    c, plan = result.candidate, result.plan
    gib = lambda size: f'{size / 2**30:.2f}'
    guess = [gib(c.peak), text_lib.time(c.seconds)]
    if plan is None or not plan['roofline']:
      cells = ['-', guess[0], '-', guess[1], '-', f'note {i}']
    else:
      r = plan['roofline']
      peak = gib(plan['memory']['peak_bytes'])
      cells = [peak, guess[0], text_lib.time(r['seconds']), guess[1]]
      cells += [f'{100 * r["mfu_limit"]:.1f}%', r['bound']]
    rows.append([str(i), short(result.candidate), *cells])
  return rows


def notes(results: Sequence[Result]) -> list[str]:
  """Returns why those have no figures that have none, a line each."""
  return [
    f'note {i}: {result.note or (result.plan and result.plan["refused"])}'
    for i, result in enumerate(results, 1)
    if result.plan is None or not result.plan['roofline']
  ]

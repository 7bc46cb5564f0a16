"""Compiles the most promising layouts of a search.

results = trials.compile_best(candidates, 'v5e:4x4', 1, command=..., ...)

The candidates that should fit and take the least time are compiled, each in a
process of its own, and ranked by the compiler's figures. Results are cached on
disk.
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
  """Result of compiling a candidate.

  Attributes:
    candidate: the candidate.
    plan: its plan, as `text.to_json` returns it; None if it was not compiled.
    note: reason why there is no plan, or ''.
  """

  candidate: search.Candidate
  plan: dict[str, Any] | None
  note: str = ''


def check(
  name: str,
  candidates: Sequence[search.Candidate],
  topology: str,
  num_devices: int,
) -> None:
  """Checks that not all candidates are clearly too large.

  Args:
    name: name of the experiment.
    candidates: the candidates, from `search.candidates`.
    topology: name of the topology that they are for.
    num_devices: number of devices of all its slices.

  Raises:
    ValueError: all candidates are too large, even without the margin.
  """
  best = candidates[0]
  if best.fits or best.peak <= search.MARGIN * best.limit:
    return
  too_large = remedies.too_large(best.config, topology, num_devices, best.limit)
  raise ValueError(
    f'{name} on {topology}: {too_large} The leanest way ({short(best)}) takes '
    f'{best.peak / 2**30:,.1f} GiB, and a device has '
    f'{best.limit / 2**30:,.2f}.'
  )


def compile_best(
  candidates: Sequence[search.Candidate],
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
  """Compiles the first candidates, several at a time.

  Args:
    candidates: the candidates, the most promising first.
    topology: name of a topology, as for `target_devices.devices`.
    num_slices: number of slices of that topology.
    command: command that plans one candidate. It is given --config,
      --topology, --num_slices, --json and --noadvice, and prints a plan as its
      last line.
    cache: directory of plans that were compiled before.
    most: largest number of candidates to compile.
    processes: number of processes that compile at the same time.
    seconds: time limit for all; a candidate not compiled by then has no plan.
    say: function that is called with a line of text for each candidate.

  Returns:
    The results, the fastest that fit first.
  """
  end = time.monotonic() + seconds

  def one(candidate: search.Candidate) -> Result:
    file = cache / f'{_key(candidate, topology, num_slices)}.json'
    if file.is_file():
      say(f'{short(candidate)}: known')
      return Result(candidate=candidate, plan=json.loads(file.read_text()))
    remaining = end - time.monotonic()
    if remaining <= 0:
      return Result(candidate=candidate, plan=None, note='time was up')
    with tempfile.TemporaryDirectory() as directory:
      saved = pathlib.Path(directory) / 'config.json'
      saved.write_text(overrides.dumps(candidate.config))
      flags = [f'--config={saved}', f'--topology={topology}']
      flags += [f'--num_slices={num_slices}', '--json', '--noadvice']
      start = time.monotonic()
      try:
        done = subprocess.run(
          [*command, *flags], capture_output=True, text=True, timeout=remaining
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
    chosen = [c for c in candidates if c.fits] or candidates
    results = list(pool.map(one, chosen[:most]))
  return sorted(results, key=_compiled_order)


def _compiled_order(result: Result) -> tuple[int, float]:
  plan = result.plan
  if plan is None or not plan['roofline']:
    return (2, 0.0)
  return (0 if plan['fits'] else 1, plan['roofline']['seconds'])


def short(candidate: search.Candidate) -> str:
  """Returns the settings of a candidate in a line, without sizes of 1."""
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
  """Returns a header and a row of cells for each result."""
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
  """Returns a line for each result without a plan that tells the reason."""
  return [
    f'note {i}: {result.note or (result.plan and result.plan["refused"])}'
    for i, result in enumerate(results, 1)
    if result.plan is None or not result.plan['roofline']
  ]

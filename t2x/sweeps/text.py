"""A study and a sweep as text: tables, and what a dry run says."""

from collections.abc import Sequence
import math

from t2x import files
from t2x.config import experiment
from t2x.cost_model import estimate
from t2x.hardware import machines
from t2x.models import flops as flops_lib
from t2x.sweeps import points
from t2x.sweeps import scheduler
from t2x.sweeps import search
from t2x.sweeps import space
from t2x.sweeps import study as study_lib
from t2x.sweeps.launchers import launcher as launcher_lib
from t2x.tracking import text_table

_MOST_SHOWN = 20  # Trials of a table at a terminal.
_MOST_PLANNED = 200  # Trials of a dry run.
_MOST_COMMANDS = 2  # Of a dry run, whole.


def summary(facts: study_lib.Facts) -> str:
  """Returns one line on a sweep: what it varies, and how often."""
  sweep = facts.sweep
  seeds = f' x {len(sweep.seeds)} seeds' if sweep.seeds else ''
  return (
    f'{facts.experiment}: {sweep.search.kind} over '
    f'{", ".join(sweep.parameters)}, {sweep.num_points} trials{seeds}, '
    f'{sweep.direction} {sweep.metric}'
  )


def plan(
  facts: study_lib.Facts,
  launcher: launcher_lib.Launcher,
  command: scheduler.Command,
  directory: str,
  checked: points.CheckedPoints,
) -> str:
  """Returns the trials of a sweep, their cost, and their commands.

  Args:
    facts: the experiment and the sweep.
    launcher: the launcher of its runs.
    command: function from a run and its workdir to its command line.
    directory: directory of the study.
    checked: its points.
  """
  sweep, devices = facts.sweep, launcher.devices
  lines = [summary(facts), '']
  if not isinstance(sweep.search, search.Planned):
    lines.append(
      f'{sweep.search.kind} suggests points from results; here are some of its '
      'space:'
    )
  shown = checked.possible[:_MOST_PLANNED]
  costs = _Costs(devices)
  rows, jobs = [['trial', *sweep.parameters, *costs.names]], []
  for number, point in enumerate(shown):
    found = points.candidate(facts.config, sweep, point)
    values = [_value(value) for value in point.values()]
    rows.append([str(number), *values, *costs.of(found)])
    if len(jobs) < _MOST_COMMANDS:
      jobs += [
        scheduler.job_of(run, command, files.path(directory))
        for run in found.runs
      ]
  lines += text_table.aligned(rows)
  if (more := len(checked.possible) - len(shown)) > 0:
    lines.append(f'and {more:,} more')
  if costs.total is not None and not more:
    lines.append(f'All together: {costs.total / 1e12:,.3g} TFLOP.')
  num = min(len(jobs), _MOST_COMMANDS)
  lines += ['', f'What is run, for the first {num} of these runs:', '']
  lines += [launcher.render(jobs[:num])]
  return '\n'.join(lines)


class _Costs:
  """Estimates of trials; of those that differ in numbers alone, once.

  Where the chip is known they have the least time of its matrix products, at
  its published rate, and say which trials are too large for its memory.
  """

  def __init__(self, devices: points.Devices):
    self._devices = devices
    self._known: dict[str, tuple[float, float]] = {}
    self._chip = machines.CHIPS[devices.chip] if devices.chip else None
    self.total: float | None = 0.0  # FLOPs of all; None if one is unknown.
    self.names = ['steps', 'TFLOP', 'GiB a device']
    self.names += ['least device hours'] if self._chip else []

  def of(self, found: points.PointRuns) -> list[str]:
    """Returns the columns of a trial, of all its runs."""
    config = found.runs[0].config
    key = points.structure_key(config)
    if key not in self._known:
      step = estimate.step(config, self._devices.number)
      flops = step.mean_flops * self._devices.number
      self._known[key] = flops, step.peak_bytes
    of_step, peak = self._known[key]
    steps = experiment.num_steps(config)
    memory = f'{peak / 2**30:.3g}'
    if self._chip and peak > self._chip.memory:
      memory += f' of {self._chip.memory / 2**30:.3g}: too large'
    if steps is None:
      self.total = None
      return ['?', '?', memory, *(['?'] if self._chip else [])]
    flops = of_step * steps * len(found.runs)
    if self.total is not None:
      self.total += flops
    columns = [str(steps), f'{flops / 1e12:,.3g}', memory]
    if self._chip:
      rate = flops_lib.peak_flops(self._chip.kinds[0], config.model.dtype)
      columns.append('?' if rate is None else f'{flops / rate / 3600:,.3g}')
    return columns


def table(study: study_lib.Study) -> str:
  """Returns the trials of a study, the best first, and how many there are.

  Those that nobody runs any more, since their worker has ended, are shown as
  interrupted: the sweep's command goes on with them.
  """
  sweep, trials = study.sweep, study.trials()
  sign = 1 if sweep.direction == 'minimize' else -1
  order = ('complete', 'running', 'interrupted', 'pruned', 'failed')
  left = study.interrupted(trials)

  def state_of(trial: study_lib.Trial) -> str:
    return 'interrupted' if trial.number in left else trial.state

  def rank(trial: study_lib.Trial) -> tuple[int, float, int]:
    value = math.inf if trial.value is None else sign * trial.value
    return order.index(trial.state), value, trial.number

  trials.sort(key=rank)
  rows = [
    ['trial', *sweep.parameters, sweep.metric, 'step', 'state', 'seconds']
  ]
  for trial in trials[:_MOST_SHOWN]:
    rows.append(
      [
        str(trial.number),
        *[_value(value) for value in trial.point.values()],
        _result(trial),
        str(max(trial.values, default='')),
        state_of(trial),
        _seconds(trial),
      ]
    )
  more = len(trials) - _MOST_SHOWN
  lines = text_table.aligned(rows)
  lines += [f'and {more} more'] if more > 0 else []
  counts = {state: 0 for state in order}
  for trial in trials:
    counts[state_of(trial)] += 1
  said = ', '.join(f'{n} {state}' for state, n in counts.items() if n)
  lines.append(f'{len(trials)} of {sweep.num_points} trials: {said or "none"}')
  for trial in trials:
    if trial.state == 'failed':
      lines.append(f'trial {trial.number} failed {trial.outcome.get("error")}')
  return '\n'.join(lines)


def _result(trial: study_lib.Trial) -> str:
  value = trial.value
  if value is None and trial.values:
    value = trial.values[max(trial.values)]
  if value is None:
    return ''
  return f'{value:.5g}' if math.isfinite(value) else 'diverged'


def _seconds(trial: study_lib.Trial) -> str:
  seconds = trial.outcome.get('seconds')
  return '' if seconds is None else f'{seconds:,.1f}'


def _value(value: space.Value) -> str:
  if isinstance(value, float):
    return f'{value:.5g}'
  return space.text(value)


def best_settings(study: study_lib.Study) -> Sequence[str]:
  """Returns the settings of the best trial, as --set takes them."""
  best = study.best()
  if best is None:
    return ()
  settings = space.settings_of(best.point)
  return tuple(f'{name}={value}' for name, value in settings.items())

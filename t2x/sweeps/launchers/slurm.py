"""Runs of a sweep as the tasks of SLURM job arrays.

A trial is one task of an array, of as many nodes as it needs, with a process on
each. SIGTERM comes some minutes before the time limit: the run saves, and its
task goes back into the queue and on from there. So it does where a task is
preempted or its node fails.
"""

from collections.abc import Sequence
import dataclasses
import os
import pathlib
import re
import shlex
import time
from typing import ClassVar

from t2x import field_checks
from t2x import files
from t2x.hardware import backends
from t2x.sweeps import points
from t2x.sweeps.launchers import launcher
from t2x.sweeps.launchers import processes
from t2x.sweeps.launchers import programs

_ROOT = pathlib.Path(__file__).resolve().parents[3]
_WAITS = (
  'PENDING',
  'CONFIGURING',
  'REQUEUED',
  'REQUEUE_HOLD',
  'REQUEUE_FED',
  'SPECIAL_EXIT',
  'RESV_DEL_HOLD',
  'SUSPENDED',
)
# Of tasks that squeue shows for some minutes after their end; all others run.
_OVER = (
  'BOOT_FAIL',
  'CANCELLED',
  'COMPLETED',
  'DEADLINE',
  'FAILED',
  'NODE_FAIL',
  'OUT_OF_MEMORY',
  'PREEMPTED',
  'REVOKED',
  'TIMEOUT',
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlurmConfig:
  """Settings of runs on a SLURM cluster, whose nodes see the study's directory.

  Attributes:
    nodes: nodes of each run, with one process on each.
    devices_per_node: devices of a node, as JAX counts them.
    gpus_per_node: GPUs that a node is asked for; None asks for none.
    cpus_per_task: cores of each process; None takes the cluster's default.
    partition: partition of the cluster; None takes the default.
    account: account that is charged; None takes the default.
    time: limit of a task, as HH:MM:SS; it is queued again where it needs more.
    save_seconds: seconds before that limit at which a run saves.
    options: further lines of the script, as 'constraint=h100'.
    setup: shell commands before a run, such as 'module load cuda'.
    poll_seconds: seconds between two questions to the queue.
  """

  kind: ClassVar[str] = 'slurm'
  nodes: int = 1
  devices_per_node: int = 8
  gpus_per_node: int | None = None
  cpus_per_task: int | None = None
  partition: str | None = None
  account: str | None = None
  time: str = '24:00:00'
  save_seconds: int = 300
  options: tuple[str, ...] = ()
  setup: str = ''
  poll_seconds: float = 15.0

  def __post_init__(self) -> None:
    field_checks.least(
      self,
      'launcher.',
      nodes=1,
      devices_per_node=1,
      gpus_per_node=1,
      cpus_per_task=1,
      save_seconds=1,
      poll_seconds=0.0,
    )
    field_checks.matches(
      self,
      'launcher.',
      'time',
      r'(\d+-)?\d+(:\d\d){0,2}',
      'a limit as SLURM takes it, as 24:00:00 or 2-12:00:00',
    )
    for name in ('partition', 'account'):
      field_checks.matches(self, 'launcher.', name, r'[\w.,@-]+', 'a name')


class SlurmLauncher:
  """Hands arrays in by sbatch, looks at the queue by squeue."""

  stays = True

  def __init__(self, config: SlurmConfig):
    self._config = config
    self._queue: dict[str, str] = {}
    self._asked = -1e9
    self._known: set[str] = set()

  @property
  def devices(self) -> points.Devices:
    """The devices of one run."""
    nodes = self._config.nodes
    return points.Devices(
      number=nodes * self._config.devices_per_node, num_slices=nodes
    )

  def check(self) -> None:
    """Raises ValueError if SLURM's programs are not here."""
    remedy = 'Give the command on a login node of the SLURM cluster.'
    for name in ('sbatch', 'squeue', 'scancel'):
      programs.need(name, remedy)

  def script(self, jobs: Sequence[launcher.LaunchJob], most: int | None) -> str:
    """Returns the script of an array over jobs.

    Args:
      jobs: the jobs, one task for each.
      most: tasks that run at a time; None does not limit them.

    Raises:
      ValueError: the study is in an object store.
    """
    c = self._config
    if files.is_remote(jobs[0].workdir):
      raise ValueError(
        f'--study={jobs[0].workdir.rpartition("/trials/")[0]}: tasks of SLURM '
        'look at the files of a run by themselves. Name a directory that all '
        'nodes share.'
      )
    folder = pathlib.Path(jobs[0].log).parent
    options = {
      'job-name': jobs[0].name if len(jobs) == 1 else jobs[0].group,
      'array': f'0-{len(jobs) - 1}' + (f'%{most}' if most else ''),
      'nodes': c.nodes,
      'ntasks-per-node': 1,
      'gpus-per-node': c.gpus_per_node,
      'cpus-per-task': c.cpus_per_task,
      'partition': c.partition,
      'account': c.account,
      'time': c.time,
      'signal': f'TERM@{c.save_seconds}',
      'open-mode': 'append',
      'output': f'{folder}/slurm-%A-%a.log',
      # By which the array is found again.
      'comment': jobs[0].attempt.partition('-')[0] or None,
    }
    lines = [
      f'--{name}={_quoted(v)}' for name, v in options.items() if v is not None
    ]
    lines += ['--requeue', *(f'--{option}' for option in c.options)]
    return _SCRIPT.format(
      options='\n'.join(f'#SBATCH {line}' for line in lines),
      root=shlex.quote(str(_ROOT)),
      setup='\n'.join([*self._exports(), c.setup or ':']),
      tasks='\n'.join(_task(i, job) for i, job in enumerate(jobs)),
    )

  def _exports(self) -> list[str]:
    """Returns shell commands on a process's share of its node."""
    c, lines = self._config, []
    if c.gpus_per_node:
      # One process for all: by itself JAX gives each task one GPU.
      numbers = ','.join(map(str, range(c.gpus_per_node)))
      lines.append(f'export JAX_LOCAL_DEVICE_IDS={numbers}')
    if c.cpus_per_task:  # srun does not take it over from sbatch.
      lines.append(f'export SRUN_CPUS_PER_TASK={c.cpus_per_task}')
    return lines

  def render(self, jobs: Sequence[launcher.LaunchJob]) -> str:
    """Returns the script of the array."""
    return self.script(jobs, None)

  def submit(self, jobs: Sequence[launcher.LaunchJob]) -> list[launcher.Handle]:
    """Hands jobs in as one array.

    Raises:
      LaunchError: sbatch refuses it.
    """
    for job in jobs:
      _status_file(job.log).unlink(missing_ok=True)
    said = programs.call(
      ['sbatch', '--parsable'],
      stdin=self.script(jobs, None),
      env=backends.given_environment(),
    )
    array = said.strip().partition(';')[0]
    handles = []
    for i, job in enumerate(jobs):
      task = f'{array}_{i}'
      self._known.add(task)
      handles.append({'task': task, 'log': job.log})
    self._asked = -1e9
    return handles

  def find(self, job: launcher.LaunchJob) -> launcher.Handle | None:
    """Returns the handle of a task of an array that is in the queue.

    Raises:
      LaunchError: squeue fails.
    """
    batch, _, number = job.attempt.partition('-')
    for array, comment in self._lines('%F|%k'):
      if comment == batch:
        return {'task': f'{array}_{number}', 'log': job.log}
    return None

  def _lines(self, format: str) -> list[tuple[str, str]]:
    """Returns two fields of each of the user's tasks, as squeue prints them."""
    said = programs.call(
      ['squeue', '--noheader', '--array', f'--format={format}']
      + [f'--user={os.environ.get("USER") or os.getuid()}']
    )
    pairs = [line.strip().partition('|') for line in said.splitlines()]
    return [(first, second) for first, _, second in pairs]

  def state(self, handle: launcher.Handle) -> launcher.JobState:
    """Returns the state by the queue, and by the status that a task leaves."""
    task = handle['task']
    self._known.add(task)
    self._ask()
    state = self._queue.get(task)
    if state in _WAITS:
      return launcher.JobState(phase='queued', message=state.lower())
    if state is not None and state not in _OVER:
      return launcher.JobState(phase='running')
    file = _status_file(handle['log'])
    if not file.exists():
      message = f'SLURM: {state.lower()}' if state else 'it left the queue'
      phase = 'preempted' if state in ('PREEMPTED', 'NODE_FAIL') else 'lost'
      return launcher.JobState(phase=phase, message=message)
    status = file.read_text().strip()
    if status == '0':
      return launcher.JobState(phase='ended')
    return launcher.JobState(phase='failed', message=f'exit status {status}')

  def _ask(self) -> None:
    """Asks for all tasks at once, at most every few seconds."""
    if time.monotonic() - self._asked < self._config.poll_seconds:
      return
    arrays = sorted({task.partition('_')[0] for task in self._known})
    self._queue = {}
    for task, state in self._lines('%i|%T'):
      if task.partition('_')[0] in arrays:
        self._queue[task] = state
    self._asked = time.monotonic()

  def logs(self, handle: launcher.Handle, num_lines: int = 20) -> str:
    """Returns the last lines of the run's log."""
    return processes.tail(handle['log'], num_lines)

  def cancel(self, handle: launcher.Handle) -> None:
    """Ends a task by scancel, which sends SIGTERM first."""
    programs.call(['scancel', handle['task']])
    self._asked = -1e9

  def close(self) -> None:
    """Does nothing."""


def _quoted(value: object) -> str:
  """Returns a value as a line of sbatch takes it."""
  text = str(value)
  if not re.search(r'[\s"\'\\]', text):
    return text
  return '"' + re.sub(r'(["\\])', r'\\\1', text) + '"'


def _status_file(log: str) -> pathlib.Path:
  return pathlib.Path(log).with_suffix('.status')


def _task(number: int, job: launcher.LaunchJob) -> str:
  status = shlex.quote(str(_status_file(job.log)))
  finished = shlex.quote(f'{job.workdir}/finished.json')
  return (
    f'  {number})\n'
    f'    command={shlex.quote(job.text)}\n'
    f'    log={shlex.quote(job.log)} status={status} finished={finished} ;;'
  )


_SCRIPT = """\
#!/bin/bash
{options}
# One task for each run; `srun` starts its command once on each node, and the
# processes find each other by SLURM's environment.
cd {root}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
{setup}
case $SLURM_ARRAY_TASK_ID in
{tasks}
esac
srun --kill-on-bad-exit=1 --output="$log" --open-mode=append \\
  bash -c "exec $command"
code=$?
if [[ $code == 0 && ! -e $finished ]]; then
  # Saved before its time was over: the same task goes on, later.
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID" && exit 0
fi
echo $code >"$status"
exit $code
"""

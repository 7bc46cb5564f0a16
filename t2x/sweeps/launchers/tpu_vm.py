"""Runs of a sweep on TPU VMs, as queued resources of Google Cloud.

Each run asks for its slices, waits for them, gets a copy of t2x onto
every host, starts its command on all of them, and gives them back at its end.
Slices that are taken away are asked for again, and the run goes on from its
checkpoint. All by the program `gcloud`.
"""

from collections.abc import Sequence
import dataclasses
import json
import pathlib
import shlex
import tarfile
import tempfile
from typing import Any
from typing import ClassVar

from t2x import field_checks
from t2x.hardware import pods
from t2x.sweeps import points
from t2x.sweeps.launchers import launcher
from t2x.sweeps.launchers import manifests
from t2x.sweeps.launchers import programs

_ROOT = pathlib.Path(__file__).resolve().parents[3]
_COPIED = ('setup.py', 't2x', 'experiments', 'scripts')
_WAITS = ('CREATING', 'ACCEPTED', 'WAITING_FOR_RESOURCES', 'PROVISIONING')
_START_SECONDS = 600.0  # To copy t2x to all hosts of a slice, or start it.
_TAKEN = ('SUSPENDING', 'SUSPENDED', 'DELETING')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuVmConfig:
  """Settings of runs on TPU VMs.

  Attributes:
    slice: slice of each run, such as 'v5e-16' or 'v5p:4x4x4'.
    num_slices: slices of each run.
    zone: zone of Google Cloud, such as 'us-west4-a'.
    project: project that is charged; None takes gcloud's own.
    model: `on_demand`, `spot` (may be taken away) or `reserved`.
    runtime: software version of the VMs; None takes that of the chip.
    valid_hours: hours after which a request that was not met is dropped; None
      keeps it.
    setup: shell commands on each host, in the copy of t2x, before the run.
  """

  kind: ClassVar[str] = 'tpu_vm'
  slice: str = ''
  num_slices: int = 1
  zone: str = ''
  project: str | None = None
  model: str = 'spot'
  runtime: str | None = None
  valid_hours: int | None = None
  setup: str = 'bash scripts/setup.sh tpu gcs'

  def __post_init__(self) -> None:
    field_checks.least(self, 'launcher.', valid_hours=1)
    for name, example in (('slice', 'v5e-16'), ('zone', 'us-west4-a')):
      if not getattr(self, name):
        raise ValueError(
          f'launcher.{name} is missing: set it, as in --launcher_set '
          f'{name}={example}.'
        )
    field_checks.matches(
      self,
      'launcher.',
      'zone',
      r'[a-z]+-[a-z]+\d+-[a-z]',
      'a zone of Google Cloud, as us-west4-a',
    )
    models = ('on_demand', 'spot', 'reserved')
    if self.model not in models:
      raise ValueError(
        f'launcher.model={self.model!r}; it is one of {", ".join(models)}.'
      )
    assert self.pod  # Refuses a slice that does not exist.

  @property
  def pod(self) -> pods.Pod:
    """The slices of each run."""
    return pods.of_launcher(self.slice, self.num_slices)


class TpuVmLauncher:
  """Calls `gcloud compute tpus`."""

  stays = True

  def __init__(self, config: TpuVmConfig):
    self._config = config

  @property
  def devices(self) -> points.Devices:
    """The devices of one run."""
    return points.Devices.of_pod(self._config.pod)

  def check(self) -> None:
    """Raises ValueError if gcloud is not here."""
    programs.need(
      'gcloud', 'Install the Google Cloud CLI: https://cloud.google.com/sdk.'
    )

  def _place(self) -> list[str]:
    c = self._config
    project = [f'--project={c.project}'] if c.project else []
    return [f'--zone={c.zone}', *project]

  def _create(self, name: str) -> list[str]:
    c, pod = self._config, self._config.pod
    if pod.has_default_shape:
      kind = [f'--accelerator-type={pod.accelerator}']
    else:
      kind = [f'--type={pod.prefix}', f'--topology={pod.shape}']
    if pod.num_slices == 1:
      nodes = [f'--node-id={name}']
    else:
      nodes = [f'--node-count={pod.num_slices}', f'--node-prefix={name}']
    model = [] if c.model == 'on_demand' else [f'--{c.model}']
    valid = c.valid_hours
    return [
      *_TPUS,
      'queued-resources',
      'create',
      name,
      *self._place(),
      *kind,
      f'--runtime-version={c.runtime or pod.runtime}',
      *nodes,
      *model,
      *([f'--valid-until-duration={valid}h'] if valid else []),
    ]

  def _delete(self, name: str) -> list[str]:
    return [
      *_TPUS,
      'queued-resources',
      'delete',
      name,
      *self._place(),
      '--force',
      '--quiet',
      '--async',
    ]

  def _on_hosts(self, node: str, worker: str, command: str) -> list[str]:
    return [
      *_TPUS,
      'tpu-vm',
      'ssh',
      node,
      *self._place(),
      f'--worker={worker}',
      f'--command={command}',
    ]

  def _copy(self, node: str, file: str) -> list[str]:
    return [
      *_TPUS,
      'tpu-vm',
      'scp',
      file,
      f'{node}:t2x.tar.gz',
      *self._place(),
      '--worker=all',
    ]

  def _nodes(self, name: str) -> list[str]:
    num = self._config.num_slices
    return [name] if num == 1 else [f'{name}-{i}' for i in range(num)]

  def _start(self, job: launcher.LaunchJob) -> str:
    """Returns the shell command that starts a run on a host and returns."""
    run = job.text.replace('python ', '.venv/bin/python ', 1)
    script = (
      'mkdir -p t2x && tar -xzf t2x.tar.gz -C t2x && cd t2x && '
      f'{self._config.setup} && {{ {run} & echo $! >~/t2x.pid; wait $!; }}; '
      'echo $? >~/t2x.status'
    )
    # Given twice, for what it was asked the first time, it starts nothing.
    return (
      'mkdir ~/t2x.started || exit 0; '
      f'nohup bash -c {shlex.quote(script)} >~/t2x.log 2>&1 </dev/null &'
    )

  def render(self, jobs: Sequence[launcher.LaunchJob]) -> str:
    """Returns the commands of each run, from its slices to their end."""
    texts = []
    for job in jobs:
      _check(job)
      steps = [('Asks for the slices:', [self._create(job.unique_name)])]
      nodes = self._nodes(job.unique_name)
      start = self._start(job)
      steps.append(
        (
          'Once they are ACTIVE, on every host:',
          [self._copy(node, 't2x.tar.gz') for node in nodes]
          + [self._on_hosts(node, 'all', start) for node in nodes],
        )
      )
      steps.append(('At the end:', [self._delete(job.unique_name)]))
      lines = []
      for title, commands in steps:
        lines += [f'# {title}', *map(shlex.join, commands)]
      texts.append('\n'.join(lines) + '\n')
    return '\n'.join(texts)

  def submit(self, jobs: Sequence[launcher.LaunchJob]) -> list[launcher.Handle]:
    """Asks for the slices of each job.

    Raises:
      LaunchError: gcloud refuses a request.
    """

    def start(job: launcher.LaunchJob) -> launcher.Handle:
      _check(job)
      programs.call([*self._create(job.unique_name), '--async'])
      return self._handle(job)

    return launcher.one_by_one(start, jobs)

  def _handle(self, job: launcher.LaunchJob) -> launcher.Handle:
    # Of each attempt another one: the slices of the last may be there yet.
    return {
      'name': job.unique_name,
      'start': self._start(job),
      'started': False,
    }

  def find(self, job: launcher.LaunchJob) -> launcher.Handle | None:
    """Returns the handle of a job whose slices were asked for."""
    names = programs.call(
      [*_TPUS, 'queued-resources', 'list', *self._place()]
      + ['--format=value(name)']
    )
    found = {name.rpartition('/')[2] for name in names.split()}
    return self._handle(job) if job.unique_name in found else None

  def state(self, handle: launcher.Handle) -> launcher.JobState:
    """Returns the state of the slices, and then of the run on them.

    It starts the run once the slices are there, and gives them back once it is
    over.
    """
    name = handle['name']
    if handle.get('over'):
      return launcher.JobState(**handle['over'])
    said = programs.call(
      [*_TPUS, 'queued-resources', 'describe', name, *self._place()]
      + ['--format=json']
    )
    state = json.loads(said).get('state', {})
    value = state.get('state', 'UNKNOWN')
    if value in _TAKEN:
      return self._over(handle, 'preempted', f'its slices are {value.lower()}')
    if value == 'FAILED':
      reason = _reason(state) or 'the request failed'
      return self._over(handle, 'failed', reason)
    if value != 'ACTIVE':
      return launcher.JobState(phase='queued', message=value.lower())
    if not handle['started']:
      self._start_on_all(handle)
      return launcher.JobState(phase='running')
    first = self._nodes(name)[0]
    status = programs.call(
      self._on_hosts(first, '0', 'cat ~/t2x.status 2>/dev/null || true')
    ).strip()
    if not status:
      return launcher.JobState(phase='running')
    if status == '0':
      return self._over(handle, 'ended', '')
    handle['tail'] = self.logs(handle)
    return self._over(handle, 'failed', f'exit status {status}')

  def _start_on_all(self, handle: launcher.Handle) -> None:
    nodes = self._nodes(handle['name'])
    with tempfile.TemporaryDirectory() as directory:
      file = f'{directory}/t2x.tar.gz'
      with tarfile.open(file, 'w:gz') as archive:
        for name in _COPIED:
          archive.add(_ROOT / name, name, filter=_without_caches)
      for node in nodes:
        programs.call(self._copy(node, file), seconds=_START_SECONDS)
    for node in nodes:
      start = self._on_hosts(node, 'all', handle['start'])
      programs.call(start, seconds=_START_SECONDS)
    handle['started'] = True

  def _over(
    self, handle: launcher.Handle, phase: launcher.Phase, message: str
  ) -> launcher.JobState:
    """Gives the slices back, and notes the end."""
    programs.call(self._delete(handle['name']))
    handle['over'] = {'phase': phase, 'message': message}
    return launcher.JobState(phase=phase, message=message)

  def logs(self, handle: launcher.Handle, num_lines: int = 20) -> str:
    """Returns the last lines of the first host's log."""
    if 'tail' in handle:
      return handle['tail']
    if not handle['started'] or handle.get('over'):
      return ''
    node = self._nodes(handle['name'])[0]
    try:
      return programs.call(
        self._on_hosts(node, '0', f'tail -n {num_lines} ~/t2x.log')
      )
    except launcher.LaunchError as error:
      return str(error)

  def cancel(self, handle: launcher.Handle) -> None:
    """Sends SIGTERM to the run on all hosts, or withdraws the request."""
    if handle.get('over'):
      return
    if not handle['started']:
      self._over(handle, 'ended', 'withdrawn before it began')
      return
    # While t2x is still being set up there is nothing to save.
    stop = (
      'if [ -e ~/t2x.pid ]; then kill -TERM $(cat ~/t2x.pid) || true; '
      'else echo 143 >~/t2x.status; fi'
    )
    for node in self._nodes(handle['name']):
      programs.call(self._on_hosts(node, 'all', stop))

  def close(self) -> None:
    """Does nothing."""


_TPUS = ('gcloud', 'compute', 'tpus')


def _check(job: launcher.LaunchJob) -> None:
  manifests.check_label('the name of a job', job.name)
  manifests.check_remote(job)


def _reason(state: dict[str, Any]) -> str:
  """Returns why a request failed, wherever Google Cloud says it."""
  for value in state.values():
    if isinstance(value, dict):
      message = value.get('error', {}).get('message')
      if message:
        return message
  return ''


def _without_caches(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
  return None if '__pycache__' in entry.name else entry

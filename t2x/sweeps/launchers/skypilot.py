"""Runs of a sweep as managed jobs of SkyPilot, on whatever cloud it finds.

SkyPilot starts a job again on other machines when they are taken away, and the
run goes on from its checkpoint. Read from SkyPilot 0.14.1's command line.
"""

from collections.abc import Sequence
import dataclasses
import json
import pathlib
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
_WAITS = ('PENDING', 'SUBMITTED', 'STARTING', 'RECOVERING')
_RUNS = ('RUNNING', 'WINDING_DOWN', 'CANCELLING')


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkyPilotConfig:
  """Settings of runs that SkyPilot places.

  Attributes:
    slice: slice of TPUs of each run, such as 'v6e-32'; '' for `accelerators`.
    accelerators: accelerators of a machine in SkyPilot's words, as 'H100:8'.
    nodes: machines of each run with `accelerators`.
    devices_per_node: devices of such a machine, as JAX counts them.
    infra: cloud, region or cluster, as 'gcp/europe-west4'; None leaves it to
      SkyPilot.
    spot: whether the machines may be taken away, for less money.
    setup: shell commands that install t2x on a new machine, from its root; None
      for those of its accelerators.
  """

  kind: ClassVar[str] = 'skypilot'
  slice: str = ''
  accelerators: str = ''
  nodes: int = 1
  devices_per_node: int = 8
  infra: str | None = None
  spot: bool = True
  setup: str | None = None

  def __post_init__(self) -> None:
    field_checks.least(self, 'launcher.', nodes=1, devices_per_node=1)
    if bool(self.slice) == bool(self.accelerators):
      raise ValueError(
        f'launcher.slice={self.slice!r}, accelerators={self.accelerators!r}: '
        'give one of them, as in --launcher_set slice=v6e-32.'
      )
    if self.accelerators:
      field_checks.matches(
        self,
        'launcher.',
        'accelerators',
        r'[A-Za-z][\w-]*(:[1-9]\d*)?',
        'a name and a number, as H100:8',
      )
    if self.slice and self.nodes > 1:
      raise ValueError(
        f'launcher.slice={self.slice}, nodes={self.nodes}: a slice has its own '
        'number of machines. Leave out nodes.'
      )
    if self.slice and not self.pod.has_default_shape:
      raise ValueError(
        f'launcher.slice={self.slice}: SkyPilot names slices by their size '
        f'alone, and {self.pod.accelerator} has another shape. Give a size.'
      )

  @property
  def pod(self) -> pods.Pod:
    """The slice of each run."""
    return pods.of_launcher(self.slice)


class SkyPilotLauncher:
  """Calls `sky jobs`."""

  stays = True

  def __init__(self, config: SkyPilotConfig):
    self._config = config

  @property
  def devices(self) -> points.Devices:
    """The devices of one run."""
    c = self._config
    if c.slice:
      return points.Devices.of_pod(c.pod)
    return points.Devices(
      number=c.nodes * c.devices_per_node, num_slices=c.nodes
    )

  def check(self) -> None:
    """Raises ValueError if SkyPilot is not here."""
    programs.need('sky', "Install it: pip install 'skypilot[gcp]'.")

  def task(self, job: launcher.LaunchJob) -> dict[str, Any]:
    """Returns the task file of a run, as JSON values.

    Raises:
      ValueError: the workdir is in no object store.
    """
    manifests.check_remote(job)
    c = self._config
    resources: dict[str, Any] = {'use_spot': c.spot}
    if c.slice:
      resources['accelerators'] = f'tpu-{c.pod.accelerator}'
      resources['accelerator_args'] = {'runtime_version': c.pod.runtime}
    else:
      resources['accelerators'] = c.accelerators
    if c.infra is not None:
      resources['infra'] = c.infra
    kind = 'tpu' if c.slice else 'gpu'
    run = job.text.replace('python ', '.venv/bin/python ', 1)
    if not c.slice and c.nodes > 1:
      run += (
        ' --coordinator="$(head -n1 <<<"$SKYPILOT_NODE_IPS"):8476"'
        ' --num_processes="$SKYPILOT_NUM_NODES"'
        ' --process_id="$SKYPILOT_NODE_RANK"'
      )
    return {
      'name': job.unique_name,
      'resources': resources,
      **({} if c.slice else {'num_nodes': c.nodes}),
      'workdir': '.',
      'setup': c.setup or f'bash scripts/setup.sh {kind} gcs',
      'run': f'{run}\n',
    }

  def render(self, jobs: Sequence[launcher.LaunchJob]) -> str:
    """Returns the task files, each with the command that takes it."""
    return '---\n'.join(
      f'# {" ".join(_launch(job, f"{job.unique_name}.yaml"))}\n'
      f'{manifests.dump(self.task(job))}'
      for job in jobs
    )

  def submit(self, jobs: Sequence[launcher.LaunchJob]) -> list[launcher.Handle]:
    """Hands jobs in, which SkyPilot then places.

    Raises:
      LaunchError: sky fails.
    """

    def start(job: launcher.LaunchJob) -> launcher.Handle:
      with tempfile.TemporaryDirectory() as directory:
        file = pathlib.Path(directory) / f'{job.unique_name}.yaml'
        file.write_text(manifests.dump(self.task(job)))
        programs.call(_launch(job, str(file)), cwd=_ROOT)
      return {'name': job.unique_name}

    return launcher.one_by_one(start, jobs)

  def _jobs(self) -> list[dict[str, Any]]:
    """Returns all managed jobs, as SkyPilot lists them."""
    command = ['sky', 'jobs', 'queue', '--all', '--output', 'json']
    return json.loads(programs.call(command))

  def find(self, job: launcher.LaunchJob) -> launcher.Handle | None:
    """Returns the handle of a job that was handed in."""
    names = {other['job_name'] for other in self._jobs()}
    return {'name': job.unique_name} if job.unique_name in names else None

  def state(self, handle: launcher.Handle) -> launcher.JobState:
    """Returns the state of the newest managed job of that name."""
    own = [job for job in self._jobs() if job['job_name'] == handle['name']]
    if not own:
      return launcher.JobState(phase='lost', message='SkyPilot has no such job')
    job = max(own, key=lambda job: job['job_id'])
    status = job['status']
    if status in _WAITS:
      return launcher.JobState(phase='queued', message=status.lower())
    if status in _RUNS:
      return launcher.JobState(phase='running')
    if status in ('SUCCEEDED', 'CANCELLED'):
      return launcher.JobState(phase='ended', message=status.lower())
    reason = job.get('failure_reason') or status.lower()
    return launcher.JobState(phase='failed', message=reason)

  def logs(self, handle: launcher.Handle, num_lines: int = 20) -> str:
    """Returns the last lines of the job's log."""
    command = ['sky', 'jobs', 'logs', '--name', handle['name'], '--no-follow']
    try:
      return '\n'.join(programs.call(command).splitlines()[-num_lines:])
    except launcher.LaunchError as error:
      return str(error)

  def cancel(self, handle: launcher.Handle) -> None:
    """Cancels the job."""
    programs.call(['sky', 'jobs', 'cancel', '--name', handle['name'], '--yes'])

  def close(self) -> None:
    """Does nothing."""


def _launch(job: launcher.LaunchJob, file: str) -> list[str]:
  return ['sky', 'jobs', 'launch', '--name', job.unique_name] + [
    '--detach-run',
    '--yes',
    file,
  ]

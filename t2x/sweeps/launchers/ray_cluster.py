"""Runs of a sweep on a Ray cluster: a placement group of hosts for each.

A run has an actor on each of its hosts, which starts its command there and
looks after it. The actors are detached: they go on when the sweep's process
ends, and are found again by name. On TPUs the placement group is of whole
slices.
"""

# The extra `ray` may be absent where types are checked.
# pyright: reportMissingImports=false

from collections.abc import Sequence
import dataclasses
import pathlib
import shlex
from typing import Any
from typing import ClassVar

from t2x import field_checks
from t2x.hardware import pods
from t2x.sweeps import points
from t2x.sweeps.launchers import launcher
from t2x.sweeps.launchers import processes
from t2x.sweeps.launchers import ray_host

_ROOT = pathlib.Path(__file__).resolve().parents[3]
_NAMESPACE = 't2x'
_ANSWER_SECONDS = 20.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RayConfig:
  """Settings of runs on a Ray cluster.

  Attributes:
    address: address of the cluster; None takes the one that RAY_ADDRESS names
      or that runs on this machine, or starts one here.
    slice: slice of TPUs of each run, such as 'v6e-16'; '' for hosts of CPUs or
      GPUs.
    num_slices: slices of each run.
    hosts: hosts of each run that has no slice.
    cpus: CPUs that are reserved on each host.
    gpus: GPUs that are reserved on each host.
    devices: devices of each host, which its process simulates on the CPU; None
      leaves it those that it has.
    directory: directory of t2x on the hosts; '' for that of this one.
    grace_seconds: seconds that a run has to save when it is to end.
  """

  kind: ClassVar[str] = 'ray'
  address: str | None = None
  slice: str = ''
  num_slices: int = 1
  hosts: int = 1
  cpus: float = 1
  gpus: int = 0
  devices: int | None = None
  directory: str = ''
  grace_seconds: float = 60.0

  def __post_init__(self) -> None:
    field_checks.least(
      self, 'launcher.', hosts=1, cpus=0.0, gpus=0, devices=1, grace_seconds=0.0
    )
    if self.slice:
      assert self.pod  # Refuses a slice that does not exist.
    elif not self.devices and not self.gpus:
      raise ValueError(
        'launcher.slice, gpus and devices are not set: say what a run gets on '
        'each host, as in --launcher_set devices=4, which simulates them.'
      )

  @property
  def pod(self) -> pods.Pod:
    """The slices of each run."""
    return pods.of_launcher(self.slice, self.num_slices)


class RayLauncher:
  """Keeps an actor on each host of each run."""

  stays = True

  def __init__(self, config: RayConfig):
    self._config = config
    self._slices: dict[str, Any] = {}

  @property
  def devices(self) -> points.Devices:
    """The devices of one run."""
    c = self._config
    if c.slice:
      return points.Devices.of_pod(c.pod)
    of_host = c.devices or c.gpus
    return points.Devices(number=c.hosts * of_host)

  @property
  def _num_hosts(self) -> int:
    c = self._config
    return c.pod.hosts * c.num_slices if c.slice else c.hosts

  def check(self) -> None:
    """Connects to the cluster.

    Raises:
      ValueError: Ray is not installed, or there is no cluster at the address.
    """
    _connect(self._config.address)

  def render(self, jobs: Sequence[launcher.LaunchJob]) -> str:
    """Returns the hosts of a run and the command of each."""
    c = self._config
    what = (
      f'{c.num_slices} x {c.pod.topology}, {self._num_hosts} hosts'
      if c.slice
      else f'{self._num_hosts} hosts with {self._resources()}'
    )
    texts = []
    for job in jobs:
      command = [*job.command, *self._flags('HOST:PORT', 0)]
      texts.append(
        f'# On {what}; this is the first of them:\n{shlex.join(command)}'
      )
    return '\n\n'.join(texts)

  def _resources(self) -> dict[str, float]:
    c = self._config
    return {'CPU': c.cpus, **({'GPU': c.gpus} if c.gpus else {})}

  def _flags(self, coordinator: str, index: int) -> list[str]:
    """Returns the flags by which the processes of a run find each other."""
    if self._num_hosts == 1:
      return []
    return [
      f'--coordinator={coordinator}',
      f'--num_processes={self._num_hosts}',
      f'--process_id={index}',
    ]

  def submit(self, jobs: Sequence[launcher.LaunchJob]) -> list[launcher.Handle]:
    """Asks for the hosts of each job; `state` starts it once they are there.

    Raises:
      LaunchError: Ray refuses.
    """
    return launcher.one_by_one(self._submit, jobs)

  def _submit(self, job: launcher.LaunchJob) -> launcher.Handle | None:
    _connect(self._config.address)
    from ray import util

    c = self._config
    self._free(job.name)
    options: dict[str, Any] = {'name': job.name, 'lifetime': 'detached'}
    if c.slice:
      from ray.util import tpu

      # It first takes the head of each slice, and waits for that.
      try:
        self._slices[job.name] = tpu.slice_placement_group(
          topology=c.pod.shape,
          accelerator_version=c.pod.prefix,
          num_slices=c.num_slices,
          chips_per_vm=c.pod.chips_per_host,
          **options,
        )
      except TimeoutError:
        return None
    else:
      bundles = [self._resources() for _ in range(self._num_hosts)]
      util.placement_group(bundles, 'SPREAD', **options)
    return {
      'name': job.name,
      'command': list(job.command),
      'log': job.log,
      'started': False,
    }

  def find(self, job: launcher.LaunchJob) -> launcher.Handle | None:
    """Returns None: `submit` frees the hosts of that name."""
    del job
    return None

  def state(self, handle: launcher.Handle) -> launcher.JobState:
    """Returns the state of the hosts, and then of the processes on them."""
    if handle.get('over'):
      return launcher.JobState(**handle['over'])
    ray = _connect(self._config.address)
    from ray import util

    if not handle['started']:
      try:
        group = util.get_placement_group(handle['name'])
      except ValueError:
        return self._over(handle, 'lost', 'its placement group is gone')
      if not group.wait(timeout_seconds=0.01):
        return launcher.JobState(phase='queued', message='waits for hosts')
      if slices := self._slices.pop(handle['name'], None):
        slices.release_head_pgs()  # The group has the slices now.
      try:
        self._start(handle, group)
      except (ValueError, ray.exceptions.RayError) as error:
        self._stop_actors(handle['name'])
        raise launcher.LaunchError(
          f'the hosts of {handle["name"]} do not start it: {error}'
        ) from error
      return launcher.JobState(phase='running')
    try:
      actors = [
        ray.get_actor(name, namespace=_NAMESPACE)
        for name in self._names(handle['name'])
      ]
      codes = ray.get(
        [actor.status.remote() for actor in actors], timeout=_ANSWER_SECONDS
      )
    except (ValueError, ray.exceptions.RayError) as error:
      # One is gone: the others notice, save if they can, and end with it.
      kind = type(error).__name__
      return self._over(handle, 'preempted', f'a host is gone ({kind})')
    failed = [code for code in codes if code]
    if failed:
      handle['tail'] = self.logs(handle)
      return self._over(handle, 'failed', processes.describe_exit(failed[0]))
    if None in codes:
      return launcher.JobState(phase='running')
    return self._over(handle, 'ended', '')

  def _names(self, name: str) -> list[str]:
    return [f'{name}-{i}' for i in range(self._num_hosts)]

  def _start(self, handle: launcher.Handle, group: Any) -> None:
    ray = _connect(self._config.address)
    from ray.util import scheduling_strategies

    c = self._config
    resources = {'TPU': c.pod.chips_per_host} if c.slice else {}
    # Those that another process has left, which was killed in here.
    self._stop_actors(handle['name'])
    actors = []
    for i, name in enumerate(self._names(handle['name'])):
      strategy = scheduling_strategies.PlacementGroupSchedulingStrategy(
        placement_group=group, placement_group_bundle_index=i
      )
      options: dict[str, Any] = {} if c.slice else {'num_cpus': c.cpus}
      if c.gpus:
        options['num_gpus'] = c.gpus
      actors.append(
        ray.remote(ray_host.Host)
        .options(
          name=name,
          namespace=_NAMESPACE,
          lifetime='detached',
          scheduling_strategy=strategy,
          resources=resources or None,
          **options,
        )
        .remote(c.directory or str(_ROOT))
      )
    coordinator = ray.get(actors[0].address.remote(), timeout=300)
    starts = []
    for i, actor in enumerate(actors):
      command = [*handle['command'], *self._flags(coordinator, i)]
      starts.append(
        actor.start.remote(command, c.devices, self._slice_of(coordinator, i))
      )
    ray.get(starts, timeout=300)
    handle['started'] = True

  def _slice_of(self, coordinator: str, index: int) -> dict[str, str]:
    """Returns the variables by which a host knows its slice among several."""
    c = self._config
    if not c.slice or c.num_slices == 1:
      return {}
    from ray.util import tpu

    address = coordinator.rpartition(':')[0]
    return tpu.get_tpu_coordinator_env_vars(
      address, c.num_slices, index // c.pod.hosts
    )

  def _over(
    self, handle: launcher.Handle, phase: launcher.Phase, message: str
  ) -> launcher.JobState:
    """Writes the log, frees the hosts, and notes the end."""
    text = handle.get('tail') or self.logs(handle, 1000)
    if text:
      with open(handle['log'], 'a', encoding='utf-8') as f:
        f.write(text.rstrip('\n') + '\n')
    self._free(handle['name'])
    handle['over'] = {'phase': phase, 'message': message}
    return launcher.JobState(phase=phase, message=message)

  def _free(self, name: str) -> None:
    """Ends the actors and the placement group of a run, if they are there."""
    _connect(self._config.address)
    from ray import util

    self._stop_actors(name)
    try:
      group = util.get_placement_group(name)
    except ValueError:
      return
    util.remove_placement_group(group)

  def _stop_actors(self, name: str) -> None:
    ray = _connect(self._config.address)
    for actor_name in self._names(name):
      try:
        actor = ray.get_actor(actor_name, namespace=_NAMESPACE)
      except ValueError:
        continue
      try:
        ray.get(
          actor.stop.remote(self._config.grace_seconds),
          timeout=self._config.grace_seconds + _ANSWER_SECONDS,
        )
      except ray.exceptions.RayError:
        pass
      ray.kill(actor)

  def logs(self, handle: launcher.Handle, num_lines: int = 20) -> str:
    """Returns the last lines of the first host."""
    if 'tail' in handle or not handle['started'] or handle.get('over'):
      return handle.get('tail', '')
    ray = _connect(self._config.address)
    try:
      actor = ray.get_actor(f'{handle["name"]}-0', namespace=_NAMESPACE)
      return ray.get(actor.tail.remote(num_lines), timeout=_ANSWER_SECONDS)
    except (ValueError, ray.exceptions.RayError):
      return ''

  def cancel(self, handle: launcher.Handle) -> None:
    """Asks the processes to save and end, or withdraws the request."""
    if handle.get('over'):
      return
    if not handle['started']:
      self._over(handle, 'ended', 'withdrawn before it began')
      return
    ray = _connect(self._config.address)
    for name in self._names(handle['name']):
      try:
        ray.get_actor(name, namespace=_NAMESPACE).ask_to_end.remote()
      except ValueError:
        continue

  def close(self) -> None:
    """Does nothing: the cluster stays connected."""


def _connect(address: str | None) -> Any:
  """Returns the module `ray`, connected to a cluster.

  Raises:
    ValueError: Ray is not installed, or there is no cluster at the address.
  """
  try:
    import ray
  except ImportError as error:
    raise ValueError(
      '--launcher=ray needs Ray: bash scripts/setup.sh ray.'
    ) from error
  if not ray.is_initialized():
    try:
      ray.init(
        address=address,
        namespace=_NAMESPACE,
        log_to_driver=False,
        include_dashboard=False,
        configure_logging=False,
      )
    except (ConnectionError, ValueError, RuntimeError) as error:
      raise ValueError(
        f'launcher.address={address}: no Ray cluster answers there ({error}).'
      ) from error
  return ray

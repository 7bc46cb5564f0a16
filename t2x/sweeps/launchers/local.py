"""Runs of a sweep as processes of this machine."""

from collections.abc import Sequence
import dataclasses
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from typing import ClassVar

from t2x import field_checks
from t2x.sweeps import ownership
from t2x.sweeps import points
from t2x.sweeps.launchers import accelerators
from t2x.sweeps.launchers import fork_server
from t2x.sweeps.launchers import launcher
from t2x.sweeps.launchers import processes

_ROOT = pathlib.Path(__file__).resolve().parents[3]
_LOOK_SECONDS = 0.5  # Between two looks for free accelerators.


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalConfig:
  """Settings of runs on this machine.

  Attributes:
    devices: devices of each run, which its process simulates on the CPU; None
      leaves it those that the machine has.
    accelerators: GPUs or TPU chips of each run, dealt among those at a time;
      None for all that the machine has.
    processes: processes of each run, which share its devices; more than one
      are started by scripts/launch_local.py.
    warm: whether runs are forked from a process that has imported what they
      need, which saves each some seconds; one that shares its devices among
      processes is started in full.
    grace_seconds: seconds that a run has to save when it is to end.
  """

  kind: ClassVar[str] = 'local'
  devices: int | None = None
  accelerators: int | None = None
  processes: int = 1
  warm: bool = True
  grace_seconds: float = 60.0

  def __post_init__(self) -> None:
    field_checks.least(
      self,
      'launcher.',
      devices=1,
      accelerators=1,
      processes=1,
      grace_seconds=0.0,
    )
    if self.accelerators is not None and self.devices is not None:
      raise ValueError(
        f'launcher.accelerators={self.accelerators} are real, and launcher.'
        f'devices={self.devices} are simulated. Give one of them.'
      )
    if self.processes > 1:
      if self.devices is None:
        raise ValueError(
          f'launcher.processes={self.processes} share the simulated devices of '
          'a run; say how many these are, as in launcher.devices=8.'
        )
      if self.devices % self.processes:
        raise ValueError(
          f'launcher.devices={self.devices} cannot be shared by launcher.'
          f'processes={self.processes}; choose a multiple.'
        )


class LocalLauncher:
  """Starts each run as a process, which ends when this one does.

  A run is known again by its process and when that started, so that a sweep
  that was killed finds those of its runs that are still saving.
  """

  stays = False

  def __init__(self, config: LocalConfig):
    self._config = config
    self._children: dict[int, subprocess.Popen[bytes]] = {}
    # The last one forks; others have ended, and know how their children did.
    self._servers: list[fork_server.ForkServer] = []
    self._asked: dict[int, float] = {}
    self._dealer = None
    if config.devices is None:
      self._dealer = accelerators.Dealer(config.accelerators)
    self._held: dict[int, accelerators.Held] = {}

  @property
  def devices(self) -> points.Devices:
    """The devices of one run."""
    if self._config.devices is not None:
      return points.Devices(number=self._config.devices)
    assert self._dealer is not None
    if self._dealer.platform == 'cuda':
      return points.Devices(number=self._dealer.count)
    return points.Devices(number=self._num_devices())

  def _num_devices(self) -> int:
    """Returns the devices that a run's process sees by itself."""
    held = self._take(wait=True)
    environment = processes.environment(str(_ROOT), None)
    try:
      return _num_devices(environment | (held.environment if held else {}))
    finally:
      if held is not None:
        held.release()

  def check(self) -> None:
    """Does nothing: Python is here."""

  def _command(self, job: launcher.LaunchJob) -> list[str]:
    command = list(job.command)
    config = self._config
    if config.processes > 1:
      assert config.devices is not None and command[0] == 'python'
      command = [
        'python',
        'scripts/launch_local.py',
        f'--num_processes={config.processes}',
        f'--devices_per_process={config.devices // config.processes}',
        '--',
        *command[1:],
      ]
    return command

  @property
  def _simulated(self) -> int | None:
    """The devices that a run's own process simulates."""
    return self._config.devices if self._config.processes == 1 else None

  def render(self, jobs: Sequence[launcher.LaunchJob]) -> str:
    """Returns the command lines, with what they need in the environment.

    Of accelerators, the first free ones stand for those of each.
    """
    variables = processes.simulating(self._simulated)
    if held := self._take():
      variables |= held.environment
      held.release()
    settings = [f'{n}={shlex.quote(value)}' for n, value in variables.items()]
    return '\n\n'.join(
      ' '.join([*settings, shlex.join(self._command(job))]) for job in jobs
    )

  def submit(self, jobs: Sequence[launcher.LaunchJob]) -> list[launcher.Handle]:
    """Starts each job in a session of its own, as long as chips are free.

    Raises:
      LaunchError: a process could not be started.
    """
    return launcher.one_by_one(self._start, jobs)

  def _start(self, job: launcher.LaunchJob) -> launcher.Handle | None:
    held = self._take()
    if held is None and self._has_accelerators:
      return None
    try:
      number = self._fork(job, held) or self._spawn(job, held)
    except OSError as error:
      if held is not None:
        held.release()
      raise launcher.LaunchError(
        f'{shlex.join(job.command[:2])} could not be started: {error}.'
      ) from error
    if held is not None:
      self._held[number] = held
    started = ownership.start_of(number)
    return {'process': number, 'started': started, 'log': job.log}

  @property
  def _has_accelerators(self) -> bool:
    return self._dealer is not None and self._dealer.has_any

  def _take(self, wait: bool = False) -> accelerators.Held | None:
    """Returns accelerators for a run; None where there are none.

    Args:
      wait: whether to wait for runs of a sweep that was killed to save and end.

    Raises:
      LaunchError: all are in use, and were for as long as this waits.
    """
    if not self._has_accelerators:
      return None
    assert self._dealer is not None
    deadline = time.monotonic() + self._grace
    while (held := self._dealer.take()) is None and wait:
      if time.monotonic() > deadline:
        raise launcher.LaunchError(
          'All accelerators of this machine are in use by runs of other '
          'sweeps. Stop these, or wait for their end.'
        )
      time.sleep(_LOOK_SECONDS)
    return held

  def _environment(self, held: accelerators.Held | None) -> dict[str, str]:
    own = processes.environment(str(_ROOT), self._simulated)
    return own if held is None else own | held.environment

  def _fork(
    self, job: launcher.LaunchJob, held: accelerators.Held | None
  ) -> int | None:
    """Returns the process of a run that a fork server started, if one may."""
    config = self._config
    if not config.warm or config.processes > 1 or job.command[0] != 'python':
      return None
    if not self._servers or not self._servers[-1].is_alive:
      own = processes.environment(str(_ROOT), self._simulated)
      self._servers.append(fork_server.ForkServer(own))
    return self._servers[-1].start(
      list(job.command[1:]),
      cwd=str(_ROOT),
      env=self._environment(held),
      log=job.log,
      locks=held.locks if held is not None else (),
    )

  def _spawn(
    self, job: launcher.LaunchJob, held: accelerators.Held | None
  ) -> int:
    """Returns the process of a run that is started in full."""
    command = self._command(job)
    if command[0] == 'python':
      command[0] = sys.executable
    with open(job.log, 'ab') as log:
      child = subprocess.Popen(
        processes.ending_with(os.getpid(), command),
        cwd=_ROOT,
        env=self._environment(held),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=held.descriptors if held is not None else (),
      )
    self._children[child.pid] = child
    return child.pid

  def find(self, job: launcher.LaunchJob) -> launcher.Handle | None:
    """Returns None: runs end with the process that started them."""
    del job
    return None

  def state(self, handle: launcher.Handle) -> launcher.JobState:
    """Returns whether the process is there, and how it ended if it is known."""
    number = handle['process']
    child = self._children.get(number)
    # The latest first: the number of a process comes again.
    of_it = [each for each in reversed(self._servers) if each.has(number)]
    if of_it:
      code = of_it[0].code_of(number)
    elif child is not None:
      code = child.poll()
    else:
      started = handle['started']
      if started is not None and ownership.start_of(number) == started:
        self._insist(number)
        return launcher.JobState(phase='running')
      return launcher.JobState(phase='lost', message='its process is gone')
    if code is None:
      self._insist(number)
      return launcher.JobState(phase='running')
    self._asked.pop(number, None)
    if held := self._held.pop(number, None):
      held.release()
    if code == 0:
      return launcher.JobState(phase='ended')
    return launcher.JobState(
      phase='failed', message=processes.describe_exit(code)
    )

  def _insist(self, number: int) -> None:
    """Kills a process that has not heeded a request to end."""
    asked = self._asked.get(number)
    if asked is not None and time.monotonic() - asked > self._grace:
      _signal(number, signal.SIGKILL)

  @property
  def _grace(self) -> float:
    return self._config.grace_seconds

  def logs(self, handle: launcher.Handle, num_lines: int = 20) -> str:
    """Returns the last lines of the log."""
    return processes.tail(handle['log'], num_lines)

  def cancel(self, handle: launcher.Handle) -> None:
    """Sends SIGTERM, upon which a run saves and ends; later SIGKILL."""
    number = handle['process']
    if number not in self._asked and not self.state(handle).is_over:
      self._asked[number] = time.monotonic()
      _signal(number, signal.SIGTERM)

  def close(self) -> None:
    """Ends the process that forks for runs."""
    for server in self._servers:
      server.close()
    self._servers = []


def _signal(number: int, what: signal.Signals) -> None:
  try:
    # To the process alone: launch_local.py hands it on to its own.
    (os.killpg if what == signal.SIGKILL else os.kill)(number, what)
  except ProcessLookupError:
    pass


def _num_devices(environment: dict[str, str]) -> int:
  """Returns the devices that a process with an environment sees by itself."""
  for flag in environment.get('XLA_FLAGS', '').split():
    name, _, value = flag.partition('=')
    if name == processes.COUNT and environment.get('JAX_PLATFORMS') == 'cpu':
      return int(value)
  # A process of its own: this one must not take the devices.
  code = 'import jax; print(jax.device_count())'
  done = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    env=environment,
  )
  if done.returncode:
    raise launcher.LaunchError(
      f'The devices of this machine cannot be counted: {done.stderr[-500:]}'
    )
  return int(done.stdout)

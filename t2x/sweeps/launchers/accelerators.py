"""GPUs and TPU chips of this machine, dealt among the runs of sweeps.

A run has a group of them while it holds the lock of each. The lock is a file's,
shared by the process that deals and the run, and the kernel frees it when both
have ended, however they did: two sweeps, or one that goes on after it was
killed, never give a chip to two runs.
"""

from collections.abc import Sequence
import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import os
import socket
import tempfile

from t2x.hardware import backends

# Chips that lie together on a host, as libtpu takes them.
_BOUNDS = {1: '1,1,1', 2: '1,2,1', 4: '2,2,1', 8: '2,4,1'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AcceleratorKind:
  """A kind of accelerator, and how a process is shown some of them alone.

  Attributes:
    title: name of one, for messages.
    platform: JAX's name of it.
    variable: environment variable with the numbers that a process sees.
    devices: patterns of the files of those that are there.
  """

  title: str
  platform: str
  variable: str
  devices: tuple[str, ...]

  def names(self) -> list[str]:
    """Returns the numbers of those that this process may use."""
    given = os.environ.get(self.variable)
    if given is not None:
      return [name for name in given.split(',') if name]
    there = [path for pattern in self.devices for path in glob.glob(pattern)]
    # By count: files of VFIO have other numbers than chips have.
    return [str(i) for i in range(len(there))]

  def environment(self, names: tuple[str, ...]) -> dict[str, str]:
    """Returns the variables by which a process sees these alone."""
    result = {self.variable: ','.join(names)}
    if self.platform == 'tpu':
      result |= {
        'TPU_CHIPS_PER_PROCESS_BOUNDS': _BOUNDS[len(names)],
        'TPU_PROCESS_BOUNDS': '1,1,1',
      }
    return result


KINDS = (
  AcceleratorKind(
    title='GPU',
    platform='cuda',
    variable='CUDA_VISIBLE_DEVICES',
    devices=('/dev/nvidia[0-9]', '/dev/nvidia[0-9][0-9]'),
  ),
  AcceleratorKind(
    title='TPU chip',
    platform='tpu',
    variable='TPU_VISIBLE_CHIPS',
    devices=('/dev/accel[0-9]*', '/dev/vfio/[0-9]*'),
  ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
  """The accelerators of one run.

  Attributes:
    environment: variables by which its process sees them alone.
    locks: files whose locks the run's process shares.
    descriptors: this process's open files of these locks.
  """

  environment: dict[str, str]
  locks: tuple[str, ...]
  descriptors: tuple[int, ...]

  def release(self) -> None:
    """Ends this process's part in the locks."""
    for descriptor in self.descriptors:
      os.close(descriptor)


class Dealer:
  """Deals the accelerators of this machine in groups of one size."""

  def __init__(self, count: int | None):
    """Looks what is there; where nothing is, runs use the CPU.

    Args:
      count: accelerators of each run; None for all.

    Raises:
      ValueError: there are not so many, or they cannot be divided so.
    """
    self._kind, names = _present()
    self.count = len(names) if count is None else count
    if count is not None and self._kind is None:
      raise ValueError(
        f'launcher.accelerators={count}: this machine has no GPU and no TPU '
        'chip that JAX may use (CUDA_VISIBLE_DEVICES, TPU_VISIBLE_CHIPS, '
        'JAX_PLATFORMS). launcher.devices=N simulates devices.'
      )
    if self._kind is None:
      self._groups = []
      return
    if self.count > len(names):
      raise ValueError(
        f'launcher.accelerators={count}: this machine has {len(names)} '
        f'({self._kind.title}s {", ".join(names)}). Ask for no more.'
      )
    if self._kind.platform == 'tpu' and self.count not in _BOUNDS:
      raise ValueError(
        f'launcher.accelerators={self.count}: TPU chips of a host are given '
        f'to a process by {", ".join(map(str, _BOUNDS))}.'
      )
    starts = range(0, len(names) - self.count + 1, self.count)
    self._groups = [tuple(names[i : i + self.count]) for i in starts]

  @property
  def has_any(self) -> bool:
    """Whether there is anything to deal."""
    return bool(self._groups)

  @property
  def platform(self) -> str:
    """JAX's name of the accelerators; 'cpu' where there are none."""
    return 'cpu' if self._kind is None else self._kind.platform

  def take(self) -> Held | None:
    """Returns a group that no run has; None if there is none."""
    assert self._kind is not None
    for names in self._groups:
      locks = tuple(_lock_file(self._kind, name) for name in names)
      descriptors = _lock_all(locks)
      if descriptors is not None:
        return Held(
          environment=self._kind.environment(names),
          locks=locks,
          descriptors=descriptors,
        )
    return None


def share(locks: Sequence[str]) -> None:
  """Takes a part in locks, until this process ends.

  Args:
    locks: files of locks that the process that started this one holds.
  """
  for file in locks:
    fcntl.flock(_open(file), fcntl.LOCK_SH)


def _present() -> tuple[AcceleratorKind | None, list[str]]:
  """Returns the accelerators of this machine, if JAX may use them."""
  platforms = os.environ.get('JAX_PLATFORMS', '').split(',')
  usable = {
    'cuda': any(map(backends.has_module, backends.CUDA)),
    'tpu': backends.has_tpu(),
  }
  for kind in KINDS:
    if usable[kind.platform] and platforms[0] in (kind.platform, 'gpu', ''):
      if names := kind.names():
        return kind, names
  return None, []


def _lock_file(kind: AcceleratorKind, name: str) -> str:
  key = f'{socket.gethostname()} {kind.variable} {name}'
  short = hashlib.sha256(key.encode()).hexdigest()[:16]
  return os.path.join(tempfile.gettempdir(), f't2x-accelerator-{short}.lock')


def _lock_all(files: tuple[str, ...]) -> tuple[int, ...] | None:
  """Locks all files or none; returns their descriptors, or None.

  A lock is first taken alone and then made one that can be shared.
  """
  with contextlib.ExitStack() as stack:
    descriptors = []
    for file in files:
      descriptor = _open(file)
      stack.callback(os.close, descriptor)
      try:
        for mode in (fcntl.LOCK_EX, fcntl.LOCK_SH):
          fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
      except BlockingIOError:
        return None
      descriptors.append(descriptor)
    stack.pop_all()
    return tuple(descriptors)


def _open(file: str) -> int:
  """Returns the descriptor of a lock's file, which any user may have made."""
  try:
    return os.open(file, os.O_RDONLY)
  except FileNotFoundError:
    return os.open(file, os.O_RDONLY | os.O_CREAT, 0o644)

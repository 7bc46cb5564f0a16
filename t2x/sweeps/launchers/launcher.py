"""What a launcher is: it starts jobs, looks after them and ends them."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import shlex
from typing import Any
from typing import Literal
from typing import Protocol

from t2x.sweeps import points

Phase = Literal['queued', 'running', 'ended', 'failed', 'preempted', 'lost']
# JSON values by which a launcher finds a job again, in another process too.
Handle = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchJob:
  """One run to start.

  Attributes:
    name: name of the job: letters, digits and dashes, unlike those of other
      runs.
    attempt: name of this attempt at the run, unlike all others; '' for a job
      that is only shown. Jobs that are submitted together share what stands
      before the dash, and have their number behind it.
    command: command line of one process, from the project's root.
    workdir: directory of the run, local or gs://.
    log: local file for what it prints.
    group: name that the jobs of a study share.
    settings: the run's settings, for labels.
  """

  name: str
  command: Sequence[str]
  workdir: str
  log: str
  group: str
  settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
  attempt: str = ''

  @property
  def unique_name(self) -> str:
    """The name of the job, unlike those of earlier attempts."""
    return f'{self.name}-{self.attempt}' if self.attempt else self.name

  @property
  def text(self) -> str:
    """The command as a shell takes it."""
    return shlex.join(self.command)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobState:
  """What has become of a job.

  Attributes:
    phase: `queued`, `running`, `ended` (exit status 0, with or without all
      steps), `failed`, `preempted` (its machine was taken away), or `lost`
      (nothing is known of it any more).
    message: reason, for a person; '' if there is nothing to say.
  """

  phase: Phase
  message: str = ''

  @property
  def is_over(self) -> bool:
    """Whether nothing of the job is left to run."""
    return self.phase not in ('queued', 'running')


class Launcher(Protocol):
  """Starts the runs of a sweep somewhere."""

  @property
  def stays(self) -> bool:
    """Whether jobs go on when the sweep's process ends."""
    ...

  @property
  def devices(self) -> points.Devices:
    """The devices of one run."""
    ...

  def check(self) -> None:
    """Raises ValueError if nothing can be started from here."""
    ...

  def render(self, jobs: Sequence[LaunchJob]) -> str:
    """Returns the commands or manifests that `submit` uses, as text."""
    ...

  def submit(self, jobs: Sequence[LaunchJob]) -> list[Handle]:
    """Starts jobs, and returns what finds each of them again.

    These are the first jobs, where there is no room for the others now. A
    launcher may change a handle in `state` and `cancel`; it is kept so.

    Raises:
      LaunchError: the first one could not be started.
    """
    ...

  def find(self, job: LaunchJob) -> Handle | None:
    """Returns the handle of a job that another process has just submitted.

    That process was killed before it could keep the handle. None where there
    is no such job, or `submit` would replace it.
    """
    ...

  def state(self, handle: Handle) -> JobState:
    """Returns the present state of a job."""
    ...

  def logs(self, handle: Handle, num_lines: int = 20) -> str:
    """Returns the last lines that a job has printed."""
    ...

  def cancel(self, handle: Handle) -> None:
    """Asks a job to save and end; one that is over stays as it is."""
    ...

  def close(self) -> None:
    """Frees what the launcher itself holds; jobs are not touched."""
    ...


class LaunchError(RuntimeError):
  """A job could not be started, or its engine could not be asked."""


def one_by_one(
  start: Callable[[LaunchJob], Handle | None],
  jobs: Sequence[LaunchJob],
) -> list[Handle]:
  """Starts jobs one after another, up to one that cannot be started.

  Args:
    start: function that starts one of them; None of it means that there is no
      room for this one and those after it.
    jobs: the jobs.

  Raises:
    LaunchError: the first one could not be started.
  """
  handles: list[Handle] = []
  for job in jobs:
    try:
      handle = start(job)
    except LaunchError:
      if not handles:
        raise
      break  # The next call says why.
    if handle is None:
      break
    handles.append(handle)
  return handles

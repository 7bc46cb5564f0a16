"""Runs of a sweep on TPU slices of GKE: a JobSet for each, in Kueue's queue.

A JobSet has a job for each slice and a pod for each host. Kueue holds it back
until its chips are free. A pod that is preempted gets SIGTERM: the run saves,
ends with exit status 0 without having finished, and the pod says so by another
status, upon which the JobSet starts its pods again, from the checkpoint.

Sources: JobSet's custom resource definition (kubernetes-sigs/jobset, 08dfbdf),
GKE's documentation of TPUs, and the shape that xpk gives its workloads.
"""

from collections.abc import Sequence
import dataclasses
import json
from typing import Any
from typing import ClassVar

from t2x import field_checks
from t2x.hardware import pods
from t2x.sweeps import points
from t2x.sweeps.launchers import launcher
from t2x.sweeps.launchers import manifests
from t2x.sweeps.launchers import programs

_SAVED = 42  # Exit status of a pod whose run saved and has more to do.
# Exit statuses of a run that would fail again: its own errors and Python's, and
# the shell's where there is no such program.
_ERRORS = (1, 2, 126, 127)
_MOST_NAME = 63 - len('-slice-0-000-00000')  # Pods are named after it.
_RESTARTED = 'ReachedMaxRestarts'  # Reason of a JobSet's end.
_LABEL = 'jobset.sigs.k8s.io/jobset-name'


@dataclasses.dataclass(frozen=True, kw_only=True)
class GkeConfig:
  """Settings of runs on a GKE cluster with JobSet and Kueue.

  Attributes:
    slice: slice of each run, such as 'v5e-16' or 'v5p:4x4x4'.
    num_slices: slices of each run.
    image: container image with t2x and what it needs.
    queue: Kueue's local queue.
    namespace: Kubernetes namespace.
    priority: priority class of the pods; None takes the cluster's default.
    spot: whether the slices may be preempted, for less money.
    max_restarts: times that all pods of a run are started again.
    grace_seconds: seconds that a pod has to save after SIGTERM.
    keep_seconds: seconds for which a finished JobSet stays to be looked at.
    service_account: Kubernetes service account of the pods; None takes the
      namespace's default.
    directory: directory of t2x in the image.
    context: context of kubectl; None takes the current one.
  """

  kind: ClassVar[str] = 'gke'
  slice: str = ''
  num_slices: int = 1
  image: str = ''
  queue: str = 'multislice-queue'
  namespace: str = 'default'
  priority: str | None = None
  spot: bool = False
  max_restarts: int = 10
  grace_seconds: int = 60
  keep_seconds: int = 43200
  service_account: str | None = None
  directory: str = '/t2x'
  context: str | None = None

  def __post_init__(self) -> None:
    field_checks.least(
      self, 'launcher.', max_restarts=0, grace_seconds=1, keep_seconds=0
    )
    for name, example in (
      ('slice', 'v5e-16'),
      ('image', 'europe-docker.pkg.dev/PROJECT/t2x/t2x:1'),
    ):
      if not getattr(self, name):
        raise ValueError(
          f'launcher.{name} is missing: set it, as in --launcher_set '
          f'{name}={example}.'
        )
    for name in ('namespace', 'queue', 'priority', 'service_account'):
      if (value := getattr(self, name)) is not None:
        manifests.check_label(f'launcher.{name}', value)
    field_checks.matches(
      self,
      'launcher.',
      'image',
      r'[A-Za-z0-9][\w./:@-]*',
      'the name of a container image, as europe-docker.pkg.dev/P/t2x/t2x:1',
    )
    assert self.pod  # Refuses a slice that does not exist.

  @property
  def pod(self) -> pods.Pod:
    """The slices of each run."""
    return pods.of_launcher(self.slice, self.num_slices)


class GkeLauncher:
  """Applies JobSets by kubectl."""

  stays = True

  def __init__(self, config: GkeConfig):
    self._config = config

  @property
  def devices(self) -> points.Devices:
    """The devices of one run."""
    return points.Devices.of_pod(self._config.pod)

  def check(self) -> None:
    """Raises ValueError if kubectl is not here."""
    programs.need(
      'kubectl',
      'Install it (gcloud components install kubectl) and get the credentials '
      'of the cluster (gcloud container clusters get-credentials NAME).',
    )

  def manifest(self, job: launcher.LaunchJob) -> dict[str, Any]:
    """Returns the JobSet of a run, as JSON values.

    Raises:
      ValueError: the workdir is in no object store, or the job has a name that
        Kubernetes refuses.
    """
    c, pod = self._config, self._config.pod
    manifests.check_label('the name of a job', job.name, _MOST_NAME)
    manifests.check_remote(job)
    return {
      'apiVersion': 'jobset.x-k8s.io/v1alpha2',
      'kind': 'JobSet',
      'metadata': {
        'name': job.name,
        'namespace': c.namespace,
        'labels': {'kueue.x-k8s.io/queue-name': c.queue},
        'annotations': {
          'alpha.jobset.sigs.k8s.io/exclusive-topology': (
            'cloud.google.com/gke-nodepool'
          )
        },
      },
      'spec': {
        'ttlSecondsAfterFinished': c.keep_seconds,
        'failurePolicy': {
          'maxRestarts': c.max_restarts,
          'rules': [
            {
              'name': 'no-restart-of-errors',
              'action': 'FailJobSet',
              'onJobFailureReasons': ['PodFailurePolicy'],
            }
          ],
        },
        'replicatedJobs': [
          {
            'name': 'slice',
            'replicas': pod.num_slices,
            'template': {
              'spec': {
                'parallelism': pod.hosts,
                'completions': pod.hosts,
                'completionMode': 'Indexed',
                'backoffLimit': 0,
                'podFailurePolicy': {
                  'rules': [
                    {
                      'action': 'FailJob',
                      'onExitCodes': {
                        'containerName': 'run',
                        'operator': 'In',
                        'values': list(_ERRORS),
                      },
                    }
                  ]
                },
                'template': {'spec': self._pod_spec(job)},
              }
            },
          }
        ],
      },
    }

  def _pod_spec(self, job: launcher.LaunchJob) -> dict[str, Any]:
    c, pod = self._config, self._config.pod
    selector = {
      'cloud.google.com/gke-tpu-accelerator': pod.label,
      'cloud.google.com/gke-tpu-topology': pod.shape,
    }
    tolerations = [
      {'key': 'google.com/tpu', 'operator': 'Exists', 'effect': 'NoSchedule'}
    ]
    if c.spot:
      selector['cloud.google.com/gke-spot'] = 'true'
      tolerations.append(
        {
          'key': 'cloud.google.com/gke-spot',
          'operator': 'Equal',
          'value': 'true',
          'effect': 'NoSchedule',
        }
      )
    spec = {
      'restartPolicy': 'Never',
      'hostNetwork': True,
      'dnsPolicy': 'ClusterFirstWithHostNet',
      'terminationGracePeriodSeconds': c.grace_seconds,
      'nodeSelector': selector,
      'tolerations': tolerations,
      'volumes': [{'name': 'shared-memory', 'emptyDir': {'medium': 'Memory'}}],
      'containers': [
        {
          'name': 'run',
          'image': c.image,
          'securityContext': {'privileged': True},
          'workingDir': c.directory,
          'env': [{'name': 'PYTHONUNBUFFERED', 'value': '1'}],
          'command': ['bash', '-c', self.pod_script(job)],
          'resources': {'limits': {'google.com/tpu': pod.chips_per_host}},
          'volumeMounts': [{'name': 'shared-memory', 'mountPath': '/dev/shm'}],
        }
      ],
    }
    if c.priority is not None:
      spec['priorityClassName'] = c.priority
    if c.service_account is not None:
      spec['serviceAccountName'] = c.service_account
    return spec

  def pod_script(self, job: launcher.LaunchJob) -> str:
    """Returns the script of a pod: the command, and what its end means."""
    # The shell is process 1, which takes no signal that it does not trap.
    return (
      'stopped=\n'
      f'{job.text} &\n'
      "trap 'stopped=1; kill -TERM $!' TERM\n"
      'wait $!; code=$?\n'
      'while kill -0 $! 2>/dev/null; do wait $!; code=$?; done\n'
      f'if [[ $code == 0 && -n $stopped ]]; then exit {_SAVED}; fi\n'
      'exit $code\n'
    )

  def render(self, jobs: Sequence[launcher.LaunchJob]) -> str:
    """Returns the JobSets as YAML documents."""
    return '---\n'.join(manifests.dump(self.manifest(job)) for job in jobs)

  def _kubectl(self, *arguments: str, stdin: str | None = None) -> str:
    context = self._config.context
    before = ['kubectl', *([f'--context={context}'] if context else [])]
    return programs.call(
      [*before, f'--namespace={self._config.namespace}', *arguments],
      stdin=stdin,
    )

  def submit(self, jobs: Sequence[launcher.LaunchJob]) -> list[launcher.Handle]:
    """Creates a JobSet for each job; one of before is deleted first.

    Raises:
      LaunchError: kubectl fails.
    """

    def start(job: launcher.LaunchJob) -> launcher.Handle:
      text = json.dumps(self.manifest(job))
      self._kubectl(
        'delete', 'jobset', job.name, '--ignore-not-found', '--wait=true'
      )
      self._kubectl('create', '--filename=-', stdin=text)
      return {'name': job.name}

    return launcher.one_by_one(start, jobs)

  def find(self, job: launcher.LaunchJob) -> launcher.Handle | None:
    """Returns None: `submit` replaces a JobSet of that name."""
    del job
    return None

  def state(self, handle: launcher.Handle) -> launcher.JobState:
    """Returns the state by the JobSet's conditions."""
    said = self._kubectl(
      'get', 'jobset', handle['name'], '--ignore-not-found', '--output=json'
    )
    if not said.strip():
      return launcher.JobState(phase='lost', message='its JobSet is gone')
    return jobset_state(json.loads(said))

  def logs(self, handle: launcher.Handle, num_lines: int = 20) -> str:
    """Returns the last lines of the first pod of the first slice."""
    selector = (
      f'{_LABEL}={handle["name"]},jobset.sigs.k8s.io/job-index=0,'
      'batch.kubernetes.io/job-completion-index=0'
    )
    try:
      return self._kubectl(
        'logs', f'--selector={selector}', f'--tail={num_lines}'
      )
    except launcher.LaunchError as error:  # Its pods are gone, say.
      return str(error)

  def cancel(self, handle: launcher.Handle) -> None:
    """Deletes the JobSet, whose pods get SIGTERM and save."""
    self._kubectl(
      'delete', 'jobset', handle['name'], '--ignore-not-found', '--wait=false'
    )

  def close(self) -> None:
    """Does nothing."""


def jobset_state(jobset: dict[str, Any]) -> launcher.JobState:
  """Returns the state of a JobSet, from what Kubernetes says of it."""
  status = jobset.get('status', {})
  there = [c for c in status.get('conditions', ()) if c.get('status') == 'True']
  conditions = {c['type']: c.get('message', '') for c in there}
  reasons = {c['type']: c.get('reason', '') for c in there}
  if 'Completed' in conditions:
    return launcher.JobState(phase='ended')
  if 'Failed' in conditions:
    # Too many preemptions are no failure of the run: it goes on in a new one.
    phase = 'ended' if reasons['Failed'] == _RESTARTED else 'failed'
    return launcher.JobState(phase=phase, message=conditions['Failed'])
  if 'Suspended' in conditions or jobset['spec'].get('suspend'):
    return launcher.JobState(phase='queued', message='Kueue holds it back')
  jobs = status.get('replicatedJobsStatus', ())
  if any(job.get('active', 0) for job in jobs):
    return launcher.JobState(phase='running')
  return launcher.JobState(phase='queued', message='its pods are not there yet')

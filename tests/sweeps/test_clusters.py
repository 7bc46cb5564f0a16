"""Launchers of clusters: their manifests, and what they make of answers."""

import gzip
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import jsonschema
import program_stand_in
import pytest
import yaml

from t2x.hardware import pods
from t2x.sweeps.launchers import choice
from t2x.sweeps.launchers import launcher

_HERE = pathlib.Path(__file__).parent
_ROOT = _HERE.parents[1]
_GOLDEN = _HERE / 'golden'
# JobSet's custom resource definition, where it is at hand.
_CRD = os.environ.get('JOBSET_CRD') or (
  _ROOT.parent / 'shared' / 'pods' / 'jobset-crd.yaml.gz'
)
_SLICES = ('v4-32', 'v5e-16', 'v5p-128', 'v6e-256', 'tpu7x-128')
_CASES = [(name, num) for name in _SLICES for num in (1, 4)]


def _job(**changes) -> launcher.LaunchJob:
  fields = {
    'name': 'rates-0123456789ab',
    'command': (
      'python',
      'experiments/llama_1b.py',
      '--workdir=gs://bucket/rates/trials/0123456789ab',
      '--set',
      'optim.learning_rate=0.001',
    ),
    'workdir': 'gs://bucket/rates/trials/0123456789ab',
    'log': '/tmp/rates/logs/0123456789ab.log',
    'group': 'rates',
  }
  return launcher.LaunchJob(**fields | changes)


def _make(kind: str, **settings):
  given = {
    'gke': {'slice': 'v5e-16', 'image': 'registry/t2x:1'},
    'tpu_vm': {'slice': 'v5e-16', 'zone': 'us-west4-a'},
    'skypilot': {'slice': 'v5e-16'},
    'slurm': {},
  }[kind]
  return choice.make(
    kind, [f'{n}={v}' for n, v in {**given, **settings}.items()]
  )


def _rendered(kind: str) -> str:
  parts = []
  for name, num in _CASES:
    if kind == 'skypilot':
      if num > 1:
        continue
      made = _make(kind, slice=name)
    else:
      made = _make(kind, slice=name, num_slices=num)
    parts.append(f'# {num} x {name}\n{made.render([_job()])}')
  return '---\n'.join(parts)


@pytest.mark.parametrize('kind', ['gke', 'tpu_vm', 'skypilot'])
def test_manifests_are_as_they_were(kind):
  """`python tests/sweeps/test_clusters.py` writes them anew."""
  assert _rendered(kind) == (_GOLDEN / f'{kind}.txt').read_text()


def _closed(schema):
  """Returns a schema that refuses fields which it does not name."""
  if isinstance(schema, dict):
    schema = {name: _closed(value) for name, value in schema.items()}
    if 'properties' in schema:
      schema['additionalProperties'] = False
  if isinstance(schema, list):
    return [_closed(value) for value in schema]
  return schema


@pytest.fixture(scope='module')
def schema():
  file = pathlib.Path(_CRD)
  if not file.exists():
    pytest.skip(f'{file.name} is not here: set JOBSET_CRD to its path')
  resource = yaml.load(gzip.open(file), Loader=yaml.CSafeLoader)
  (version,) = resource['spec']['versions']
  # Of a validator: `jsonschema.validate` would check the schema itself anew.
  return jsonschema.Draft202012Validator(
    _closed(version['schema']['openAPIV3Schema'])
  )


@pytest.mark.parametrize('name, num', _CASES)
def test_jobsets_keep_to_their_schema(schema, name, num):
  made = _make('gke', slice=name, num_slices=num, spot=True, priority='high')
  manifest = made.manifest(_job())
  schema.validate(manifest)
  # The schema takes 60.0 for a whole number, and Kubernetes does not.
  assert not re.search(r': \d+\.\d', json.dumps(manifest))
  manifest['spec']['replicatedJobs'][0]['template']['spec']['paralelism'] = 1
  with pytest.raises(jsonschema.ValidationError, match='paralelism'):
    schema.validate(manifest)


def _end_of_pod(tmp_path, signal_after=None, **environment):
  """Returns the exit status of a pod's script, whose run is a stand-in."""
  stand_in = _HERE / 'stand_in.py'
  workdir = tmp_path / 'run'
  command = (sys.executable, str(stand_in), f'--workdir={workdir}')
  script = _make('gke').pod_script(_job(command=command))
  child = subprocess.Popen(
    ['bash', '-c', script], env={**os.environ, **environment}
  )
  if signal_after:
    deadline = time.monotonic() + 20
    while not (workdir / 'metrics.jsonl').exists():
      assert time.monotonic() < deadline
      time.sleep(0.02)
    time.sleep(signal_after)
    child.terminate()
  return child.wait(timeout=30)


def test_a_pod_says_how_it_ended(tmp_path):
  assert _end_of_pod(tmp_path / 'whole') == 0
  assert _end_of_pod(tmp_path / 'dies', DIE='3:9') == 3
  # Preempted: it saved, and is to be started again.
  assert _end_of_pod(tmp_path / 'told', 0.2, PAUSE='0.2') == 42
  assert not (tmp_path / 'told' / 'run' / 'finished.json').exists()


# What a JobSet is made of, for where the definition is not at hand.
_FIELDS = {
  'spec': {'ttlSecondsAfterFinished', 'failurePolicy', 'replicatedJobs'},
  'job': {
    'parallelism',
    'completions',
    'completionMode',
    'backoffLimit',
    'podFailurePolicy',
    'template',
  },
}


@pytest.mark.parametrize(
  'name, num, hosts, chips, label, topology, devices',
  [
    ('v4-32', 1, 4, 4, 'tpu-v4-podslice', '2x2x4', 16),
    ('v5e-16', 1, 4, 4, 'tpu-v5-lite-podslice', '4x4', 16),
    ('v5litepod-1', 1, 1, 1, 'tpu-v5-lite-podslice', '1x1', 1),
    ('v5p-128', 2, 16, 4, 'tpu-v5p-slice', '4x4x4', 128),
    ('v5p:2x2x1', 1, 1, 4, 'tpu-v5p-slice', '2x2x1', 4),
    ('v6e-256', 1, 64, 4, 'tpu-v6e-slice', '16x16', 256),
    ('tpu7x-128', 1, 16, 4, 'tpu7x', '4x4x4', 128),
  ],
)
def test_a_jobset_by_hand(name, num, hosts, chips, label, topology, devices):
  made = _make('gke', slice=name, num_slices=num)
  manifest = made.manifest(_job())
  spec = manifest['spec']
  assert set(spec) == _FIELDS['spec']
  (slices,) = spec['replicatedJobs']
  assert slices['replicas'] == num
  job = slices['template']['spec']
  assert set(job) == _FIELDS['job']
  assert job['parallelism'] == job['completions'] == hosts
  pod = job['template']['spec']
  assert pod['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': label,
    'cloud.google.com/gke-tpu-topology': topology,
  }
  (container,) = pod['containers']
  assert container['resources'] == {'limits': {'google.com/tpu': chips}}
  assert _job().text in container['command'][2]
  assert made.devices.number == devices
  assert made.devices.num_slices == num


@pytest.mark.parametrize(
  'name, message',
  [
    ('v5e-17', 'no such slice. Near are v5e-16 and v5e-32'),
    ('v5x-16', 'is no slice of TPUs. Did you mean v5'),
    ('v5e:3x3', 'there is no such slice. Near are v5e:2x4'),
    ('h100:8', 'are GPUs'),
    ('', 'launcher.slice is missing'),
  ],
)
def test_slices_that_do_not_exist(name, message):
  with pytest.raises(ValueError, match=message):
    _make('gke', slice=name)


def test_sizes_of_slices():
  for name in _SLICES:
    pod = pods.parse(name)
    assert pods.parse(pod.accelerator) == pod
  assert pods.parse('v5p-4096').shape == '8x16x16'
  assert pods.parse('v4-8').shape == '2x2x1'


@pytest.mark.parametrize(
  'kind, settings, message',
  [
    ('gke', {'image': ''}, 'launcher.image is missing'),
    ('gke', {'queue': 'My_Queue'}, 'launcher.queue=.My_Queue.: it is up to 63'),
    ('gke', {'num_slices': 0}, 'num_slices=0; it is 1 or more'),
    ('tpu_vm', {'zone': ''}, 'launcher.zone is missing'),
    ('tpu_vm', {'model': 'cheap'}, 'one of on_demand, spot, reserved'),
    ('skypilot', {'accelerators': 'H100:8'}, 'give one of them'),
    ('slurm', {'nodes': 0}, 'launcher.nodes=0; it is 1 or more'),
    ('slurm', {'node': 2}, "Did you mean 'nodes'"),
  ],
)
def test_settings_that_cannot_be(kind, settings, message):
  with pytest.raises(ValueError, match=message):
    _make(kind, **settings)


def test_launchers_that_do_not_exist():
  with pytest.raises(ValueError, match="Did you mean 'slurm'"):
    choice.make('slrum')


@pytest.mark.parametrize('kind', ['gke', 'tpu_vm', 'skypilot'])
def test_a_study_on_a_local_disk(kind):
  job = _job(workdir='/data/rates/trials/0123456789ab')
  with pytest.raises(ValueError, match='--study=/data/rates is a local direct'):
    _make(kind).render([job])


@pytest.mark.parametrize('name', ['Rates-1', 'rates_1', '1-rates', 'r' * 60])
def test_names_that_kubernetes_refuses(name):
  with pytest.raises(ValueError, match='the name of a job=.* lower-case'):
    _make('gke').manifest(_job(name=name))


@pytest.fixture
def program(tmp_path, monkeypatch):
  directory = tmp_path / 'bin'
  monkeypatch.setenv('PATH', f'{directory}:{os.environ["PATH"]}')
  return lambda name: program_stand_in.Program(directory, name)


@pytest.mark.parametrize(
  'kind, name', [('gke', 'kubectl'), ('tpu_vm', 'gcloud'), ('skypilot', 'sky')]
)
def test_programs_that_are_missing(kind, name, tmp_path, monkeypatch):
  monkeypatch.setenv('PATH', str(tmp_path))
  with pytest.raises(ValueError, match=f"no program '{name}' on PATH. .nstall"):
    _make(kind).check()


def _jobset(*conditions, active=0, suspend=False):
  return {
    'spec': {'suspend': suspend},
    'status': {
      'conditions': [
        {'type': t, 'status': 'True', 'message': f'for {t}'} for t in conditions
      ],
      'replicatedJobsStatus': [{'name': 'slice', 'active': active}],
    },
  }


def test_a_jobsets_way(program):
  kubectl = program('kubectl')
  made = _make('gke', context='cluster')
  made.check()
  (handle,) = made.submit([_job()])
  (delete, _), (create, manifest) = kubectl.calls()
  assert delete.startswith('--context=cluster --namespace=default delete')
  assert create.endswith('create --filename=-')
  assert json.loads(manifest) == made.manifest(_job())
  kubectl.answers(
    'get jobset',
    _jobset(suspend=True),
    _jobset('Suspended'),
    _jobset(),
    _jobset(active=1),
    _jobset('Completed'),
    _jobset('Failed'),
    '',
    (1, 'Unable to connect to the server'),
  )
  seen = [made.state(handle) for _ in range(7)]
  assert [state.phase for state in seen] == [
    'queued',
    'queued',
    'queued',
    'running',
    'ended',
    'failed',
    'lost',
  ]
  assert seen[5].message == 'for Failed'
  with pytest.raises(launcher.LaunchError, match='Unable to connect'):
    made.state(handle)
  kubectl.answers('logs', 'line 1\nline 2')
  assert made.logs(handle, 2).strip() == 'line 1\nline 2'
  made.cancel(handle)
  assert 'delete jobset rates-0123456789ab' in kubectl.calls()[-1][0]
  kubectl.answers('create', (1, 'quota exceeded'))
  with pytest.raises(launcher.LaunchError, match='quota exceeded'):
    made.submit([_job()])


def _resource(state, **more):
  return {'state': {'state': state, **more}}


def test_tpu_vms_from_request_to_end(program):
  gcloud = program('gcloud')
  made = _make('tpu_vm', num_slices=2)
  (handle,) = made.submit([_job()])
  ((create, _),) = gcloud.calls()
  assert '--accelerator-type=v5litepod-16' in create
  assert '--node-count=2 --node-prefix=rates-0123456789ab --spot' in create
  gcloud.answers(
    'describe',
    _resource('WAITING_FOR_RESOURCES'),
    _resource('PROVISIONING'),
    _resource('ACTIVE'),
  )
  gcloud.answers('cat ~/t2x.status', '', '0')
  seen = [made.state(handle).phase for _ in range(5)]
  assert seen == ['queued', 'queued', 'running', 'running', 'ended']
  calls = [text for text, _ in gcloud.calls()]
  for node in ('rates-0123456789ab-0', 'rates-0123456789ab-1'):
    assert any('scp' in c and f'{node}:t2x.tar.gz' in c for c in calls)
    assert any(f'ssh {node}' in c and '--worker=all' in c for c in calls)
  assert 'queued-resources delete rates-0123456789ab' in calls[-1]
  # It stays so, without a further call.
  assert made.state(json.loads(json.dumps(handle))).phase == 'ended'
  assert len(gcloud.calls()) == len(calls)


def test_tpu_vms_that_are_taken_away(program):
  gcloud = program('gcloud')
  made = _make('tpu_vm')
  (handle,) = made.submit([_job()])
  gcloud.answers('describe', _resource('ACTIVE'), _resource('SUSPENDED'))
  assert made.state(handle).phase == 'running'
  assert made.state(handle) == launcher.JobState(
    phase='preempted', message='its slices are suspended'
  )
  assert 'delete' in gcloud.calls()[-1][0]


def test_tpu_vms_that_there_are_none_of(program):
  gcloud = program('gcloud')
  made = _make('tpu_vm', valid_hours=6)
  (handle,) = made.submit([_job()])
  assert '--valid-until-duration=6h' in gcloud.calls()[0][0]
  failed = {'error': {'message': 'There is no more capacity in the zone'}}
  gcloud.answers('describe', _resource('FAILED', failedData=failed))
  state = made.state(handle)
  assert state.phase == 'failed' and 'no more capacity' in state.message


def test_a_run_that_fails_on_tpu_vms(program):
  gcloud = program('gcloud')
  made = _make('tpu_vm')
  (handle,) = made.submit([_job()])
  gcloud.answers('describe', _resource('ACTIVE'))
  made.state(handle)
  gcloud.answers('cat ~/t2x.status', '1')
  gcloud.answers('tail -n', 'error: no such file')
  assert made.state(handle).message == 'exit status 1'
  assert made.logs(handle).strip() == 'error: no such file'
  # A request that is withdrawn needs no host.
  (other,) = made.submit([_job()])
  made.cancel(other)
  assert made.state(other).phase == 'ended'


def test_skypilots_jobs(program):
  sky = program('sky')
  made = _make('skypilot', infra='gcp/europe-west4')
  (handle,) = made.submit([_job()])
  call = sky.calls()[0][0]
  assert call.startswith('jobs launch --name rates-0123456789ab --detach-run')
  job = lambda number, status, **more: {
    'job_id': number,
    'job_name': handle['name'],
    'status': status,
    **more,
  }
  sky.answers(
    'jobs queue',
    [job(1, 'FAILED'), job(2, 'STARTING')],
    [job(2, 'RUNNING')],
    [job(2, 'RECOVERING')],
    [job(2, 'SUCCEEDED')],
    [job(2, 'FAILED', failure_reason='no disk')],
    [],
  )
  seen = [made.state(handle) for _ in range(6)]
  assert [s.phase for s in seen] == [
    'queued',
    'running',
    'queued',
    'ended',
    'failed',
    'lost',
  ]
  assert seen[4].message == 'no disk'
  made.cancel(handle)
  assert sky.calls()[-1][0].startswith('jobs cancel --name rates-0123')


if __name__ == '__main__':
  sys.path[:0] = [str(_ROOT)]
  _GOLDEN.mkdir(exist_ok=True)
  for _kind in ('gke', 'tpu_vm', 'skypilot'):
    (_GOLDEN / f'{_kind}.txt').write_text(_rendered(_kind))

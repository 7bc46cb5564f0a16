"""A study on gs://, against an emulator of Google Cloud Storage."""

import buckets
import pytest
import real_sweep
import tiny

from t2x import files
from t2x.sweeps import study as study_lib

pytestmark = [pytest.mark.slow, pytest.mark.reference]
buckets.need()

_RATES = (1e-3, 1e-2, 1e-1)


@pytest.fixture(scope='module')
def bucket(tmp_path_factory):
  """A bucket in memory, which this process and its children talk to."""
  with buckets.emulated(tmp_path_factory.mktemp('emulator') / 'log') as url:
    yield url


@pytest.mark.filterwarnings('default')  # The client leaves its sockets open.
def test_workers_share_a_study_in_a_bucket(bucket, tmp_path, monkeypatch):
  """One is killed as its trial runs: two others go on, and share the rest."""
  monkeypatch.setenv('T2X_DATA_DIR', str(tmp_path / 'cache'))
  arguments = real_sweep.arguments(
    tmp_path, f'{bucket}/rates', _RATES, 4, '--launcher_set', 'devices=8'
  )
  first = real_sweep.start(tmp_path, *arguments)
  trials = files.path(f'{bucket}/rates/trials')
  saved = lambda key: (
    trials / key / 'checkpoints' / '2' / 'commit_success.txt'
  ).exists()
  real_sweep.wait(lambda: any(saved(p.name) for p in files.children(trials)))
  begun = study_lib.read(f'{bucket}/rates').trials()
  assert [trial.state for trial in begun] == ['running']
  first.kill()
  first.communicate()
  others = [real_sweep.start(tmp_path, *arguments) for _ in range(2)]
  ends = [other.communicate(timeout=400) for other in others]
  assert [other.returncode for other in others] == [0, 0], ends
  assert any('goes on' in said for said, _ in ends), ends
  found = study_lib.read(f'{bucket}/rates').trials()
  assert [trial.state for trial in found] == ['complete'] * 3
  assert len({trial.key for trial in found}) == 3
  alone = tiny.losses(real_sweep.run_alone(tmp_path, _RATES[0], 4))
  assert tiny.losses(trials / found[0].key) == alone
  assert [*(tmp_path / 'cache' / 'sweep_logs').glob('*/*.log')]

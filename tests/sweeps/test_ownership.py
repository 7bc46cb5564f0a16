import json
import multiprocessing
import subprocess
import sys

from etils import epath

from t2x import files
from t2x.sweeps import ownership


def _claim_all(directory, queue):
  workers = ownership.Workers(epath.Path(directory))
  queue.put([i for i in range(200) if workers.claim(f'n{i}')])


def test_each_is_claimed_by_one_of_several_processes(tmp_path):
  context = multiprocessing.get_context('spawn')
  queue = context.Queue()
  children = [
    context.Process(target=_claim_all, args=(str(tmp_path), queue))
    for _ in range(3)
  ]
  for child in children:
    child.start()
  lists = [queue.get(timeout=60) for _ in children]
  for child in children:
    child.join()
  assert sorted(sum(lists, [])) == list(range(200))


def test_a_file_is_created_whole_once(tmp_path):
  file = epath.Path(tmp_path / 'a')
  assert files.create_whole(file, 'one')
  assert not files.create_whole(file, 'two')
  assert file.read_text() == 'one'
  assert [p.name for p in tmp_path.iterdir()] == ['a']


def test_a_living_worker_keeps_its_claims(tmp_path):
  root = epath.Path(tmp_path)
  one, two = ownership.Workers(root), ownership.Workers(root)
  with one.at_work():
    assert one.claim('x') and not two.claim('x')
    assert two.others() == [one.own]
    assert not two.take_over('x') and one.take_over('x')
  assert two.others() == []
  assert two.take_over('x')
  assert two.owner_of('x') == two.own
  # The second time the number is another.
  three = ownership.Workers(root)
  assert not one.is_dead(one.own)
  assert three.take_over('x') and three.owner_of('x') == three.own


_CHILD = """
import sys
from etils import epath
from t2x.sweeps import ownership
workers = ownership.Workers(epath.Path(sys.argv[1]))
with workers.at_work():
  print(workers.own, workers.claim('x'), flush=True)
  sys.stdin.read()
"""


def test_a_killed_worker_is_dead_at_once(tmp_path):
  child = subprocess.Popen(
    [sys.executable, '-c', _CHILD, str(tmp_path)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert child.stdout is not None
  name, claimed = child.stdout.readline().split()
  assert claimed == 'True'
  workers = ownership.Workers(epath.Path(tmp_path))
  assert not workers.is_dead(name) and not workers.take_over('x')
  child.kill()
  child.wait()
  assert workers.is_dead(name) and workers.take_over('x')
  child.communicate()


def test_another_machine_is_dead_once_its_file_stands_still(
  tmp_path, monkeypatch
):
  workers = ownership.Workers(epath.Path(tmp_path), dead_seconds=60)
  now = [0.0]
  monkeypatch.setattr(ownership.time, 'monotonic', lambda: now[0])
  file = tmp_path / 'workers' / 'far.json'

  def beat(number, ended=False):
    facts = {
      'machine': 'another',
      'process': 1,
      'started': '1',
      'beats': number,
      'ended': ended,
    }
    file.write_text(json.dumps(facts))

  beat(1)
  assert not workers.is_dead('far')
  now[0] = 59.0  # Slow, and alive.
  assert not workers.is_dead('far')
  beat(2)
  now[0] = 118.0
  assert not workers.is_dead('far')
  now[0] = 179.0
  assert workers.is_dead('far')
  beat(3, ended=True)
  assert workers.is_dead('far')
  assert workers.is_dead('unknown')

import dataclasses

import pytest
import small_sweep
import tiny

from t2x.config import overrides
from t2x.sweeps import checks
from t2x.sweeps import definition
from t2x.sweeps import points
from t2x.sweeps import search
from t2x.sweeps import space

_DEVICES = points.Devices(number=8)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  return tiny.experiment_of(tmp_path_factory.mktemp('tiny'))


def test_a_run_is_known_by_its_config(base):
  sweep = small_sweep.sweep()
  one, same, other = (
    points.candidate(base, sweep, {'optim.learning_rate': rate})
    for rate in (1e-3, 0.001, 2e-3)
  )
  assert one.key == same.key == one.runs[0].key != other.key
  assert one.runs[0].config.optim.learning_rate == 1e-3
  assert one.runs[0].settings == {'optim.learning_rate': '0.001'}
  # When it is looked at does not make it another run, unless that is varied.
  looked = overrides.override(base, {'train.log_every': '5'})
  point = {'optim.learning_rate': 1e-3}
  assert points.candidate(looked, sweep, point).key == one.key
  threads = small_sweep.sweep(parameters={'data.num_threads': (1, 2)})
  keys = [
    points.candidate(base, threads, {'data.num_threads': n}).key for n in (1, 2)
  ]
  assert keys[0] != keys[1]


def test_seeds_are_runs_of_a_point(base):
  sweep = small_sweep.sweep(seeds=(0, 7))
  found = points.candidate(base, sweep, {'optim.learning_rate': 1e-3})
  assert [run.config.train.seed for run in found.runs] == [0, 7]
  assert len({found.key, *(run.key for run in found.runs)}) == 3
  # Where another sweep asks for the same run, it is the same.
  alone = points.candidate(
    base, small_sweep.sweep(seeds=(7,)), {'optim.learning_rate': 1e-3}
  )
  assert alone.runs[0].key == found.runs[1].key


@pytest.mark.parametrize(
  'parameters, message',
  [
    ({'optim.learning_rat': (1.0,)}, "Did you mean 'learning_rate'"),
    ({'optimizer.learning_rate': (1.0,)}, "has no 'optimizer'"),
    ({'model.num_layers': (2, 2.5)}, "'2.5' does not fit the type int"),
    ({'model.num_layers': ('two',)}, "'two' does not fit the type int"),
  ],
)
def test_names_and_types(base, parameters, message):
  sweep = small_sweep.sweep(parameters=parameters)
  with pytest.raises(ValueError, match=message):
    points.check(base, sweep, _DEVICES)


def test_a_range_of_an_integer_field(base):
  sweep = small_sweep.sweep(
    parameters={'model.num_layers': space.Uniform(1.0, 4.0)},
    search=search.RandomSearch(),
  )
  with pytest.raises(ValueError, match='Use space.Integers'):
    points.check(base, sweep, _DEVICES)


def test_points_that_cannot_run_are_listed(base):
  sweep = small_sweep.sweep(
    parameters={
      'mesh.data, mesh.tensor': ((2, 2), (1, 4), (1, 3)),
      'model.embed_dim': (16, 15),
    }
  )
  wrong = points.check(base, sweep, _DEVICES).wrong
  described = [points.describe(point) for point, _ in wrong]
  tensor3 = [text for text in described if 'mesh.tensor=3' in text]
  assert len(tensor3) == 2
  assert 'mesh.data=2 mesh.tensor=2 model.embed_dim=16' not in described
  message = points.refusal(wrong, sweep.num_points)
  assert message.startswith(f'{len(wrong)} of 6 points cannot run:\n')
  assert '--skip_impossible' in message
  alike = [(point, 'no') for point, _ in wrong]
  assert points.refusal(alike, len(alike)) == (
    f'None of the {len(alike)} points can run: no'
  )


def test_points_that_repeat_others_are_counted(base):
  drawn = search.RandomSearch(num_trials=9)
  sweep = small_sweep.sweep(search=drawn)
  checked = points.check(base, sweep, _DEVICES)
  assert len(checked.possible) + checked.num_repeated == 9
  assert len(checked.possible) <= len(small_sweep.RATES)


def test_a_space_that_is_far_too_large(base):
  values = tuple(range(1000))
  sweep = small_sweep.sweep(
    parameters={'train.seed': values, 'optim.schedule.warmup_steps': values}
  )
  with pytest.raises(ValueError, match='has 1,000,000 points'):
    points.check(base, sweep, _DEVICES)


def test_a_range_for_whole_numbers(base):
  sweep = small_sweep.sweep(
    parameters={'model.num_layers': space.Uniform(1, 3)},
    search=search.RandomSearch(),
  )
  with pytest.raises(ValueError, match='Use space.Integers'):
    points.check(base, sweep, _DEVICES)


@pytest.mark.parametrize(
  'pruning, every, message',
  [
    (search.Asha(min_steps=100), 2, 'it would end none'),
    (search.Median(min_step=8), 2, 'it would end none'),
    (search.Asha(min_steps=2), 0, 'comes at step 8 alone, the last'),
  ],
)
def test_pruning_that_could_not_act(base, pruning, every, message):
  train = dataclasses.replace(base.train, num_steps=8, eval_every=every)
  config = dataclasses.replace(base, train=train)
  with pytest.raises(ValueError, match=message):
    checks.check_pruning(small_sweep.sweep(pruning=pruning), config)


def test_points_that_differ_in_numbers_are_checked_once(base, monkeypatch):
  calls = []
  check = points.layout_advice.check
  monkeypatch.setattr(
    points.layout_advice,
    'check',
    lambda *args, **kwargs: calls.append(1) or check(*args, **kwargs),
  )
  sweep = small_sweep.sweep(
    parameters={
      'optim.learning_rate': small_sweep.RATES,
      'optim.schedule.warmup_steps': (0, 2),
      'train.seed': (0, 1),
      'model.num_layers': (1, 2),
    }
  )
  assert points.check(base, sweep, _DEVICES).wrong == ()
  assert len(calls) == 2


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'parameters': {}}, 'has no parameters'),
    ({'parameters': {'a': 3}}, r"parameters\['a'\]: 3 is neither"),
    ({'parameters': {'a, b': (1,), 'a': (2,)}}, "'a' stands there twice"),
    ({'seeds': (1, 1)}, 'one stands there twice'),
    ({'direction': 'down'}, "'down' does not fit the type one of 'minimize'"),
    ({'pruning': 'median'}, "'median' does not fit the type"),
    ({'pruning': search.Median}, r'needed: pruning=search.Median\(...\)'),
    ({'metric': None}, "'metric': None does not fit the type str"),
    ({'metric': ''}, 'name one, such as'),
    ({'seeds': '01'}, "'seeds': '01' does not fit the type"),
    ({'seeds': (-1,)}, 'each is from 0 to'),
    ({'max_retries': 0.5}, "'max_retries': 0.5 does not fit the type int"),
    ({'parameters': None}, 'it is a dict from field names'),
    ({'parameters': {'a': ({'b': 1},)}}, r"parameters\['a'\]: .* is a dict"),
    ({'max_retries': -1}, 'max_retries=-1; it is 0 or more'),
    (
      {'parameters': {'train.seed': (1, 2)}, 'seeds': (1,)},
      "parameters has 'train.seed', and seeds is given too",
    ),
  ],
)
def test_sweeps_that_cannot_be(fields, message):
  with pytest.raises(ValueError, match=message):
    small_sweep.sweep(**fields)


_FILE = """
from t2x.sweeps import definition, search, space

def get_sweep():
  return definition.Sweep(
    parameters={'optim.learning_rate': space.LogUniform(1e-4, 1e-2)},
    search=search.RandomSearch(num_trials=5),
  )
"""


def test_a_sweep_is_a_file(tmp_path):
  file = tmp_path / 'rates.py'
  file.write_text(_FILE)
  sweep = definition.load(str(file), ['search.num_trials=7'])
  assert sweep.search == search.RandomSearch(num_trials=7)
  assert definition.from_json(sweep.to_json()) == sweep
  with pytest.raises(ValueError, match="Did you mean 'num_trials'"):
    definition.load(str(file), ['search.num_trial=7'])
  with pytest.raises(ValueError, match='there is no such file'):
    definition.load(str(tmp_path / 'none.py'))
  file.write_text('x = 1')
  with pytest.raises(ValueError, match=r'no function get_sweep\(\)'):
    definition.load(str(file))
  file.write_text('get_sweep = lambda: 3')
  with pytest.raises(ValueError, match='returns int, and it must return'):
    definition.load(str(file))


def test_a_metric_of_no_evaluated_set(base):
  wrong = small_sweep.sweep(metric='eval/validation/loss')
  with pytest.raises(ValueError, match="Did you mean 'eval/train/loss'"):
    checks.check_metric(wrong, base)
  checks.check_metric(small_sweep.sweep(), base)

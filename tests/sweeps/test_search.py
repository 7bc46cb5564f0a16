import optuna
import pytest

from t2x.sweeps import definition
from t2x.sweeps import search
from t2x.sweeps import space

_LISTS = {'a': space.of((1, 2)), 'b': space.of(('x', 'y', 'z'))}
_RANGES = {'rate': space.LogUniform(1e-4, 1.0), 'share': space.Uniform(0, 1)}


def test_a_grid_has_every_combination_in_order():
  points = list(search.Grid().points(_LISTS))
  assert [tuple(p.values()) for p in points] == [
    (1, 'x'),
    (1, 'y'),
    (1, 'z'),
    (2, 'x'),
    (2, 'y'),
    (2, 'z'),
  ]
  assert search.Grid().num_points(_LISTS) == 6


def test_zipped():
  lists = {'a': space.of((1, 2)), 'b': space.of(('x', 'y'))}
  points = list(search.Zipped().points(lists))
  assert points == [{'a': 1, 'b': 'x'}, {'a': 2, 'b': 'y'}]
  with pytest.raises(ValueError, match='a has 2, b has 3'):
    search.Zipped().num_points(_LISTS)


@pytest.mark.parametrize('kind', [search.RandomSearch, search.LatinHypercube])
def test_drawn_points_go_by_the_seed(kind):
  draw = lambda seed: list(kind(num_trials=8, seed=seed).points(_RANGES))
  assert draw(1) == draw(1)
  assert draw(1) != draw(2)
  assert len(draw(1)) == 8
  assert all(1e-4 <= p['rate'] <= 1 and 0 <= p['share'] <= 1 for p in draw(3))


def test_a_latin_hypercube_takes_each_slice_once():
  points = search.LatinHypercube(num_trials=10).points(_RANGES)
  slices = sorted(int(p['share'] * 10) for p in points)
  assert slices == list(range(10))


def test_a_range_has_no_grid():
  with pytest.raises(ValueError, match="'rate' is LogUniform.* a grid need"):
    definition.Sweep(parameters=_RANGES)


def test_points_go_to_optuna_and_back():
  parameters = {
    'a, b': space.of(((64, 2), (128, 4))),
    'n': space.Integers(2, 9, 3),
    **_RANGES,
  }
  distributions = search.to_optuna(parameters)
  study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
  for _ in range(20):
    asked = study.ask(distributions)
    point = search.from_optuna(parameters, asked.params)
    assert point['a, b'] in ((64, 2), (128, 4))
    assert point['n'] in (2, 5, 8)
    assert set(point) == set(parameters)


def test_a_suggestion_goes_by_its_number():
  def ask(number):
    sampler = search.Tpe(seed=3).sampler(number)
    study = optuna.create_study(sampler=sampler)
    return study.ask(search.to_optuna(_RANGES)).params

  assert ask(4) == ask(4)
  assert ask(4) != ask(5)

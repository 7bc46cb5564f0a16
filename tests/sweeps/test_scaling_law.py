"""Fits find laws again, and their intervals hold them."""

import dataclasses
import math

import numpy as np
import pytest

from t2x.sweeps import scaling_law

# Hoffmann et al., 2022, equation 10, and another of small models.
_CHINCHILLA = scaling_law.Law(
  floor=1.69, a_scale=406.4, a=0.34, b_scale=410.7, b=0.28
)
_SMALL = scaling_law.Law(floor=2.1, a_scale=90.0, a=0.45, b_scale=600.0, b=0.5)


def _points(law, noise=0.0, sizes=(1e6, 4e6, 1.6e7, 6.4e7), ratios=(5, 20, 80)):
  generator = np.random.default_rng(0)
  return [
    scaling_law.Point(
      parameters=n,
      tokens=n * ratio,
      loss=law.loss(n, n * ratio) * math.exp(noise * generator.normal()),
    )
    for n in sizes
    for ratio in ratios
  ]


@pytest.mark.parametrize('law', [_CHINCHILLA, _SMALL], ids=['large', 'small'])
def test_a_law_is_found_again(law):
  sizes = (1e6, 1e7, 1e8, 1e9)
  found = scaling_law.fit(_points(law, sizes=sizes), num_samples=5)
  for field in dataclasses.fields(law):
    assert getattr(found.law, field.name) == pytest.approx(
      getattr(law, field.name), rel=0.02
    )
  assert found.error < 1e-4
  # Far beyond the runs.
  at = (1e10, 2e11)
  assert found.law.loss(*at) == pytest.approx(law.loss(*at), rel=1e-3)


def test_noise_is_in_the_intervals():
  points = _points(_CHINCHILLA, noise=0.003)
  found = scaling_law.fit(points, num_samples=40)
  low, high = found.interval('a')
  assert low < 0.34 < high and high - low > 0.01
  at = (2.6e8, 5.2e9)
  predicted, low, high = found.prediction(*at)
  true = _CHINCHILLA.loss(*at)
  assert abs(predicted / true - 1) < 0.01
  assert low < high


def test_the_best_size_of_a_budget():
  parameters, tokens = _CHINCHILLA.best(5.76e23)
  assert 6 * parameters * tokens == pytest.approx(5.76e23)
  best = _CHINCHILLA.loss(parameters, tokens)
  for factor in (0.8, 1.25):
    assert best < _CHINCHILLA.loss(parameters * factor, tokens / factor)
  assert _CHINCHILLA.size_exponent == pytest.approx(0.28 / 0.62)


def test_the_valley_of_a_budget():
  budget = 1e18
  best, _ = _CHINCHILLA.best(budget)
  points = [
    scaling_law.Point(
      parameters=n,
      tokens=budget / 6 / n,
      loss=_CHINCHILLA.loss(n, budget / 6 / n),
    )
    for n in (best / 4, best / 2, best, best * 2, best * 4)
  ]
  found = scaling_law.valley(points)
  assert found is not None and found.is_inside
  assert found.parameters == pytest.approx(best, rel=0.15)
  assert scaling_law.valley(points[:2]) is None


def test_one_outlier_moves_little():
  points = _points(_CHINCHILLA)
  points[5] = dataclasses.replace(points[5], loss=points[5].loss * 1.2)
  found = scaling_law.fit(points, num_samples=2)
  assert found.law.loss(1e9, 2e10) == pytest.approx(
    _CHINCHILLA.loss(1e9, 2e10), rel=0.01
  )


def test_messages():
  points = _points(_CHINCHILLA)
  with pytest.raises(ValueError, match='5 runs are too few'):
    scaling_law.fit(points[:5])
  same = [dataclasses.replace(p, parameters=1e6) for p in points]
  with pytest.raises(ValueError, match='All runs have one size'):
    scaling_law.fit(same)

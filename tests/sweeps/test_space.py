import json

import numpy as np
import pytest

from t2x.sweeps import space


def test_shares_become_values():
  assert space.OneOf((1, 2, 3)).at(0.0) == 1
  assert space.OneOf((1, 2, 3)).at(0.999) == 3
  assert space.Uniform(2.0, 4.0).at(0.25) == 2.5
  assert space.LogUniform(1e-4, 1.0).at(0.5) == pytest.approx(1e-2)
  whole = space.Integers(2, 9, step=3)
  assert [whole.at(i / 12) for i in range(12)] == [2] * 4 + [5] * 4 + [8] * 4
  assert whole.ends == (2, 8)


def test_spaced_values():
  assert space.log_spaced(1e-3, 1e-1, 3) == (1e-3, 1e-2, 1e-1)


@pytest.mark.parametrize(
  'value, text',
  [
    (1e-05, '1e-05'),
    (0.1, '0.1'),
    (3, '3'),
    (True, 'true'),
    (None, 'none'),
    ('cosine', 'cosine'),
    ((1, 'a'), '(1,a)'),
    ((), '()'),
  ],
)
def test_values_are_written_as_settings(value, text):
  assert space.settings_of({'a.b': value}) == {'a.b': text}


def test_a_name_of_several_fields():
  point = {'a.b, a.c': (64, 2), 'd': 0.5}
  assert space.settings_of(point) == {'a.b': '64', 'a.c': '2', 'd': '0.5'}
  with pytest.raises(ValueError, match='3 fields, and .1, 2. is not one value'):
    space.settings_of({'a, b, c': (1, 2)})


@pytest.mark.parametrize(
  'parameter',
  [
    space.OneOf((1, None, 'a', (2, 3))),
    space.Uniform(0.0, 1.0),
    space.LogUniform(1e-3, 1.0),
    space.Integers(1, 9, 2),
  ],
)
def test_parameters_go_through_json(parameter):
  data = json.loads(json.dumps(space.to_json(parameter)))
  assert space.from_json(data) == parameter


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda: space.OneOf(()), 'list of values is empty'),
    (lambda: space.OneOf((1, 2, 1)), '1 stands 2 times'),
    (lambda: space.Uniform(2.0, 1.0), 'low is below high'),
    (lambda: space.Uniform(0.0, float('inf')), 'both are finite'),
    (lambda: space.LogUniform(0.0, 1.0), 'needs it above 0'),
    (lambda: space.Integers(1, 5, 0), 'step=0; it is 1 or more'),
    (lambda: space.Integers(1, 5.5), 'whole numbers'),
    (lambda: space.Integers(1, 3, 10), 'has one number alone'),
    (lambda: space.Uniform('0', '1'), 'they are numbers'),
    (lambda: space.of(3), '3 is neither a list of values nor'),
    (lambda: space.text({'a': 1}), 'is a dict; a value is a number'),
    (lambda: space.log_spaced(1, 2, 1), 'num=1; it is 2 or more'),
  ],
)
def test_messages(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_numbers_of_numpy_are_plain_ones():
  for given in (np.logspace(-3, -1, 3), list(np.logspace(-3, -1, 3))):
    values = space.of(given).values
    assert values == pytest.approx((1e-3, 1e-2, 1e-1))
    assert {type(value) for value in values} == {float}
  assert space.of([(np.int64(2), 'a')]).values == ((2, 'a'),)

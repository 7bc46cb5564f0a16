"""Activations are flat over widths with muP, and grow without it."""

import dataclasses
import math

import pytest
import tiny

from t2x.config import overrides
from t2x.layers import mup
from t2x.sweeps import coordinates
from t2x.sweeps import coordinates_picture

_WIDTHS = (32, 256)


def _experiment(directory, kind, **changes):
  config = tiny.experiment_of(directory, mesh__data=1, mesh__fsdp=1)
  names = {'encoder': 'masked_lm', 'encoder_decoder': 'span_corruption'}
  settings = {'model.dropout': '0'}
  if kind != 'decoder':
    settings |= {'model': kind, 'data.objective': names[kind]}
  config = overrides.override(config, settings)
  model = dataclasses.replace(config.model, **changes)
  return dataclasses.replace(config, model=model)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['decoder', 'encoder', 'encoder_decoder'])
def test_flat_with_mup(kind, tmp_path):
  config = _experiment(tmp_path, kind, mup=mup.Mup(base_width=32))
  found = coordinates.measure(config, _WIDTHS, 5)
  slopes = coordinates.slopes(found)
  assert not [s for s in slopes if s.grows or s.vanishes], slopes
  assert len(slopes) >= 5
  picture = tmp_path / 'picture.png'
  coordinates_picture.write(found, str(picture))
  assert picture.stat().st_size > 10_000


@pytest.mark.slow
def test_growing_without(tmp_path):
  config = _experiment(tmp_path, 'decoder')
  found = coordinates.measure(config, _WIDTHS, 3, num_seeds=1)
  growing = {s.place for s in coordinates.slopes(found) if s.grows}
  assert growing >= {'tower layer 0', 'tower layer 1', 'logits'}
  rows = coordinates_picture.rows(found, coordinates.slopes(found))
  assert any('GROWS' in row for row in rows)


def test_slopes_of_powers():
  found = [
    coordinates.Size(
      width=w, step=1, place=place, size=w**power, change=w**-power
    )
    for w in (64, 128, 256)
    for place, power in (('flat', 0.0), ('half', 0.5))
  ]
  flat, half = coordinates.slopes(found)
  assert math.isclose(flat.size, 0.0, abs_tol=1e-9)
  assert half.size == pytest.approx(0.5) and half.change == pytest.approx(-0.5)
  assert half.grows and half.vanishes and not flat.grows

"""Which layers a part has, and how a device comes by their weights."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from t2x.parallel import mesh as mesh_lib
from t2x.pipeline import placement
from t2x.pipeline import schedules
from t2x.pipeline import weights

_TOWER = placement.TowerLayers('tower', 8)


@pytest.mark.parametrize(
  'towers, parts, expected',
  [
    ([_TOWER], 4, [2, 2, 2, 2]),
    ([_TOWER], 3, [3, 3, 2]),
    ([placement.TowerLayers('tower', 7, 2)], 2, [2, 2]),
    (
      [placement.TowerLayers('a', 4), placement.TowerLayers('b', 4)],
      4,
      [2, 2, 2, 2],
    ),
    (
      [placement.TowerLayers('a', 2), placement.TowerLayers('b', 6)],
      4,
      [2, 2, 2, 2],
    ),
  ],
)
def test_even_shares(towers, parts, expected):
  assert placement.even(towers, parts) == expected


def test_slots_and_evenness():
  table = schedules.interleaved(2, 4, 2)
  place = placement.place([_TOWER], [2, 2, 2, 2], table)
  assert place.unit_SN[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
  assert place.slot_P.tolist() == [0, 0, 2, 2]
  assert not place.is_contiguous
  table = schedules.one_f_one_b(2, 4)
  assert placement.place([_TOWER], [4, 4], table).is_contiguous
  place = placement.place([_TOWER], [5, 3], table)
  assert place.unit_SN[0].tolist() == [
    [0, 1, 2, 3, 4],
    [5, 6, 7, -1, -1],
  ]
  assert not place.is_contiguous


def test_a_tower_on_every_stage_is_contiguous():
  towers = [
    placement.TowerLayers('encoder', 4),
    placement.TowerLayers('decoder', 8),
  ]
  table = schedules.interleaved(2, 4, 2)
  place = placement.place(towers, [2, 2, 4, 4], table)
  assert place.is_contiguous
  assert place.enters_P.tolist() == [True, False, True, False]


@pytest.mark.parametrize(
  'units, message',
  [
    ((4, 4, 4), 'take 2 numbers, each 1 or more'),
    ((8, 0), 'take 2 numbers, each 1 or more'),
    (
      (5, 4),
      'adds up to 9. The parts must make up 8 layers of the tower.',
    ),
  ],
)
def test_layers_that_do_not_fit(units, message):
  with pytest.raises(ValueError, match=message):
    placement.place([_TOWER], units, schedules.one_f_one_b(2, 4))


def test_a_part_lies_within_a_tower():
  towers = [
    placement.TowerLayers('encoder', 2),
    placement.TowerLayers('decoder', 4),
  ]
  message = (
    'adds up to 6. The parts must make up 2 layers of the encoder, the next '
    'ones 4 layers of the decoder; none has layers of two towers.'
  )
  with pytest.raises(ValueError, match=message):
    placement.place(towers, [3, 3], schedules.one_f_one_b(2, 4))


def test_fewer_layers_than_parts():
  with pytest.raises(ValueError, match='16 parts of a pipeline for 8') as error:
    placement.even([_TOWER], 16)
  assert 'at most 8 parts' in str(error.value)


@pytest.mark.parametrize('dim', [0, 1, 2, None])
@pytest.mark.parametrize('units', [(2, 2, 2, 2), (3, 1, 2, 2)])
def test_weights_travel_there_and_their_gradients_back(dim, units):
  """Fetched units are the right ones, and sums come back to their units."""
  table = schedules.one_f_one_b(4, 4)
  place = placement.place([_TOWER], units, table)
  if dim == 0 and not place.is_contiguous:
    pytest.skip('nothing moves only where stages are even')
  unit_SN = place.unit_SN[0]
  route = weights.Route(dim, ('embed', 'mlp'), unit_SN, 8)
  x_U = jnp.arange(8 * 4 * 12.0).reshape(8, 4, 12)
  mesh = mesh_lib.make(mesh_lib.MeshConfig(pipe=4), jax.devices()[:4])

  def there_and_back(x):
    slots = route.fetch(x)
    return slots[None], route.give_back(slots)

  fn = jax.shard_map(
    there_and_back,
    mesh=mesh,
    in_specs=route.spec,
    out_specs=(P('pipe'), route.spec),
    check_vma=False,
  )
  slots_SN, back_U = jax.jit(fn)(x_U)
  held = unit_SN >= 0
  np.testing.assert_array_equal(slots_SN[held], x_U[unit_SN[held]])
  np.testing.assert_array_equal(back_U, x_U)

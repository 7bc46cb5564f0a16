"""A script for two processes of four devices: rows split in every way."""

import sys

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from t2x.config import abstract_state
from t2x.multihost import initialization
from t2x.multihost import processes

_BATCH = np.arange(8 * 16, dtype=np.int32).reshape(8, 16)


def check(devices, shape: tuple[int, int], expected_rows: list[int]) -> None:
  """Puts this process's rows of a batch, and reads what its devices hold."""
  mesh = jax.sharding.Mesh(np.reshape(devices, shape), ('data', 'context'))
  split = NamedSharding(mesh, P('data', 'context'))
  rows = abstract_state.local_rows(split, len(_BATCH))
  assert rows.tolist() == expected_rows, (rows, expected_rows)
  x = processes.put({'x': _BATCH[rows]}, split, rows, len(_BATCH))['x']
  assert x.shape == _BATCH.shape
  for shard in x.addressable_shards:
    np.testing.assert_array_equal(shard.data, _BATCH[shard.index])
  total = jax.jit(
    lambda x: (x * x).sum(), out_shardings=NamedSharding(mesh, P())
  )(x)
  assert int(total) == int((_BATCH * _BATCH).sum())


def main() -> None:
  arguments = dict(a[2:].split('=') for a in sys.argv[1:])
  index = int(arguments['process_id'])
  with initialization.joined_processes(
    coordinator=arguments['coordinator'],
    num_processes=int(arguments['num_processes']),
    process_id=index,
  ):
    devices = jax.devices()
    assert [d.process_index for d in devices] == [0] * 4 + [1] * 4
    own = list(range(4 * index, 4 * index + 4))
    check(devices, (2, 4), own)
    check(devices, (8, 1), own)
    check(devices, (1, 8), list(range(8)))  # A row lies in both.
    # Process 0 has the first and the last row, and none between.
    turned = [*devices[:2], *devices[4:], *devices[2:4]]
    check(turned, (8, 1), [0, 1, 6, 7] if index == 0 else [2, 3, 4, 5])
    check(turned, (4, 2), [0, 1, 6, 7] if index == 0 else [2, 3, 4, 5])
    if index == 0:
      print('all parts are right')


if __name__ == '__main__':
  main()

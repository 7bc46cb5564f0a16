"""Agreement between the processes of a run; with one process, nothing to do.

Each process decides by what it alone sees (a signal, a file that it cannot
read), and all must take the same turn, or they wait for each other forever.
"""

from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np


def is_primary() -> bool:
  """Whether this is the process that writes what is written once."""
  return jax.process_index() == 0


def put(
  tree: Any, sharding: NamedSharding, rows: np.ndarray, num_rows: int
) -> Any:
  """Makes global arrays of the rows that this process holds.

  A device may take any part of a row: the other dimensions can be split over
  processes too, each of which has its rows whole.

  Args:
    tree: arrays of `rows`, whole in all other dimensions.
    sharding: of the global arrays.
    rows: of the global arrays, those in `tree`, ascending.
    num_rows: of the global arrays.
  """

  def place(array):
    def part(index):
      wanted = np.arange(*index[0].indices(num_rows))
      return array[np.searchsorted(rows, wanted)][(slice(None), *index[1:])]

    shape = (num_rows, *array.shape[1:])
    return jax.make_array_from_callback(shape, sharding, part)

  # An explicit transfer, though JAX guards it as an implicit one where there
  # are several processes.
  with jax.transfer_guard_host_to_device('allow'):
    return jax.tree.map(place, tree)


def per_device(value: np.generic, split: NamedSharding) -> jax.Array:
  """Returns an array of one entry a device; those of this process are `value`.

  Args:
    value: a scalar of this process.
    split: over all axes of the mesh.
  """
  own = np.full(1, value)
  with jax.transfer_guard_host_to_device('allow'):
    return jax.make_array_from_callback(
      (split.mesh.size,), split, lambda _: own
    )


def all_agree(ok: bool, what: str) -> bool:
  """Returns whether `ok` holds in every process; waits for all of them.

  Args:
    ok: of this process.
    what: names the place, the same in every process.
  """
  if jax.process_count() == 1:
    return ok
  with jax.transfer_guard('allow'):
    multihost_utils.sync_global_devices(what)
    return bool(multihost_utils.process_allgather(np.asarray(ok)).all())


def largest(values: np.ndarray) -> np.ndarray:
  """Returns the largest of all processes, entry by entry; NaN is larger still.

  Args:
    values: float32, of one shape in every process.
  """
  if jax.process_count() == 1:
    return values
  with jax.transfer_guard('allow'):
    return np.asarray(multihost_utils.process_allgather(values)).max(0)


class AnyProcess:
  """Whether any process has raised its hand, without waiting for the others.

  Called once a step by every process. The answer of several processes is that
  of the call before, so that it is on its way while the devices work, and the
  same everywhere; a process alone gets its own at once.
  """

  def __init__(self, mesh: Mesh):
    self._alone = jax.process_count() == 1
    self._split = NamedSharding(mesh, P(mesh.axis_names))
    self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
    self._last: jax.Array | None = None

  def __call__(self, raised: bool) -> bool:
    if self._alone:
      return raised
    votes = per_device(np.int32(raised), self._split)
    last, self._last = self._last, self._largest(votes)
    return last is not None and bool(jax.device_get(last))

"""Agreement between the processes of a run; trivial for one process.

A process decides by events that it alone sees (a signal, a file that it cannot
read), but all must do the same next, or they wait for each other for ever.
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
  """Whether this is the one process that writes the files of the run."""
  return jax.process_index() == 0


def put(
  tree: Any, sharding: NamedSharding, rows: np.ndarray, num_rows: int
) -> Any:
  """Returns global arrays of the rows that each process has.

  A device can have any part of a row: the other dimensions can be split over
  processes too, each of which has its rows whole.

  Args:
    tree: arrays of this process's rows, whole in all other dimensions.
    sharding: sharding of the global arrays.
    rows: indices of this process's rows in the global arrays, ascending.
    num_rows: number of rows of the global arrays.

  Returns:
    A tree of the same structure with global arrays.
  """

  def place(array: np.ndarray) -> jax.Array:
    def part(index: tuple[slice, ...] | None) -> np.ndarray:
      assert index is not None
      of_device = np.arange(*index[0].indices(num_rows))
      return array[np.searchsorted(rows, of_device)][(slice(None), *index[1:])]

    shape = (num_rows, *array.shape[1:])
    return jax.make_array_from_callback(shape, sharding, part)

  # The transfer is explicit, but with several processes JAX guards it as an
  # implicit one.
  with jax.transfer_guard_host_to_device('allow'):
    return jax.tree.map(place, tree)


def per_device(value: np.generic, split: NamedSharding) -> jax.Array:
  """Returns an array with one entry for each device, the value of its process.

  Args:
    value: scalar of this process.
    split: sharding of the array, over all axes of the mesh.
  """
  entry = np.full(1, value)
  with jax.transfer_guard_host_to_device('allow'):
    return jax.make_array_from_callback(
      (split.mesh.size,), split, lambda _: entry
    )


def all_agree(ok: bool, what: str) -> bool:
  """Whether `ok` is True in every process; waits for all of them.

  Args:
    ok: value of this process.
    what: name of the question, the same in every process.
  """
  if jax.process_count() == 1:
    return ok
  with jax.transfer_guard('allow'):
    multihost_utils.sync_global_devices(what)
    return bool(multihost_utils.process_allgather(np.asarray(ok)).all())


def largest(values: np.ndarray) -> np.ndarray:
  """Returns the maximum over all processes, entry by entry; NaN if any is NaN.

  Args:
    values: values of this process, float32, of the same shape in every process.
  """
  if jax.process_count() == 1:
    return values
  with jax.transfer_guard('allow'):
    return np.asarray(multihost_utils.process_allgather(values)).max(0)


class AnyProcess:
  """Tells whether a flag is set in any process, without waiting for them.

  Every process calls it once a step. With several processes the answer is that
  of the previous call, the same in all of them, so that it can be computed
  while the devices work. A single process gets its own flag at once.

  Args:
    mesh: the mesh of the run.
  """

  def __init__(self, mesh: Mesh):
    self._alone = jax.process_count() == 1
    self._split = NamedSharding(mesh, P(mesh.axis_names))
    self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
    self._last: jax.Array | None = None

  def __call__(self, raised: bool) -> bool:
    """Returns whether the flag was set in any process.

    Args:
      raised: the flag of this process.
    """
    if self._alone:
      return raised
    votes = per_device(np.int32(raised), self._split)
    last, self._last = self._last, self._largest(votes)
    return last is not None and bool(jax.device_get(last))

"""The train state of an experiment as shapes and shardings.

Nothing is allocated or compiled.
"""

import functools

from flax import nnx
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

from t2x.config import experiment
from t2x.config import partitioning
from t2x.models import model as model_lib
from t2x.parallel import sharding
from t2x.training import train_state


def shapes_of(
  config: experiment.Experiment, mesh: sharding.AnyMesh
) -> tuple[train_state.TrainState, NamedSharding]:
  """Returns the state as sharded shapes, and the sharding of a batch.

  Nothing is allocated or compiled.

  Raises:
    ShardingError: a layout that cannot be.
  """
  shapes = state_shapes(config)
  shardings, batch_sharding = shardings_of(config, shapes, mesh)
  shapes = jax.tree.map(
    lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d),
    shapes,
    shardings,
  )
  return shapes, batch_sharding


@functools.lru_cache(maxsize=16)
def state_shapes(config: experiment.Experiment) -> train_state.TrainState:
  """Returns the shapes of the state, which no layout changes."""
  tx = experiment.optimizer(config, 1)
  key = jax.eval_shape(jax.random.key, 0)
  return jax.eval_shape(functools.partial(init_state, config, tx), key)


def shardings_of(
  config: experiment.Experiment,
  shapes: train_state.TrainState,
  mesh: sharding.AnyMesh,
) -> tuple[train_state.TrainState, NamedSharding]:
  """Returns the shardings of the state and of a batch.

  Args:
    config: the experiment.
    shapes: the shapes that `state_shapes` returned.
    mesh: the mesh, of devices or of sizes alone.

  Raises:
    ShardingError: a layout that cannot be.
  """
  rules = partitioning.of(config, mesh.shape).rules
  shardings = train_state.state_shardings(
    shapes, mesh, rules, config.step_config
  )
  rows = (config.data.batch_size, config.data.length)
  spec = sharding.to_spec(
    ('batch', 'length'), config.rules, shape=rows, mesh=mesh, name='batch'
  )
  return shardings, NamedSharding(mesh, spec)


def local_rows(batch_sharding: NamedSharding, num_rows: int) -> np.ndarray:
  """Returns the rows of a global batch that this process holds, ascending.

  They have gaps where the chips of a host are a square of the torus, and the
  batch is dealt to chips along its lines.
  """
  shape = (num_rows, 1)
  by_row = NamedSharding(batch_sharding.mesh, P(*batch_sharding.spec[:1]))
  indices = by_row.addressable_devices_indices_map(shape).values()
  slices = [index[0] for index in indices if index is not None]
  return np.unique([i for s in slices for i in range(*s.indices(num_rows))])


def init_state(
  config: experiment.Experiment,
  tx: optax.GradientTransformation,
  key: jax.Array,
) -> train_state.TrainState:
  """Returns the state before the first step, its weights drawn by a key."""
  model = model_lib.make(config.model, rngs=nnx.Rngs(key))
  return train_state.init_state(model, tx, config.step_config)

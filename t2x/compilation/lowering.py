"""The train step of an experiment as a jaxpr: nothing compiled or allocated.

jaxpr.count(traced.step(config)).total.flops

It is that of one device. A mesh changes where products run and not how many
there are, but for what the layout computes more than once: those of a pipeline
in its bubbles, of ring attention in pairs that a mask hides.
"""

import functools

import jax
from jax.extend import core

from t2x.compilation import program
from t2x.config import abstract_state
from t2x.config import experiment
from t2x.data import input_pipeline
from t2x.parallel import sharding
from t2x.training import train_step


def step(config: experiment.Experiment) -> core.ClosedJaxpr:
  """Returns one update on a whole batch (of the largest bucket), traced.

  Args:
    config: the experiment; its mesh, rules and pipeline count for nothing.
  """
  batch = {
    name: jax.ShapeDtypeStruct(shape, dtype)
    for name, (shape, dtype) in input_pipeline.batch_spec(config.data).items()
  }
  fn = functools.partial(
    train_step.train_step,
    tx=experiment.optimizer(config, 1),
    config=config.step_config,
  )
  key = jax.eval_shape(jax.random.key, 0)
  return jax.make_jaxpr(fn)(abstract_state.state_shapes(config), batch, key)


def lower_step(
  config: experiment.Experiment, mesh: jax.sharding.Mesh
) -> jax.stages.Lowered:
  """Returns the train step of a run lowered, for full batches.

  Args:
    config: the experiment of the run.
    mesh: the mesh, of devices that may be absent.
  """
  made = program.Program(config, mesh, num_steps=1)
  with sharding.use(mesh, config.rules):
    return made.lower_step(made.batch_shapes())

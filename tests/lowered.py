"""A train step of a decoder, lowered for a mesh without any array."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from t2x.hardware import machines
from t2x.models import decoder
from t2x.parallel import sharding
from t2x.training import optim
from t2x.training import train_state
from t2x.training import train_step

RULES = sharding.Rules()
TX = optim.make(optim.Sgd(clip_norm=None), 10)


def shapes(mesh, model, config, *, rules=RULES, rows=32, length=16):
  """Returns the arguments of a step, as sharded shapes.

  Args:
    mesh: to run on.
    model: the decoder's config.
    config: of the step.
    rules: logical axis -> mesh axes.
    rows: of a batch.
    length: tokens to a row.
  """

  def init(key):
    return train_state.init_state(
      decoder.Decoder(model, rngs=nnx.Rngs(key)), TX, config
    )

  place = lambda x, where: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=where
  )
  key = jax.eval_shape(jax.random.key, 0)
  state = jax.eval_shape(init, key)
  state = jax.tree.map(
    place, state, train_state.state_shardings(state, mesh, rules, config)
  )
  spec = sharding.to_spec(('batch', 'length'), rules, mesh=mesh)
  row = lambda dtype: jax.ShapeDtypeStruct(
    (rows, length), dtype, sharding=NamedSharding(mesh, spec)
  )
  batch = {name: row(jnp.int32) for name in ('inputs', 'targets')}
  batch['weights'] = row(jnp.float32)
  return state, batch, place(key, NamedSharding(mesh, P()))


def lower(
  mesh,
  model,
  config,
  *,
  rules=RULES,
  step=train_step.train_step,
  overrides=(),
  **sizes,
) -> jax.stages.Lowered:
  """Returns a step lowered, with the options that a run has on such devices.

  Args:
    mesh: to run on.
    model: the decoder's config.
    config: of the step.
    rules: logical axis -> mesh axes.
    step: the function.
    overrides: of the compiler's options, as in `compiler_options`.
    **sizes: the rows and length of `shapes`.
  """
  args = shapes(mesh, model, config, rules=rules, **sizes)
  shardings = jax.tree.map(lambda x: x.sharding, args[0])
  fn = jax.jit(
    functools.partial(step, tx=TX, config=config),
    out_shardings=(shardings, NamedSharding(mesh, P())),
    donate_argnums=0,
    compiler_options=machines.options_of(list(mesh.devices.flat), overrides)
    or None,
  )
  with sharding.use(mesh, rules):
    return fn.lower(*args)

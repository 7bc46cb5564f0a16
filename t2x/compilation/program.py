"""The compiled functions of an experiment on a mesh.

program = Program(config, mesh, num_steps=100)
with sharding.use(mesh, config.rules):
  state = program.init_state()
  state, metrics = program.step(state, program.place(batch))
"""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from t2x.config import abstract_state
from t2x.config import experiment
from t2x.config import partitioning
from t2x.data import input_pipeline as data_pipeline
from t2x.hardware import machines
from t2x.hlo import divergence
from t2x.models import segment_memory
from t2x.multihost import processes
from t2x.objectives import batch_keys
from t2x.parallel import sharding
from t2x.parallel import zigzag
from t2x.training import optim
from t2x.training import train_state
from t2x.training import train_step

# What `Program.lowered` returns and `Program.replace` takes.
NAMES = ('init', 'step', 'evaluate')


class Checked:
  """A jitted function that compiles, is checked, and only then runs.

  Args:
    fn: a function that `jax.jit` returned. Its programs are made under the mesh
      and the rules that are active at the first call with given arguments'
      shapes.
    check: a function that raises for the text of a program that must not run.
  """

  def __init__(self, fn: jax.stages.Wrapped, check: Callable[[str], None]):
    self._fn = fn
    self._check = check
    self._compiled: dict[Any, jax.stages.Compiled] = {}

  def __call__(self, *args: Any) -> Any:
    leaves, treedef = jax.tree.flatten(args)
    key = treedef, tuple((x.shape, x.dtype, x.sharding) for x in leaves)
    if key not in self._compiled:
      compiled = self.lower(*args).compile()
      text = compiled.as_text()
      assert text is not None
      self._check(text)
      self._compiled[key] = compiled
    return self._compiled[key](*args)

  def lower(self, *args: Any) -> jax.stages.Lowered:
    """Returns the function lowered for arrays or sharded shapes."""
    return self._fn.lower(*args)


class Program:
  """Initialisation, step and evaluation, each compiled at its first call.

  Attributes:
    partitioning: the experiment on the mesh: its stages, multiples of rows,
      order of tokens.
    shapes: the train state as sharded shapes.
    trained: the shapes of the trained parameters, which gradients share.
    batch_sharding: the sharding of every array of a batch.
    rows: numbers of the rows of a global batch that this process holds.
    check: raises for the text of a compiled program that must not run; None
      where none needs it.
  """

  def __init__(
    self,
    config: experiment.Experiment,
    mesh: jax.sharding.Mesh,
    *,
    num_steps: int,
  ):
    self.config = config
    self.shapes, self.batch_sharding = abstract_state.shapes_of(config, mesh)
    self.trained, _ = train_state.partition(
      self.shapes.model, config.train.trainable
    )
    self.rows = abstract_state.local_rows(
      self.batch_sharding, config.data.batch_size
    )
    self.partitioning = partitioning.of(config, mesh.shape)
    self._num_steps = num_steps
    self._whole = whole = NamedSharding(mesh, P())
    self._define(jit_for(config, mesh), self.partitioning.step_config, whole)

  def _define(
    self,
    jit: Callable[..., Any],
    step_config: train_state.StepConfig,
    whole: NamedSharding,
  ) -> None:
    of_state, of_grads = jax.tree.map(
      lambda s: s.sharding, (self.shapes, self.trained)
    )
    tx = experiment.optimizer(self.config, self._num_steps)
    self._init = jit(
      functools.partial(abstract_state.init_state, self.config, tx),
      out_shardings=of_state,
    )
    checked = self._checked(step_config)
    self._step = checked(
      jit(
        _with_numbers(train_step.train_step, self.config, step_config),
        out_shardings=(of_state, whole),
        donate_argnums=0,
      )
    )
    self._gradients = checked(
      jit(
        functools.partial(train_step.gradients_at, config=step_config),
        out_shardings=(of_grads, whole),
      )
    )
    self._apply = jit(
      _with_numbers(train_step.apply_gradients, self.config, step_config),
      out_shardings=(of_state, whole),
    )
    self._eval = checked(
      jit(functools.partial(train_step.eval_step, config=step_config))
    )
    self._runs: dict[str, Any] = dict(
      zip(NAMES, (self._init, self._step, self._eval), strict=True)
    )

  def _checked(
    self, step_config: train_state.StepConfig
  ) -> Callable[[Any], Any]:
    """Returns a wrapper that checks a compiled program before it first runs.

    The stages of a pipeline run different code, and an exchange among all
    devices within it would wait for ever.
    """
    self.check = None
    if step_config.pipeline is None or self.config.pipeline.uniform:
      return lambda fn: fn
    self.check = divergence.check
    return functools.partial(Checked, check=divergence.check)

  @functools.cached_property
  def _key(self) -> jax.Array:
    # Not before it is needed: absent devices hold nothing.
    with jax.transfer_guard('allow'):
      key = jax.random.key(self.config.train.seed)
      return jax.device_put(key, self._whole)

  @functools.cached_property
  def _host_numbers(self) -> dict[str, np.ndarray]:
    with jax.transfer_guard('allow'):
      return jax.device_get(
        optim.numbers_of(self.config.optim, self._num_steps)
      )

  @functools.cached_property
  def _numbers(self) -> optim.Numbers:
    """The numbers of the optimizer, on the devices."""
    with jax.transfer_guard('allow'):
      # By the host: of several processes, each has the same.
      return jax.device_put(self._host_numbers, self._whole)

  def learning_rate(self, update: int) -> float:
    """Returns the learning rate of an update, from 0; see `num_updates`."""
    rates = self._host_numbers['rates']
    return float(rates[min(int(update), len(rates) - 1)])

  def init_state(self) -> train_state.TrainState:
    """Draws the weights, on the devices that hold them."""
    return self._runs['init'](self._key)

  def step(
    self, state: train_state.TrainState, batch: train_step.Batch
  ) -> tuple[train_state.TrainState, dict[str, jax.Array]]:
    """Returns the next state and metrics; `state` is given up."""
    return self._runs['step'](state, batch, self._key, self._numbers)

  def gradients(
    self, state: train_state.TrainState, batch: train_step.Batch
  ) -> tuple[Any, dict[str, Any]]:
    """Returns the gradients and metrics of the next update; keeps `state`."""
    return self._gradients(state, batch, self._key)

  def apply(
    self, state: train_state.TrainState, grads: Any, sums: dict[str, Any]
  ) -> tuple[train_state.TrainState, dict[str, jax.Array]]:
    """Returns the next state and metrics of an update; keeps its arguments."""
    return self._apply(state, grads, sums, self._numbers)

  def lower_step(self, batch: train_step.Batch) -> jax.stages.Lowered:
    """Returns the step lowered for `batch`, arrays or sharded shapes."""
    numbers = {
      name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=self._whole)
      for name, s in optim.numbers_shapes(self._num_steps).items()
    }
    return self._step.lower(self.shapes, batch, self._key_shape(), numbers)

  def lowered(self) -> dict[str, jax.stages.Lowered]:
    """Returns the programs of a run, lowered for full batches, by name.

    The mesh may be of absent devices, and is in use (`sharding.use`).
    """
    batch = self.batch_shapes()
    own = self.config.step_config
    model = train_state.averaged_model(self.shapes, own)
    return {
      'init': self._init.lower(self._key_shape()),
      'step': self.lower_step(batch),
      'evaluate': self._eval.lower(model, batch, *self._remembered()),
    }

  def replace(self, compiled: Mapping[str, jax.stages.Compiled]) -> None:
    """Takes programs made of `lowered`, by the same names."""
    self._runs |= compiled

  def batch_shapes(self) -> train_step.Batch:
    """Returns the sharded shapes of the batches that `place` makes."""
    shapes = {}
    for name, (shape, dtype) in data_pipeline.batch_spec(
      self.config.data
    ).items():
      rows, length = shape
      shapes[name] = jax.ShapeDtypeStruct(
        (rows, length + self._padding(name, length)),
        dtype,
        sharding=self.batch_sharding,
      )
    return shapes

  def _key_shape(self) -> jax.ShapeDtypeStruct:
    key = jax.eval_shape(jax.random.key, 0)
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=self._whole)

  def evaluate(
    self,
    model: nnx.Module,
    batch: train_step.Batch,
    memory: dict[str, Any] | None = None,
  ) -> dict[str, Any]:
    """Returns the sums of `train_step.eval_step`.

    Args:
      model: the model, whose parameters may be moving averages.
      batch: a global batch.
      memory: the memory of the batch before, for models that remember; None
        at the first.
    """
    if memory is None:
      memory = self._nothing
    given = () if memory is None else (memory,)
    return self._runs['evaluate'](model, batch, *given)

  @functools.cached_property
  def _nothing(self) -> Any:
    """The memory of an evaluation's first batch, None without one."""
    return self._empty_memory() if self._remembered() else None

  def with_memory(
    self, state: train_state.TrainState
  ) -> train_state.TrainState:
    """Returns a state with a memory of nothing where it has lost its own."""
    name = segment_memory.NAME
    if not self._remembered() or state.carried[name]['segments'] is not None:
      return state
    carried = {**state.carried, name: self._empty_memory()}
    return dataclasses.replace(state, carried=carried)

  def _empty_memory(self) -> Any:
    (shapes,) = self._remembered()
    shardings = jax.tree.map(lambda s: s.sharding, shapes)
    make = functools.partial(segment_memory.like, shapes)
    with jax.transfer_guard('allow'):
      return jax.jit(make, out_shardings=shardings)()

  def _remembered(self) -> tuple[Any, ...]:
    """Returns the shapes of what the model remembers, if it does."""
    carried = self.shapes.carried
    name = segment_memory.NAME
    return (carried[name],) if name in carried else ()

  def place(self, batch: dict[str, Any]) -> train_step.Batch:
    """Makes a global batch of this process's rows, as the mesh needs them."""
    batch = {name: self._arranged(name, a) for name, a in batch.items()}
    num_rows = self.config.data.batch_size
    return processes.put(batch, self.batch_sharding, self.rows, num_rows)

  def _arranged(self, name: str, array: np.ndarray) -> np.ndarray:
    """Pads the targets' side so that it can be split; orders it for a ring."""
    if batch_keys.is_source(name):
      return array
    padding = self._padding(name, array.shape[1])
    array = np.pad(array, ((0, 0), (0, padding)))
    return array[:, zigzag.index(array.shape[1], self.partitioning.zigzag)]

  def _padding(self, name: str, length: int) -> int:
    if batch_keys.is_source(name):
      return 0
    return -length % self.partitioning.target_multiple


def _with_numbers(
  fn: Callable[..., Any],
  whole: experiment.Experiment,
  config: train_state.StepConfig,
) -> Callable[..., Any]:
  """Returns a step that takes the optimizer's numbers as its last argument.

  So learning rates and weight decay are no part of its program, which runs that
  differ in nothing else share.

  Args:
    fn: a function with the keyword arguments `tx` and `config`.
    whole: the experiment, whose optimizer it is.
    config: settings of the step.
  """

  def step(*args: Any) -> Any:
    *given, numbers = args
    tx = experiment.optimizer(whole, 1, numbers)
    return fn(*given, tx=tx, config=config)

  step.__name__ = fn.__name__  # Of the compiled program.
  return step


def jit_for(
  config: experiment.Experiment, mesh: jax.sharding.Mesh
) -> Callable[..., Any]:
  """Returns `jax.jit` with the compiler's options for the mesh's devices."""
  options = options_for(config, mesh)
  return functools.partial(jax.jit, compiler_options=options or None)


def options_for(
  config: experiment.Experiment, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
  """Returns the compiler's options for the mesh's devices, by name."""
  return machines.options_of(
    [*mesh.devices.flat],
    config.compiler_options,
    diverge=mesh.shape[sharding.PIPE] > 1 and not config.pipeline.uniform,
  )

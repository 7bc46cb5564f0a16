"""Verifies that a layout computes the same as one device, step by step.

The reference is the experiment on one device, with the same seed, in float32.
At each training step, these are compared:

  loss, gradients   at the reference's weights, on the same rows;
  update            of the reference's weights by the reference's gradients,
                    with the layout's own optimizer state;
  trajectory        the loss of the layout's own training, by the train step.

Each step starts again from the reference, so an error shows at the step that
makes it, and only the trajectory accumulates errors. Before the first step, the
initial `weights` are compared.

The deviation of gradients is defined in `t2x.verification.deviation`. An update
is hundreds of times smaller than its parameter, which would hide an error. So
the deviation of an updated parameter is divided by the update (the change of
the reference's parameter), after one rounding of the sum is subtracted. The
loss of the trajectory at step k contains the deviations of k - 1 updates
besides its own, so its deviation is divided by k.

Dropout may be on: its bits depend on the number of a row and the position of a
token in it (`t2x.layers.dropout`), so layouts and microbatches do not change
them.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import dataclasses
import math
from typing import Any
from typing import SupportsFloat

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import numpy.typing as npt

from t2x.compilation import program as program_lib
from t2x.config import consistency
from t2x.config import experiment
from t2x.config import layout_advice
from t2x.config import layout_flag
from t2x.config import overrides
from t2x.data import batches as batches_lib
from t2x.data import corpus as corpus_lib
from t2x.data import input_pipeline
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding
from t2x.parallel import simulated_devices
from t2x.trainer import train
from t2x.training import train_step
from t2x.verification import deviation

TOLERANCE = 1e-4
# Up to so many tokens a step, LLVM's optimizations, which are most of the
# compile time, cost more than they save.
_FEW_TOKENS = 1024


def verify(
  config: experiment.Experiment,
  layouts: Sequence[layout_flag.Layout],
  *,
  num_steps: int = 5,
  tolerance: float = TOLERANCE,
) -> Iterator[deviation.Verdict]:
  """Compares layouts with one device; yields the verdict of each.

  Every process of a run must call it; each computes the reference itself.

  Args:
    config: the experiment; its mesh is ignored.
    layouts: layouts to compare.
    num_steps: number of training steps.
    tolerance: largest deviation that counts as rounding.

  Raises:
    ValueError: a layout does not fit the experiment or the devices; the message
      names two that do. It is raised before any compilation.
  """
  config = overrides.override(config, {'model.dtype': 'float32'})
  alone = dataclasses.replace(config, mesh=mesh_lib.MeshConfig(data=1))
  layout_advice.check(alone, 1)
  placed = [(layout, *_placed(layout, config)) for layout in layouts]
  batches, total = _batches(config, num_steps)
  reference = _Side(alone, jax.local_devices()[:1], total)
  for layout, layout_config, devices in placed:
    side = _Side(layout_config, devices, total)
    checks = _compare(side, _reference_steps(reference, batches), batches)
    yield deviation.Verdict(
      layout=layout.text, tolerance=tolerance, checks=tuple(checks)
    )


def _placed(
  layout: layout_flag.Layout, config: experiment.Experiment
) -> tuple[experiment.Experiment, list[Any]]:
  """Returns the config with the checked layout, and its devices."""
  config = layout.applied(config)
  layout.check(config)
  return config, _devices(layout.text, layout.num_devices)


def _devices(text: str, num: int) -> list[Any]:
  """Returns `num` devices, the first ones of every process."""
  processes = jax.process_count()
  by_process = [
    [d for d in jax.devices() if d.process_index == index]
    for index in range(processes)
  ]
  available = min(map(len, by_process))
  if num % processes or num // processes > available:
    raise ValueError(
      f'--layout={text} needs {num} devices, as many of each process, and '
      f'there are {processes} x {available} (processes x devices). Choose '
      'another layout, or simulate more devices: '
      f'XLA_FLAGS={simulated_devices.COUNT}=N.'
    )
  return [d for devices in by_process for d in devices[: num // processes]]


def _batches(
  config: experiment.Experiment, num_steps: int
) -> tuple[list[batches_lib.Batch], int]:
  """Returns the first global batches, and the number of steps of a run."""
  corpus = corpus_lib.prepare(config.data)
  consistency.check_vocabulary(config, corpus.tokenizer.vocab_size)
  batches = input_pipeline.train_batches(
    corpus, config.data, seed=config.train.seed
  )
  with contextlib.closing(batches):
    first = [next(batches) for _ in range(num_steps)]
  return first, train.resolve_num_steps(config, corpus)


class _Side:
  """One side of a comparison: a program on its mesh."""

  def __init__(
    self,
    config: experiment.Experiment,
    devices: Sequence[Any],
    num_steps: int,
  ):
    self._rules = config.rules
    self.mesh = mesh_lib.make(config.mesh, devices)
    small = config.data.batch_size * config.data.length <= _FEW_TOKENS
    if small and devices[0].platform == 'cpu':
      quickly = *config.compiler_options, 'xla_backend_optimization_level=0'
      config = dataclasses.replace(config, compiler_options=quickly)
    with self.active():
      self.program = program_lib.Program(config, self.mesh, num_steps=num_steps)

  @contextlib.contextmanager
  def active(self) -> Iterator[None]:
    # By default, accelerators compute float32 products from bfloat16.
    precise = jax.default_matmul_precision('highest')
    with sharding.use(self.mesh, self._rules), precise:
      yield

  def batch(self, whole: batches_lib.Batch) -> train_step.Batch:
    rows = self.program.rows
    return self.program.place({name: a[rows] for name, a in whole.items()})

  def put(self, tree: Any, shapes: Any) -> Any:
    """Puts host arrays where `shapes` says; None replicates them."""
    whole = NamedSharding(self.mesh, P())

    def place(
      a: npt.ArrayLike, shape: jax.ShapeDtypeStruct | None = None
    ) -> jax.Array:
      a = np.asarray(a)
      where = whole if shape is None else shape.sharding
      return jax.make_array_from_callback(a.shape, where, lambda i: a[i])

    rest = () if shapes is None else (shapes,)
    return jax.tree.map(place, tree, *rest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Step:
  """A step of the reference: arrays on the host."""

  state: Any
  grads: Any
  sums: dict[str, Any]
  after: Any


def _reference_steps(
  side: _Side, batches: Sequence[batches_lib.Batch]
) -> Iterator[_Step]:
  """Yields the steps of the reference, one in memory at a time."""
  with side.active():
    state = side.program.init_state()
  for batch in batches:
    with side.active():
      grads, sums = side.program.gradients(state, side.batch(batch))
      after, _ = side.program.apply(state, grads, sums)
    yield _Step(
      **jax.device_get(
        {'state': state, 'grads': grads, 'sums': sums, 'after': after.model}
      )
    )
    state = after


def _compare(
  side: _Side,
  reference: Iterator[_Step],
  batches: Sequence[batches_lib.Batch],
) -> Iterator[deviation.Check]:
  """Yields the checks of a layout."""
  program, check = side.program, deviation.Check
  with side.active():
    updated, running = program.init_state(), program.init_state()
  for number, (step, batch) in enumerate(zip(reference, batches), 1):
    loss = _finite(step.sums['loss'], number)
    if number == 1:
      of_weights = deviation.of_tree(updated.model, step.state.model)
      yield check(step=0, name='weights', deviations=of_weights)
    with side.active():
      batch = side.batch(batch)
      state = side.put(step.state, program.shapes)
      grads, sums = program.gradients(state, batch)
      # The optimizer state stays the layout's own, so that an error in it shows
      # at the next step.
      state = dataclasses.replace(
        state, opt_state=updated.opt_state, ema=updated.ema
      )
      updated, _ = program.apply(
        state, side.put(step.grads, program.trained), side.put(step.sums, None)
      )
      running, metrics = program.step(running, batch)
    of_loss = deviation.of_loss(sums['loss'], loss)
    yield check(step=number, name='loss', deviations={'': of_loss})
    of_grads = deviation.of_tree(grads, step.grads)
    # Here a different choice of experts shows, whatever their outputs.
    of_grads |= deviation.of_tree(sums['loads'], step.sums['loads'])
    yield check(step=number, name='gradients', deviations=of_grads)
    change = jax.tree.map(np.subtract, step.after, step.state.model)
    of_update = deviation.of_tree(
      updated.model, step.after, scale=change, rounded=True
    )
    yield check(step=number, name='update', deviations=of_update)
    of_running = deviation.of_loss(metrics['loss'], loss) / number
    yield check(step=number, name='trajectory', deviations={'': of_running})


def _finite(loss: SupportsFloat, number: int) -> float:
  loss = float(loss)
  if not math.isfinite(loss):
    raise ValueError(
      f'The loss of one device is {loss} at step {number}, so there is nothing '
      'to compare with. Lower optim.learning_rate, or look at the data.'
    )
  return loss

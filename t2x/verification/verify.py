"""Whether a layout computes what one device does, step by step.

The reference is the experiment on one device, with the same seed, in float32.
At each step of its training, a layout is asked for

  loss, gradients   at the reference's weights, on the same rows;
  update            of the reference's weights by the reference's gradients,
                    the optimizer's state being the layout's own;
  trajectory        the loss of its own training, by the step that trains.

So each step starts anew from the reference, an error shows where it is made,
and only the trajectory carries it on. Before the first step, the `weights` as
drawn are compared.

Gradients are measured as `t2x.verification.deviation` says. An updated
parameter would hide an error of its update, which is hundreds of times smaller:
its deviation is measured against the update, the change of the reference's
parameters, after what the rounding of their sum may cost. The loss of the
trajectory at step k has the deviations of k - 1 updates in it besides its own,
so it is divided by k.

Dropout may be on: its bits belong to a row's number and to a token's place in
it (`t2x.layers.dropout`), so neither the layout nor microbatches change them.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import dataclasses
import math
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from t2x.compilation import program as program_lib
from t2x.config import consistency
from t2x.config import experiment
from t2x.config import layout_advice
from t2x.config import layout_flag
from t2x.config import overrides
from t2x.data import corpus as corpus_lib
from t2x.data import input_pipeline
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding
from t2x.parallel import simulated_devices
from t2x.trainer import train
from t2x.verification import deviation

TOLERANCE = 1e-4
# Of a step, up to which LLVM's optimisations (most of the time that compiling
# takes) are not worth their time.
_FEW_TOKENS = 1024


def verify(
  config: experiment.Experiment,
  layouts: Sequence[layout_flag.Layout],
  *,
  num_steps: int = 5,
  tolerance: float = TOLERANCE,
) -> Iterator[deviation.Verdict]:
  """Compares layouts with one device; yields as each is done.

  Every process of a run calls it; the reference is computed by each.

  Args:
    config: the experiment; its mesh does not matter.
    layouts: to compare.
    num_steps: of training.
    tolerance: largest deviation that is rounding.

  Raises:
    ValueError: a layout that cannot be, with two that can; before anything is
      compiled.
  """
  config = overrides.override(config, {'model.dtype': 'float32'})
  alone = dataclasses.replace(config, mesh=mesh_lib.MeshConfig(data=1))
  layout_advice.check(alone, 1)
  placed = [(layout, *_placed(layout, config)) for layout in layouts]
  batches, total = _read(config, num_steps)
  reference = _Side(alone, jax.local_devices()[:1], total)
  for layout, own, devices in placed:
    side = _Side(own, devices, total)
    checks = _compare(side, _reference_steps(reference, batches), batches)
    yield deviation.Verdict(
      layout=layout.text, tolerance=tolerance, checks=tuple(checks)
    )


def _placed(layout: layout_flag.Layout, config: experiment.Experiment):
  """Returns the config in the layout, which can be, and its devices."""
  own = layout.applied(config)
  layout.check(own)
  return own, _devices(layout.text, layout.num_devices)


def _devices(text: str, num: int) -> list[Any]:
  """Returns so many devices, the first ones of every process."""
  processes = jax.process_count()
  by_process = [
    [d for d in jax.devices() if d.process_index == index]
    for index in range(processes)
  ]
  there = min(map(len, by_process))
  if num % processes or num // processes > there:
    raise ValueError(
      f'--layout={text} needs {num} devices, as many of each process, and '
      f'there are {processes} x {there} (processes x devices). Choose another '
      'layout, or simulate more devices: '
      f'XLA_FLAGS={simulated_devices.COUNT}=N.'
    )
  return [d for own in by_process for d in own[: num // processes]]


def _read(config: experiment.Experiment, num_steps: int):
  """Returns the first batches, whole, and the steps of a run."""
  corpus = corpus_lib.prepare(config.data)
  consistency.check_vocabulary(config, corpus.tokenizer.vocab_size)
  batches = input_pipeline.train_batches(
    corpus, config.data, seed=config.train.seed
  )
  with contextlib.closing(batches):
    first = [next(batches) for _ in range(num_steps)]
  return first, train.resolve_num_steps(config, corpus)


class _Side:
  """A program on its mesh, that takes and gives what lies on the host."""

  def __init__(self, config: experiment.Experiment, devices, num_steps: int):
    self._rules = config.rules
    self.mesh = mesh_lib.make(config.mesh, devices)
    small = config.data.batch_size * config.data.length <= _FEW_TOKENS
    if small and devices[0].platform == 'cpu':
      quickly = *config.compiler_options, 'xla_backend_optimization_level=0'
      config = dataclasses.replace(config, compiler_options=quickly)
    with self.active():
      self.program = program_lib.Program(config, self.mesh, num_steps=num_steps)

  @contextlib.contextmanager
  def active(self):
    # On accelerators, products of float32 are made of bfloat16 by default.
    precise = jax.default_matmul_precision('highest')
    with sharding.use(self.mesh, self._rules), precise:
      yield

  def batch(self, whole: dict[str, np.ndarray]):
    rows = self.program.rows
    return self.program.place({name: a[rows] for name, a in whole.items()})

  def put(self, tree: Any, shapes: Any) -> Any:
    """Puts arrays of the host where `shapes` live; scalars everywhere."""
    whole = NamedSharding(self.mesh, P())

    def place(a, shape=None):
      a = np.asarray(a)
      where = whole if shape is None else shape.sharding
      return jax.make_array_from_callback(a.shape, where, lambda i: a[i])

    rest = () if shapes is None else (shapes,)
    return jax.tree.map(place, tree, *rest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Step:
  """A step of the reference, on the host."""

  state: Any
  grads: Any
  sums: dict[str, Any]
  after: Any


def _reference_steps(side: _Side, batches) -> Iterator[_Step]:
  """Yields the steps anew for each layout, so that only one is held."""
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
  side: _Side, reference: Iterator[_Step], batches
) -> Iterator[deviation.Check]:
  """Yields the checks of a layout."""
  program, check = side.program, deviation.Check
  with side.active():
    own, running = program.init_state(), program.init_state()
  for number, (step, batch) in enumerate(zip(reference, batches), 1):
    loss = _finite(step.sums['loss'], number)
    if number == 1:
      of_weights = deviation.of_tree(own.model, step.state.model)
      yield check(step=0, name='weights', deviations=of_weights)
    with side.active():
      batch = side.batch(batch)
      state = side.put(step.state, program.shapes)
      grads, sums = program.gradients(state, batch)
      # The moments stay the layout's own: an error in them shows one step on.
      state = dataclasses.replace(state, opt_state=own.opt_state, ema=own.ema)
      own, _ = program.apply(
        state, side.put(step.grads, program.trained), side.put(step.sums, None)
      )
      running, metrics = program.step(running, batch)
    of_loss = deviation.of_loss(sums['loss'], loss)
    yield check(step=number, name='loss', deviations={'': of_loss})
    of_grads = deviation.of_tree(grads, step.grads)
    # Another choice of experts shows here, whatever their outputs.
    of_grads |= deviation.of_tree(sums['loads'], step.sums['loads'])
    yield check(step=number, name='gradients', deviations=of_grads)
    change = jax.tree.map(np.subtract, step.after, step.state.model)
    of_update = deviation.of_tree(
      own.model, step.after, scale=change, rounded=True
    )
    yield check(step=number, name='update', deviations=of_update)
    of_own = deviation.of_loss(metrics['loss'], loss) / number
    yield check(step=number, name='trajectory', deviations={'': of_own})


def _finite(loss: Any, number: int) -> float:
  loss = float(loss)
  if not math.isfinite(loss):
    raise ValueError(
      f'The loss of one device is {loss} at step {number}, so there is nothing '
      'to compare with. Lower optim.learning_rate, or look at the data.'
    )
  return loss

"""Coordinate check: how large activations are, by width, as training goes on.

Under a parametrisation by which rates hold at every width, the size of each
activation after some steps, and its change since the first, do not depend on
the width (Yang et al., 2022, appendix D.1). What grows with it shows a factor
that is missing.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t2x.compilation import program as program_lib
from t2x.config import experiment
from t2x.data import corpus as corpus_lib
from t2x.data import input_pipeline
from t2x.models import forward
from t2x.models import sizes
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding

LOGITS = 'logits'
# Slopes of log size over log width that count as flat. A factor that is missing
# gives 1/2 or 1; what few steps and narrow models leave stays within this.
_FLAT = 0.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
  """The size of one activation at one width after some steps.

  Attributes:
    width: embed_dim of the model.
    step: number of updates.
    place: place in the model: embeddings, a layer of a tower, features, logits.
    size: mean absolute value.
    change: mean absolute difference from the value before the first step.
  """

  width: int
  step: int
  place: str
  size: float
  change: float


def activations(
  model: forward.Model, batch: Mapping[str, Any]
) -> dict[str, jax.Array]:
  """Returns the activations of a model between its layers, by place.

  Args:
    model: a model of any architecture.
    batch: a batch of its objective.
  """
  found, batch, x_BTD = {}, dict(batch), None
  for name in model.towers:
    context = model.context(name, batch, None, 1)
    x_BTD, encoded_BSD = model.enter(name, batch, context, x_BTD)
    context = dataclasses.replace(context, encoded_BSD=encoded_BSD)
    tower = getattr(model, name)
    x_BTD = tower.begin(x_BTD, context)
    found[f'{name} embeddings'] = x_BTD
    for i, layer in enumerate(tower.layers.apart().remainder):
      x_BTD, _, _ = tower.layer(layer, x_BTD, context, jnp.asarray(i))
      found[f'{name} layer {i}'] = x_BTD
  assert x_BTD is not None, 'a model has a tower'
  found['features'] = model.leave(x_BTD, batch)
  for name, term in model.terms(x_BTD, batch, None, 1).items():
    found[f'{name} {LOGITS}'.strip()] = term.head(term.x_BTD)
  return found


def measure(
  config: experiment.Experiment,
  widths: Sequence[int],
  num_steps: int = 5,
  num_seeds: int = 2,
) -> list[Size]:
  """Trains at each width for some steps, on one device.

  Args:
    config: the experiment; its own width is of no account.
    widths: widths to train at.
    num_steps: updates at each of them.
    num_seeds: number of seeds over which sizes are averaged, `train.seed` the
      first of them.

  Raises:
    ValueError: a width at which heads or feed-forward layers are not whole.
  """
  configs = [
    dataclasses.replace(
      config,
      model=sizes.with_width(config.model, width),
      mesh=mesh_lib.MeshConfig(data=1),
    )
    for width in widths
  ]
  corpus = corpus_lib.prepare(config.data)
  found = []
  for width, own in zip(widths, configs):
    first = own.train.seed
    by_seed = [
      _measure_one(
        dataclasses.replace(
          own, train=dataclasses.replace(own.train, seed=seed)
        ),
        width,
        corpus,
        num_steps,
      )
      for seed in range(first, first + num_seeds)
    ]
    found += [_mean(same) for same in zip(*by_seed, strict=True)]
  return found


def _mean(sizes_of_seeds: Sequence[Size]) -> Size:
  return dataclasses.replace(
    sizes_of_seeds[0],
    size=float(np.mean([s.size for s in sizes_of_seeds])),
    change=float(np.mean([s.change for s in sizes_of_seeds])),
  )


def _measure_one(
  config: experiment.Experiment,
  width: int,
  corpus: corpus_lib.Corpus,
  num_steps: int,
) -> list[Size]:
  mesh = mesh_lib.make(config.mesh, jax.devices()[:1])
  program = program_lib.Program(config, mesh, num_steps=num_steps)
  places: list[str] = []

  def traced(model: forward.Model, batch: Mapping[str, Any]) -> Any:
    result = activations(model, batch)
    places[:] = result  # In the order of the pass, which JAX forgets.
    return result

  look = jax.jit(traced)
  difference = jax.jit(
    lambda now, first: jax.tree.map(
      lambda a, b: (jnp.abs(a).mean(), jnp.abs(a - b).mean()), now, first
    )
  )
  found = []
  with sharding.use(mesh, config.rules):
    state = program.init_state()
    batches = input_pipeline.train_batches(
      corpus, config.data, seed=config.train.seed, rows=program.rows
    )
    probe, first = None, None
    for step in range(num_steps + 1):
      batch = program.place(next(batches))
      probe = batch if probe is None else probe
      now = look(state.model, probe)
      first = now if first is None else first
      measured = difference(now, first)
      for place in places:
        size, change = measured[place]
        found.append(
          Size(
            width=width,
            step=step,
            place=place,
            size=float(size),
            change=float(change),
          )
        )
      if step < num_steps:
        state, _ = program.step(state, batch)
    batches.close()
  return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slope:
  """How an activation goes with the width after the last step.

  Attributes:
    place: place in the model.
    size: slope of log(mean absolute value) over log(width).
    change: slope of the logarithm of its change over log(width).
  """

  place: str
  size: float
  change: float

  @property
  def grows(self) -> bool:
    """Whether it, or its change, grows with the width."""
    return max(self.size, self.change) > _FLAT

  @property
  def vanishes(self) -> bool:
    """Whether it changes less and less with the width.

    Logits of the first steps may: they are small before training, and the more
    so the wider the model.
    """
    return self.change < -_FLAT and LOGITS not in self.place


def slopes(found: Sequence[Size]) -> list[Slope]:
  """Returns the slopes of all places after the last step."""
  last = max(size.step for size in found)
  result = []
  for place in dict.fromkeys(size.place for size in found):
    own = [s for s in found if s.place == place and s.step == last]
    result.append(
      Slope(
        place=place,
        size=_slope([(s.width, s.size) for s in own]),
        change=_slope([(s.width, s.change) for s in own]),
      )
    )
  return result


def _slope(pairs: Sequence[tuple[float, float]]) -> float:
  x, y = np.log(np.maximum(np.array(pairs).T, 1e-30))
  return float(np.polyfit(x, y, 1)[0])

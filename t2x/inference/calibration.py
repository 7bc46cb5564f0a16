"""How far a model's probabilities can be believed, and one number that helps.

Held-out tokens are sorted by the probability of the model's best guess; of
those at 0.8 four in five should be right. The expected calibration error is the
mean distance from that, and one temperature for all logits, fitted on other
held-out tokens, mostly removes it (Guo et al., 2017).

  found = calibration.calibrate(inference.load(workdir))
  calibration.draw(found, 'reliability.png')

Shape suffixes: B batch, T position, V vocabulary, M bins.
"""

from collections.abc import Sequence
import dataclasses
import functools
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t2x import files
from t2x.compilation import program as program_lib
from t2x.data import corpus as corpus_lib
from t2x.data import input_pipeline
from t2x.inference import trained_model
from t2x.models import forward
from t2x.models import loss_terms
from t2x.parallel import sharding
from t2x.trainer import workdir as workdir_lib

NUM_BINS = 15
_RANGE = (0.05, 20.0)  # Temperatures that a fit may give.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reliability:
  """What held-out tokens say of a model's probabilities.

  Attributes:
    temperature: that its logits were divided by.
    counts: tokens whose best guess has its probability in each bin; all are
      equally wide.
    confidence: mean probability of the best guess in each bin.
    accuracy: how many of them are right.
    nll: mean negative log-likelihood, nats.
  """

  temperature: float
  counts: list[float]
  confidence: list[float]
  accuracy: list[float]
  nll: float

  @property
  def num_tokens(self) -> float:
    return sum(self.counts)

  @property
  def ece(self) -> float:
    """Expected calibration error: the mean of |accuracy - confidence|."""
    pairs = zip(self.counts, self.confidence, self.accuracy)
    return sum(n * abs(a - c) for n, c, a in pairs) / max(self.num_tokens, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
  """A fit, and the tokens that it was not fitted on before and after it."""

  temperature: float
  before: Reliability
  after: Reliability


def calibrate(
  trained: trained_model.Trained,
  *,
  split: str | None = None,
  max_batches: int = 64,
) -> Calibration:
  """Fits a temperature on every second batch of a split; the others judge it.

  Args:
    trained: what `loading.load` returned; its own temperature is not used.
    split: default the first of data.eval_splits.
    max_batches: at most so many are read, at least two.

  Raises:
    ValueError: the split has no two batches of targets.
  """
  batches = _batches(trained, split, max(max_batches, 2))
  fitting, judging = batches[0::2], batches[1::2]
  if not judging:
    raise ValueError(
      'A temperature is fitted on one half of the batches and judged on the '
      'other, and the split has one batch. Lower data.batch_size, or give more '
      'text.'
    )
  run = functools.partial(_sums, trained)
  temperature = _fit(lambda value: run(fitting, value))
  return Calibration(
    temperature=temperature,
    before=_reliability(run(judging, 1.0), 1.0),
    after=_reliability(run(judging, temperature), temperature),
  )


def save(workdir: str, found: Calibration) -> None:
  """Keeps the temperature with the run; `loading.load` then uses it."""
  data = {
    'temperature': found.temperature,
    'num_tokens': found.after.num_tokens,
    'ece': [found.before.ece, found.after.ece],
    'nll': [found.before.nll, found.after.nll],
  }
  file = files.path(workdir) / workdir_lib.CALIBRATION
  files.write_whole(file, json.dumps(data, indent=1) + '\n')


def draw(found: Calibration, path: str) -> None:
  """Draws both reliability diagrams into a PNG or SVG file."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(1, 2, figsize=(9, 4.2), sharey=True)
  for axis, part in zip(axes, (found.before, found.after)):
    edges = np.linspace(0, 1, len(part.counts) + 1)
    there = np.array(part.counts) > 0
    axis.plot([0, 1], [0, 1], color='0.6', linewidth=1)
    bars = axis.bar(
      edges[:-1][there],
      np.array(part.accuracy)[there],
      width=edges[1],
      align='edge',
      color='#4c78a8',
      edgecolor='white',
    )
    for bar, count in zip(bars, np.array(part.counts)[there]):
      # A bin of a few tokens says little, and looks so.
      bar.set_alpha(min(1.0, 0.2 + count / 60))
    axis.plot(
      np.array(part.confidence)[there],
      np.array(part.accuracy)[there],
      'o',
      color='#e45756',
      markersize=4,
      label='mean confidence of a bin (pale: under 50 tokens)',
    )
    axis.set_title(
      f'temperature {part.temperature:.3f}: ECE {100 * part.ece:.2f}%, '
      f'{part.nll:.3f} nats',
      fontsize=10,
    )
    axis.set_xlabel('probability of the best guess')
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
  axes[0].set_ylabel('share of best guesses that are right')
  axes[0].legend(loc='upper left', fontsize=8)
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  pyplot.close(figure)


def _batches(trained, split: str | None, most: int) -> list[Any]:
  """Returns batches of a split, on the devices."""
  config = trained.config
  split = split or config.data.eval_splits[0]
  data = dataclasses.replace(config.data, eval_splits=(split,))
  config = dataclasses.replace(config, data=data)
  corpus = corpus_lib.prepare(config.data, trained.tokenizer)
  program = program_lib.Program(config, trained.mesh, num_steps=1)
  with sharding.use(trained.mesh, config.rules):
    sets = input_pipeline.eval_sets(
      corpus, config.data, rows=program.rows, max_batches=most
    )
    return [program.place(b) for _, _, batches in sets for b in batches]


def _sums(trained, batches: Sequence[Any], temperature: float):
  """Returns sums over the main targets of batches, as floats and arrays."""
  total: Any = None
  with sharding.use(trained.mesh, trained.config.rules):
    for batch in batches:
      found = jax.device_get(
        _measure(trained.model, batch, jnp.float32(temperature))
      )
      if total is not None:
        found = jax.tree.map(np.add, total, found)
      total = jax.tree.map(lambda a: a.astype(np.float64), found)
  if not total['counts_M'].sum():
    raise ValueError(
      'The split has no target of the main term, so there is nothing to '
      'calibrate. Name another split.'
    )
  return total


@jax.jit
def _measure(model, batch, temperature) -> dict[str, jax.Array]:
  """Returns sums over a batch's targets at a temperature.

  Of the loss also its first two derivatives by 1 / temperature: what the logits
  are expected to be less what they are, and their variance.
  """
  x_BTD, _ = forward.run(model, batch)
  term = model.terms(x_BTD, batch, None, 1)[loss_terms.MAIN]
  logits_BTV = term.head(term.x_BTD)
  weights_BT = (term.weights_BT > 0).astype(jnp.float32)
  log_probs_BTV = jax.nn.log_softmax(logits_BTV / temperature, axis=-1)
  at = lambda a: jnp.take_along_axis(a, term.targets_BT[..., None], -1)[..., 0]
  probs_BTV = jnp.exp(log_probs_BTV)
  mean_BT = (probs_BTV * logits_BTV).sum(-1)
  spread_BTV = logits_BTV - mean_BT[..., None]
  variance_BT = (probs_BTV * spread_BTV**2).sum(-1)
  confidence_BT = probs_BTV.max(-1)
  right_BT = (logits_BTV.argmax(-1) == term.targets_BT).astype(jnp.float32)
  bin_BT = jnp.minimum(confidence_BT * NUM_BINS, NUM_BINS - 1).astype(jnp.int32)
  into = jax.nn.one_hot(bin_BT, NUM_BINS) * weights_BT[..., None]
  return {
    'counts_M': into.sum((0, 1)),
    'confidence_M': (into * confidence_BT[..., None]).sum((0, 1)),
    'right_M': (into * right_BT[..., None]).sum((0, 1)),
    'nll': (weights_BT * -at(log_probs_BTV)).sum(),
    'slope': (weights_BT * (mean_BT - at(logits_BTV))).sum(),
    'curve': (weights_BT * variance_BT).sum(),
  }


def _fit(sums) -> float:
  """Returns the temperature of least loss, by Newton's method on its inverse.

  The loss is convex in it. A step that leaves the range is cut to its end.
  """
  low, high = 1 / _RANGE[1], 1 / _RANGE[0]
  inverse = 1.0
  for _ in range(30):
    found = sums(1 / inverse)
    step = float(found['slope'] / max(found['curve'], 1e-12))
    # Half of it at most, so that a flat end does not throw it far away.
    step = math.copysign(min(abs(step), inverse / 2), step)
    new = min(max(inverse - step, low), high)
    done = abs(new - inverse) < 1e-4 * inverse
    inverse = new
    if done:
      break
  return 1 / inverse


def _reliability(sums, temperature: float) -> Reliability:
  counts_M = sums['counts_M']
  safe_M = np.maximum(counts_M, 1)
  return Reliability(
    temperature=temperature,
    counts=counts_M.tolist(),
    confidence=(sums['confidence_M'] / safe_M).tolist(),
    accuracy=(sums['right_M'] / safe_M).tolist(),
    nll=float(sums['nll'] / counts_M.sum()),
  )

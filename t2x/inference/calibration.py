"""Calibration of a model's probabilities by a temperature.

Held-out tokens are sorted by the probability of the model's best guess. Of the
guesses at a probability of 0.8, four in five should be right. The expected
calibration error (ECE) is the mean distance from that. Dividing all logits by
one temperature, fitted on other held-out tokens, mostly removes it (Guo et al.,
2017, "On Calibration of Modern Neural Networks").

  result = calibration.calibrate(loading.load(workdir))
  calibration.draw(result, 'reliability.png')

Shape suffixes: B batch, T position, V vocabulary, M bins.
"""

from collections.abc import Callable
from collections.abc import Mapping
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
from t2x.models import model as model_lib
from t2x.parallel import sharding
from t2x.trainer import workdir as workdir_lib
from t2x.training import train_step

_Sums = Mapping[str, np.ndarray]  # Sums over tokens; see `_measure`.

NUM_BINS = 15
_RANGE = (0.05, 20.0)  # Bounds of the fitted temperature.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reliability:
  """A reliability diagram: confidence and accuracy on held-out tokens.

  The bins divide the probabilities from 0 to 1 into equal parts.

  Attributes:
    temperature: divisor of the logits.
    counts: number of tokens in each bin, by the probability of the best guess.
    confidence: mean probability of the best guess in each bin.
    accuracy: share of the best guesses in each bin that are right.
    nll: mean negative log-likelihood of a token, in nats.
  """

  temperature: float
  counts: list[float]
  confidence: list[float]
  accuracy: list[float]
  nll: float

  @property
  def num_tokens(self) -> float:
    """Number of tokens in all bins."""
    return sum(self.counts)

  @property
  def ece(self) -> float:
    """Expected calibration error: the mean of |accuracy - confidence|."""
    pairs = zip(self.counts, self.confidence, self.accuracy)
    return sum(n * abs(a - c) for n, c, a in pairs) / max(self.num_tokens, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
  """A fitted temperature and what it changes.

  Attributes:
    temperature: fitted divisor of the logits.
    before: reliability at temperature 1, on tokens that were not fitted on.
    after: reliability of the same tokens at the fitted temperature.
  """

  temperature: float
  before: Reliability
  after: Reliability


def calibrate(
  trained: trained_model.Trained,
  *,
  split: str | None = None,
  max_batches: int = 64,
) -> Calibration:
  """Fits a temperature on half the batches of a split; the others test it.

  Args:
    trained: model to calibrate; its own temperature is not used.
    split: name of the split; None takes the first of data.eval_splits.
    max_batches: greatest number of batches to read; at least two are.

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


def save(workdir: str, calibration: Calibration) -> None:
  """Writes the temperature to a run's directory; `loading.load` then uses it.

  Args:
    workdir: directory of the run.
    calibration: result of `calibrate`.
  """
  before, after = calibration.before, calibration.after
  data = {
    'temperature': calibration.temperature,
    'num_tokens': after.num_tokens,
    'ece': [before.ece, after.ece],
    'nll': [before.nll, after.nll],
  }
  file = files.path(workdir) / workdir_lib.CALIBRATION
  files.write_whole(file, json.dumps(data, indent=1) + '\n')


def draw(calibration: Calibration, path: str) -> None:
  """Draws the reliability diagrams before and after the fit, side by side.

  Args:
    calibration: result of `calibrate`.
    path: file to write, whose ending gives the format, such as .png or .svg.
  """
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(1, 2, figsize=(9, 4.2), sharey=True)
  for axis, part in zip(axes, (calibration.before, calibration.after)):
    edges = np.linspace(0, 1, len(part.counts) + 1)
    is_used = np.array(part.counts) > 0
    axis.plot([0, 1], [0, 1], color='0.6', linewidth=1)
    bars = axis.bar(
      edges[:-1][is_used],
      np.array(part.accuracy)[is_used],
      width=edges[1],
      align='edge',
      color='#4c78a8',
      edgecolor='white',
    )
    for bar, count in zip(bars, np.array(part.counts)[is_used]):
      # A bin of a few tokens says little, and looks so.
      bar.set_alpha(min(1.0, 0.2 + count / 60))
    axis.plot(
      np.array(part.confidence)[is_used],
      np.array(part.accuracy)[is_used],
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


def _batches(
  trained: trained_model.Trained, split: str | None, max_batches: int
) -> list[train_step.Batch]:
  """Returns batches of a split, on the devices."""
  config = trained.config
  split = split or config.data.eval_splits[0]
  data = dataclasses.replace(config.data, eval_splits=(split,))
  config = dataclasses.replace(config, data=data)
  corpus = corpus_lib.prepare(config.data, trained.tokenizer)
  program = program_lib.Program(config, trained.mesh, num_steps=1)
  with sharding.use(trained.mesh, config.rules):
    sets = input_pipeline.eval_sets(
      corpus, config.data, rows=program.rows, max_batches=max_batches
    )
    return [program.place(b) for _, _, batches in sets for b in batches]


def _sums(
  trained: trained_model.Trained,
  batches: Sequence[train_step.Batch],
  temperature: float,
) -> _Sums:
  """Returns the sums of `_measure` over batches, in float64.

  Raises:
    ValueError: the batches have no target of the main term.
  """
  total: Any = None
  with sharding.use(trained.mesh, trained.config.rules):
    for batch in batches:
      sums = jax.device_get(
        _measure(trained.model, batch, jnp.float32(temperature))
      )
      if total is not None:
        sums = jax.tree.map(np.add, total, sums)
      total = jax.tree.map(lambda a: a.astype(np.float64), sums)
  if not total['counts_M'].sum():
    raise ValueError(
      'The split has no target of the main term, so there is nothing to '
      'calibrate. Name another split.'
    )
  return total


@jax.jit
def _measure(
  model: model_lib.Transformer, batch: train_step.Batch, temperature: jax.Array
) -> dict[str, jax.Array]:
  """Returns sums over a batch's targets at a temperature.

  Returns:
    By bin, `counts_M` (tokens), `confidence_M` (probabilities of the best
    guess) and `right_M` (best guesses that are right); of all tokens, `nll`
    and its first and second derivatives by 1 / temperature: `slope` (the
    expected logit minus the target's logit) and `curve` (the variance of the
    logits).
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


def _fit(sums: Callable[[float], _Sums]) -> float:
  """Returns the temperature of least loss, by Newton's method on its inverse.

  The loss is convex in the inverse temperature. A step that leaves the range is
  cut to the range's end.

  Args:
    sums: function from a temperature to the sums of `_measure`.
  """
  low, high = 1 / _RANGE[1], 1 / _RANGE[0]
  inverse = 1.0
  for _ in range(30):
    at = sums(1 / inverse)
    step = float(at['slope'] / max(at['curve'], 1e-12))
    # At most half of the inverse, so that a flat loss makes no huge step.
    step = math.copysign(min(abs(step), inverse / 2), step)
    new = min(max(inverse - step, low), high)
    done = abs(new - inverse) < 1e-4 * inverse
    inverse = new
    if done:
      break
  return 1 / inverse


def _reliability(sums: _Sums, temperature: float) -> Reliability:
  counts_M = sums['counts_M']
  safe_M = np.maximum(counts_M, 1)
  return Reliability(
    temperature=temperature,
    counts=counts_M.tolist(),
    confidence=(sums['confidence_M'] / safe_M).tolist(),
    accuracy=(sums['right_M'] / safe_M).tolist(),
    nll=float(sums['nll'] / counts_M.sum()),
  )

"""Scheduled sampling: a decoder that reads its own predictions.

In training a decoder reads the true targets, in use its own. Here it reads each
in turn (Bengio et al., 2015): a first pass predicts every target from the true
ones, all at once, and the second, which alone has gradients, reads a prediction
in place of some targets (Mihaylova and Martins, 2019, for Transformers).

Shape suffixes: B rows, T target position, V vocabulary.
"""

from collections.abc import Callable
import dataclasses
from typing import ClassVar
from typing import Literal

import jax
import jax.numpy as jnp

from t2x import field_checks
from t2x.layers import dropout
from t2x.layers import stack
from t2x.models import forward
from t2x.parallel import zigzag as zigzag_lib

_SITE = 2**30  # Of random numbers, past every layer's.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduledSampling:
  """How often a predicted token takes the place of the true one.

  Attributes:
    share: the part of the targets that is replaced once it has grown, in
      (0, 1].
    start: steps before any is replaced.
    steps: the number of steps that the share grows over; the last one has it
      whole.
    shape: `linear`, or `sigmoid`, slow at both ends.
    predict: the `best` token, or a `sample` of the model's distribution.
  """

  share: float = 0.25
  start: int = 0
  steps: int = 1
  shape: Literal['linear', 'sigmoid'] = 'linear'
  predict: Literal['best', 'sample'] = 'best'

  kind: ClassVar[str] = 'scheduled'

  def __post_init__(self) -> None:
    field_checks.least(self, 'train.sampling.', start=0, steps=1)
    if not 0.0 < self.share <= 1.0:
      raise ValueError(f'train.sampling.share={self.share}; it is in (0, 1].')

  def share_at(self, step: jax.Array) -> jax.Array:
    """Returns the share at a step, from 0, a float32 scalar."""
    done = jnp.clip((step + 1 - self.start) / self.steps, 0.0, 1.0)
    if self.shape == 'sigmoid':
      # The logistic curve from -6 to 6, from exactly 0 to 1.
      low, high = jax.nn.sigmoid(-6.0), jax.nn.sigmoid(6.0)
      done = (jax.nn.sigmoid(12.0 * done - 6.0) - low) / (high - low)
    return self.share * done


def mix_in_predictions(
  config: ScheduledSampling,
  model: forward.Model,
  batch: dict[str, jax.Array],
  keys_B: jax.Array | None,
  execution: stack.Execution,
) -> jax.Array:
  """Returns the decoder's inputs, some of which are predictions, (B, T).

  Args:
    config: the share that is replaced, and by which predictions.
    model: an encoder-decoder.
    batch: its inputs, and `sampled_share` (B,).
    keys_B: random keys of the rows.
    execution: the way in which the first pass runs.
  """
  zigzag = execution.zigzag
  keys_B = dropout.fold(keys_B, _SITE)
  x_BTD, _ = forward.run(model, batch, keys_B=keys_B, execution=execution)
  head = model.head
  logits_BTV = head(model.leave(x_BTD, batch))
  if config.predict == 'sample':
    logits_BTV += _noise(keys_B, logits_BTV.shape[1:], 0, zigzag, _gumbel)
  predicted_BT = logits_BTV.argmax(-1)
  # What is predicted at a place is read at the next, wherever that lies.
  index_T = zigzag_lib.index(predicted_BT.shape[1], zigzag)
  place_T = index_T.argsort()
  before_T = place_T[(index_T - 1) % len(index_T)]
  inputs_BT = batch['inputs']
  draws_BT = _noise(keys_B, inputs_BT.shape[1:], 1, zigzag, jax.random.uniform)
  chosen_BT = draws_BT < batch['sampled_share'][:, None]
  # A target of no weight has nothing true to stand for, nor has a start.
  chosen_BT &= (batch['weights'] > 0) & (batch['positions'] > 0)
  predicted_BT = predicted_BT[:, before_T].astype(inputs_BT.dtype)
  return jax.lax.stop_gradient(jnp.where(chosen_BT, predicted_BT, inputs_BT))


def _gumbel(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  return jax.random.gumbel(key, shape, jnp.float32)


def _noise(
  keys_B: jax.Array | None,
  shape: tuple[int, ...],
  site: int,
  zigzag: int,
  draw: Callable[[jax.Array, tuple[int, ...]], jax.Array],
) -> jax.Array:
  """Draws for each row in the natural order of its tokens, then in its own."""
  keys_B = dropout.fold(keys_B, site)
  index_T = zigzag_lib.index(shape[0], zigzag)
  return jax.vmap(lambda key: draw(key, shape))(keys_B)[:, index_T]

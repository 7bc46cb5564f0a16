"""Evaluation of a model on a split: loss, perplexity, bits per byte."""

import collections
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
import math
from typing import Any

from flax import nnx
import jax

from t2x.data import config as data_config
from t2x.data import corpus as corpus_lib
from t2x.objectives import causal_lm

Batch = dict[str, Any]


def evaluate(
  eval_fn: Callable[..., dict[str, Any]],
  model: nnx.Module,
  batches: Iterable[Batch],
) -> dict[str, float]:
  """Returns token-weighted means over all batches.

  Args:
    eval_fn: `Program.evaluate`.
    model: the model to evaluate, the first argument of `eval_fn`.
    batches: global batches; empty rows weigh nothing.

  Returns:
    loss (nats a token), perplexity, accuracy, num_tokens; of other terms than
    the main one NAME_loss and NAME_accuracy, where there are targets of them. A
    split without a single target gives NaN.
  """
  sums, memory = collections.Counter(), None
  running = {}
  for batch in batches:
    # One at a time: nothing orders the exchanges of two that are under way, and
    # processes that take them in different orders wait for each other for ever.
    sums.update(_as_floats(running))
    running = eval_fn(model, batch, memory)
    memory = running.pop('memory', None)
  sums.update(_as_floats(running))
  names = [n.removesuffix('nll') for n in sums if f'_{n}'.endswith('_nll')]
  others = [name for name in names if name and sums[f'{name}weight']]
  loss, accuracy = (_mean(sums, '', what) for what in ('nll', 'accuracy'))
  result = {
    'loss': loss,
    'perplexity': math.exp(min(loss, 700.0)),
    'accuracy': accuracy,
    'num_tokens': float(sums['weight']),
  }
  if others and not sums['weight']:  # A task without the main term.
    result = {}
  for name in others:
    result[f'{name}loss'] = _mean(sums, name, 'nll')
    result[f'{name}accuracy'] = _mean(sums, name, 'accuracy')
  return result


def _mean(sums: Mapping[str, float], name: str, what: str) -> float:
  return sums[name + what] / (sums[f'{name}weight'] or math.nan)


def _as_floats(values: dict[str, jax.Array]) -> dict[str, float]:
  return {name: float(a) for name, a in jax.device_get(values).items()}


def bits_per_byte(
  metrics: dict[str, float],
  corpus: corpus_lib.Corpus,
  config: data_config.DataConfig,
  split: str,
) -> dict[str, float]:
  """Returns {'bits_per_byte': ...} where it is defined, else {}.

  The sum of the tokens' losses over the bytes of the text, which does not
  depend on the tokenizer: for causal models, over a whole split, packed so
  that every token is predicted.
  """
  causal = isinstance(config.objective, causal_lm.CausalLM)
  if not causal or not isinstance(config.batching, data_config.FULL):
    return {}
  num_bytes = corpus.num_bytes(split)
  nats = metrics['loss'] * metrics['num_tokens']
  return {'bits_per_byte': nats / math.log(2) / num_bytes}

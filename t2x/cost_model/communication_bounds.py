"""What a layout has to send, from the shapes of a model alone."""

from collections.abc import Mapping

from t2x.config import experiment
from t2x.parallel import sharding


def bytes_sent(config: experiment.Experiment, sizes: Mapping[str, int]) -> int:
  """Returns the bytes that each device sends in a step of a plain decoder.

  Counted as `collectives` does. In passes over weights: gradients are reduced
  once over `data` and `context` and once over `fsdp`, which gathers a layer
  for the forward and the backward pass and the head once; all that in the
  compute dtype, but for the gradient of the token table, in float32. Where
  `fsdp` splits that table the tokens' vectors are exchanged, and so are their
  gradients, if that is less than to gather it and to reduce its gradient. In
  activations: tensor parallelism sums four a layer and two outside; where it
  splits sequences too, each sum is a gather and a scatter; an all-to-all moves
  eight a layer. A ring of C devices sends its keys and values C - 1 times
  forward and C - 1 times backward, with their gradients C times, and segments
  once for all layers.

  Args:
    config: with an untied head, a plain MLP, as many key/value heads as query
      heads, and one microbatch.
    sizes: of the mesh axes.
  """
  model, c = config.model, 2 if config.model.dtype == 'bfloat16' else 4
  D, L = model.embed_dim, model.num_layers
  layers = L * (4 * D * D + 2 * D * model.mlp.hidden)
  table = model.vocab_size * D
  norms = 4 * (2 * L + 1) * D
  f, t, C = sizes['fsdp'], sizes['tensor'], sizes['context']
  rows = config.data.batch_size // (sizes['data'] * f)
  tokens = rows * config.data.length // C
  activation = c * tokens * D
  weights, head = c * layers // t, c * table // t
  # Ids of tokens and their vectors there and back, or the table and its sums.
  exchange = 4 * tokens * f + 2 * activation
  total = 0
  if f > 1:
    total += 3 * weights + 2 * head + norms
    gather = (c + 4) * table // t
    total += exchange if 2 * activation < gather else gather
  if sizes['data'] * C > 1:
    gradients = weights + head + 4 * table // t
    total += gradients // f + (norms if f == 1 else 0)
  if t > 1:
    fine = 'tensor' in sharding.mesh_axes(config.rules.norm_length)
    total += activation * (8 * L + 4 if fine else 4 * L + 2)
  if C > 1 and config.rules.context_attention == 'all_to_all':
    total += 8 * L * activation
  elif C > 1:
    total += L * (3 * C - 2) * 2 * activation + (C - 1) * 4 * tokens
  return total

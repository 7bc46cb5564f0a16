"""A formula for the bytes that a layout has to send, for plain decoders."""

from collections.abc import Mapping

from t2x.config import experiment
from t2x.parallel import sharding


def bytes_sent(config: experiment.Experiment, sizes: Mapping[str, int]) -> int:
  """Returns the bytes that each device sends in a step of a plain decoder.

  Bytes are those of `hlo.collectives`.

  Weights: gradients are reduced once over `data` and `context` and once over
  `fsdp`. Over `fsdp` each layer is gathered twice, for the forward and for the
  backward pass, and the head once. All of these are in the compute dtype; only
  the gradient of the token table is in float32. Where `fsdp` splits that table,
  devices either gather it and reduce its gradient, or exchange the vectors of
  their tokens and the gradients of those; the formula takes the smaller.

  Activations: tensor parallelism sums four arrays in each layer and two outside
  the layers; where it splits sequences too, each sum is a gather and a scatter.
  An all-to-all moves eight arrays in each layer. A ring of C devices sends keys
  and values C - 1 times forward and C - 1 times backward, their gradients C
  times, and segments once for all layers.

  Args:
    config: an experiment whose decoder has an untied head, a plain MLP and as
      many key/value heads as query heads, with one microbatch a step.
    sizes: number of devices along each mesh axis.
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

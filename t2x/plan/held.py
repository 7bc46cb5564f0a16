"""What fills one device's memory in a step, from shapes alone.

Arguments are there all along. Of the rest, the fullest of three moments counts:
in the head, when all that the backward pass needs is kept and the logits are
there; in the last layer's backward pass; and in the optimizer.

What a layer keeps is what JAX keeps of it for each `train.remat`, as read from
jaxprs: without remat norms keep three float32 arrays, an activation function
all its steps.
"""

import dataclasses
import itertools
import math

from t2x.attention import blocks
from t2x.layers import moe
from t2x.plan import executed
from t2x.plan import local as local_lib
from t2x.plan import staged

LANES, SUBLANES = 128, 8  # Of a tile, in which a TPU lays out arrays.

# Arrays of a layer's backward pass that are there at once, counted in compiled
# programs: of the feed-forward width (up, gate and hidden with two gradients,
# or up and a gradient), and of the embedding width (queries, keys, values,
# attention's output, the stream, their gradients and copies in other layouts).
GATED_HIDDEN, PLAIN_HIDDEN, EMBEDDED = 5, 2, 12
# The compiler's heap has holes, by what comes and goes in it: what it reserves
# for temporaries over what is there at the fullest moment, as a share of that
# without what is kept from the forward pass.
HOLES = 0.42


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moment:
  """What is there besides the arguments.

  Attributes:
    name: when.
    parts: name -> bytes.
  """

  name: str
  parts: dict[str, float]

  @property
  def bytes(self) -> float:
    return sum(self.parts.values())


def reserved(moment: Moment) -> float:
  """Returns what a compiler reserves for a moment, holes included."""
  passing = moment.bytes - moment.parts.get('activations', 0.0)
  return moment.bytes + HOLES * passing


def moments(local: local_lib.Local) -> list[Moment]:
  """Returns what is there in the head, a layer's backward pass, the end."""
  table = _tables(local)
  if local.plan is not None:
    return _of_stage(local, table)
  kept = _kept(local)
  logits = _logits(local)
  tied = local.config.model.tied_head != 'untied'
  # A tied table's gradient is made where that of the lookup is, at the end.
  waits = (
    {'logits': logits}
    if tied and local.config.train.accumulate == 1
    else {"head table's gradient": table['gradient']}
  )
  sums = _sums(local)
  head = {
    **kept,
    **sums,
    'logits': logits,
    'head table': table['gathered'],
    "head table's gradient": table['gradient'],
    'layer': 2 * local.itemsize * local.tokens * _width(local),
  }
  backward = {
    **kept,
    **sums,
    **waits,
    'gradients': _gradients(local),
    'weights of a layer': _gathered(local),
    'layer': max(working_set(local, layer) for layer in local.layers),
  }
  optimizer = {
    **sums,
    'gradients': _gradients(local),
    'optimizer': 2 * _gradients(local),
    "head table's gradient": table['gradient'],
  }
  return [
    Moment(name='head', parts=head),
    Moment(name='backward', parts=backward),
    Moment(name='optimizer', parts=optimizer),
  ]


def _of_stage(local: local_lib.Local, table: dict[str, float]) -> list[Moment]:
  between = staged.between_ticks(local)
  head = {
    **between,
    'logits': _logits(local),
    'head table': table['gathered'],
    "head table's gradient": table['gradient'],
  }
  work = max(working_set(local, layer) for layer in local.layers)
  gathered = 0.0 if local.config.pipeline.gather == 'once' else _gathered(local)
  layer = {**between, 'layer': work, 'weights of a layer': gathered}
  return [Moment(name='head', parts=head), Moment(name='layer', parts=layer)]


def _width(local) -> int:
  return local.config.model.embed_dim


# --- What is kept from the forward to the backward pass. ---


def _kept(local: local_lib.Local) -> dict[str, float]:
  activations = sum(
    layer.num * residuals(local, layer) for layer in local.layers
  )
  return {
    'activations': activations,
    'copies of weights': _copies(local),
  }


def _copies(local: local_lib.Local) -> float:
  """Weights in the dtype of the products, laid out as their shape is."""
  if local.itemsize == 4:
    return 0.0
  cast = [w for w in local.weights if w.cast]
  return sum(padded(w.shape, local.itemsize, as_given=True) for w in cast)


def residuals(local: local_lib.Local, layer: local_lib.Layer) -> float:
  """Returns the bytes that a layer keeps of one microbatch."""
  remat, c = local.config.train.remat, local.itemsize
  D = local.config.model.embed_dim
  whole = local.rows * layer.queries
  between = whole / local.over('norm_length')
  tokens = whole / local.over('length')
  if remat == 'none':
    return _all_residuals(local, layer, tokens, between)
  kept = c * between * D + _choice(local, layer)
  names = remat.partition(':')[2].split(',')
  if remat == 'dots':
    names = ['query', 'key', 'value', 'output', 'mlp_up', 'mlp_gate', 'router']
    if isinstance(layer.mlp, moe.MoeConfig):
      names.append('mlp_down')
  sizes = _sizes(local, layer, tokens)
  for name in names:
    kept += sizes.get(name, 0.0) + sizes.get(f'cross_{name}', 0.0)
  return kept


def _sizes(local, layer, tokens: float) -> dict[str, float]:
  """Bytes of what a layer's products make, by name."""
  kind, c, D = layer.kind, local.itemsize, local.config.model.embed_dim
  H = kind.head_dim
  N = kind.num_heads / local.over('heads')
  K = kind.kv_heads / local.over('kv_heads')
  source = local.rows * (layer.encoded or 0) / local.over('length')
  sizes = {
    'query': c * tokens * N * H,
    'key': c * tokens * K * H,
    'value': c * tokens * K * H,
    'attention': c * tokens * N * H + 4 * tokens * N,
    'output': c * tokens * D,
  }
  if layer.encoded is not None:
    sizes |= {f'cross_{n}': sizes[n] for n in ('query', 'attention', 'output')}
    sizes |= {f'cross_{n}': c * source * K * H for n in ('key', 'value')}
  hidden = layer.mlp.hidden / local.over('mlp')
  used = tokens
  if isinstance(layer.mlp, moe.MoeConfig):
    used = _used(local, layer)
    sizes['router'] = 4 * tokens * layer.mlp.num_experts
    sizes['mlp_down'] = c * used * D
  sizes['mlp_up'] = c * used * hidden
  if layer.mlp.gated:
    sizes['mlp_gate'] = sizes['mlp_up']
  return sizes


def _used(local, layer) -> float:
  """Rows of the experts' products."""
  if layer.mlp.router.capacity:
    return executed.slots(local, layer)
  return executed.used_choices(local, layer)


def _choice(local, layer) -> float:
  """The router's choice, which no backward pass makes again."""
  if not isinstance(layer.mlp, moe.MoeConfig):
    return 0.0
  if layer.mlp.router.capacity:
    slots = executed.slots_of_expert(layer) * layer.mlp.num_experts
    return 4 * local.rows * slots
  return 4 * local.rows * layer.queries * layer.mlp.experts_of_token


def _all_residuals(local, layer, tokens: float, between: float) -> float:
  """Without remat: all that any gradient reads."""
  c, D = local.itemsize, local.config.model.embed_dim
  residual = local.config.model.residual
  sizes = _sizes(local, layer, tokens)
  cross = layer.encoded is not None
  norms = 1 if residual == 'parallel' else 2 + cross
  # The input in float32, twice more on its way, and the output.
  kept = norms * (12 * between * D + c * tokens * D)
  kept += _attention_residuals(local, layer, sizes, False)
  kept += _attention_residuals(local, layer, sizes, True) if cross else 0.0
  steps = _steps(layer.mlp)
  kept += steps * sizes['mlp_up']
  if isinstance(layer.mlp, moe.MoeConfig):
    # Dispatched rows, what comes back in float32, and gathered experts.
    used = _used(local, layer)
    kept += (c + 4) * used * D + 4 * tokens * D + _choice(local, layer)
    kept += _experts(local, layer)
  return kept


def _steps(mlp: moe.FeedForwardConfig) -> int:
  """Arrays of the hidden width that gradients read."""
  return {'relu': 2, 'silu': 4, 'gelu': 4, 'gelu_tanh': 6}[mlp.activation] + (
    2 * mlp.gated
  )


def _attention_residuals(local, layer, sizes, cross: bool) -> float:
  prefix = 'cross_' if cross else ''
  query, attention = sizes[f'{prefix}query'], sizes[f'{prefix}attention']
  kept = query + 2 * sizes[f'{prefix}key'] + attention + query
  chosen = executed.way(local, layer, cross)
  keys = layer.encoded if cross else layer.queries
  if chosen == 'blocks' and keys <= blocks.KEEP_KEYS:
    # Probabilities in float32 and as they are used, and the output as it was.
    heads = layer.kind.num_heads / local.over('heads')
    pairs = executed.pairs(local, layer, cross)
    kept += (4 + local.itemsize) * local.rows * heads * pairs
    kept += 4 / local.itemsize * query
  return kept


def _experts(local, layer) -> float:
  """Experts of a layer as they are used, whole."""
  return local.itemsize * sum(
    w.used / _num_stacked(local) for w in local.weights if 'experts' in w.axes
  )


def _num_stacked(local) -> int:
  return max(1, sum(layer.num for layer in local.layers))


# --- Weights and their gradients. ---


def _split(local, weight) -> int:
  return local.over('embed') if 'embed' in weight.axes else 1


def _gradients(local) -> float:
  """Of the layers' weights, as devices keep them."""
  return sum(
    padded(w.shape, local.itemsize if w.cast else 4)
    for w in local.weights
    if w.in_layers
  )


def _sums(local) -> dict[str, float]:
  """Gradients are summed over microbatches in float32."""
  if local.config.train.accumulate == 1:
    return {}
  whole = local.config.train.accumulate_whole
  kept = sum(w.used / (1 if whole else _split(local, w)) for w in local.weights)
  return {'sums of gradients': 4 * kept}


def _gathered(local) -> float:
  """The weights of one layer as products use them."""
  if local.over('embed') == 1:
    return 0.0
  used = sum(w.used for w in local.weights if w.in_layers and w.cast)
  return local.itemsize * used / _num_stacked(local)


def _tables(local) -> dict[str, float]:
  """The head's table, gathered, and its gradient before it is reduced."""
  size = local.vocab * _width(local)
  loss = local.config.train.loss
  chunked = loss.token_chunks * loss.vocab_chunks > 1
  gathered = local.itemsize * size
  return {
    'gathered': gathered,
    'gradient': (4 if chunked else local.itemsize) * size,
  }


def _logits(local) -> float:
  """Float32, of one chunk; their gradient takes their place."""
  loss = local.config.train.loss
  chunks = loss.token_chunks * loss.vocab_chunks
  return 4 * local.tokens * local.vocab / chunks


def working_set(local, layer) -> float:
  """Returns the bytes of a layer's backward pass, what is kept left out."""
  c, D = local.itemsize, local.config.model.embed_dim
  tokens = local.rows * layer.queries / local.over('length')
  hidden = layer.mlp.hidden / local.over('mlp')
  rows = _used(local, layer) if isinstance(layer.mlp, moe.MoeConfig) else tokens
  times = GATED_HIDDEN if layer.mlp.gated else PLAIN_HIDDEN
  return c * (times * rows * hidden + EMBEDDED * tokens * D)


# --- Layouts. ---


def padded(
  shape: tuple[int, ...], itemsize: int, *, as_given: bool = False
) -> int:
  """Returns the bytes of an array as a TPU lays it out.

  Its two minor dimensions come in tiles of 8 x 128. The compiler takes those
  that fill them best, of arguments at least.

  Args:
    shape: of the array.
    itemsize: bytes of a number.
    as_given: the last two dimensions are the minor ones.
  """
  if len(shape) < 2:
    tile = LANES * SUBLANES if shape else LANES
    return itemsize * _up(math.prod(shape), tile)
  pairs = [(shape[-1], shape[-2])]
  if not as_given:
    pairs = itertools.permutations(shape, 2)
  return itemsize * min(_tiled(shape, *pair) for pair in pairs)


def _tiled(shape: tuple[int, ...], lanes: int, rows: int) -> int:
  tall = min(SUBLANES, 1 << (rows - 1).bit_length())
  whole = math.prod(shape)
  return whole // (lanes * rows) * _up(lanes, LANES) * _up(rows, tall)


def _up(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple

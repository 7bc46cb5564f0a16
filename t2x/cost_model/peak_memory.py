"""What fills one device's memory in a step, from shapes alone.

Arguments are there all along. Of the rest, the fullest of three moments counts:
in the head, when all that the backward pass needs is kept and the logits are
there; in the last layer's backward pass; and in the optimizer.
"""

import dataclasses

from t2x.cost_model import device_share
from t2x.cost_model import residuals
from t2x.cost_model import stage_memory
from t2x.cost_model import tpu_tiles
from t2x.layers import moe

# Arrays of a layer's backward pass that are there at once, counted in compiled
# programs: of the feed-forward width (up, gate and hidden with two gradients,
# or up and a gradient), of all heads (queries, keys, values, attention's output
# and a copy), and of the embedding width, within layers and between them.
GATED_HIDDEN, PLAIN_HIDDEN, HEADS, WITHIN, BETWEEN = 5, 2, 5, 3, 4
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


def moments(local: device_share.Local) -> list[Moment]:
  """Returns what is there in the head, a layer's backward pass, the end."""
  table = _tables(local)
  if local.plan is not None:
    return _of_stage(local, table)
  kept = _kept(local)
  logits = _logits(local)
  tied = local.config.model.tied_head != 'untied'
  # Where `fsdp` reduces it, a tied table's gradient is made at the end, with
  # that of the lookup.
  waits = (
    {'logits': logits}
    if tied and local.over('embed') > 1 and local.config.train.accumulate == 1
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


def _of_stage(
  local: device_share.Local, table: dict[str, float]
) -> list[Moment]:
  between = stage_memory.between_ticks(local)
  head = {
    **between,
    'logits': _logits(local),
    'head table': table['gathered'],
    "head table's gradient": table['gradient'],
  }
  work = max(working_set(local, layer) for layer in local.layers)
  gathered = 0.0 if local.config.pipeline.gather == 'once' else _gathered(local)
  layer = {**between, 'layer': work, 'weights of a layer': gathered}
  # Buffers of all ticks are there before the first and after the last.
  move = {**between, 'gradients that move': stage_memory.on_the_move(local)}
  return [
    Moment(name='head', parts=head),
    Moment(name='layer', parts=layer),
    Moment(name='between stages', parts=move),
  ]


def _width(local) -> int:
  return local.config.model.embed_dim


def _kept(local: device_share.Local) -> dict[str, float]:
  activations = sum(
    layer.num * residuals.of_layer(local, layer) for layer in local.layers
  )
  return {
    'activations': activations,
    'copies of weights': _copies(local),
  }


def _copies(local: device_share.Local) -> float:
  """Weights in the dtype of the products."""
  if local.itemsize == 4:
    return 0.0
  cast = [w for w in local.weights if w.cast]
  return sum(tpu_tiles.padded(w.shape, local.itemsize) for w in cast)


# --- Weights and their gradients. ---


def _gradients(local) -> float:
  """Of the layers' weights, as devices keep them."""
  return sum(
    tpu_tiles.padded(w.shape, local.itemsize if w.cast else 4)
    for w in local.weights
    if w.in_layers
  )


def _sums(local) -> dict[str, float]:
  """Gradients are summed over microbatches in float32."""
  if local.config.train.accumulate == 1:
    return {}
  whole = local.config.train.accumulate_whole
  kept = sum(w.used / (1 if whole else local.split(w)) for w in local.weights)
  return {'sums of gradients': 4 * kept}


def _gathered(local) -> float:
  """The weights of one layer as products use them."""
  if local.over('embed') == 1:
    return 0.0
  used = sum(w.used for w in local.weights if w.in_layers and w.cast)
  return local.itemsize * used / local.num_layers


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
  return 4 * local.targets * local.vocab / chunks


def working_set(local, layer) -> float:
  """Returns the bytes of a layer's backward pass, what is kept left out."""
  c, D = local.itemsize, local.config.model.embed_dim
  tokens = local.rows * layer.queries / local.over('length')
  hidden = layer.mlp.hidden / local.over('mlp')
  rows = (
    residuals.used_rows(local, layer)
    if isinstance(layer.mlp, moe.MoeConfig)
    else tokens
  )
  times = GATED_HIDDEN if layer.mlp.gated else PLAIN_HIDDEN
  heads = layer.kind.num_heads * layer.kind.head_dim / local.over('heads')
  between = local.rows * layer.queries / local.over('norm_length')
  return c * (
    times * rows * hidden
    + HEADS * tokens * heads
    + (WITHIN * tokens + BETWEEN * between) * D
  )

"""Estimates the peak of one device's temporary memory, from shapes alone.

The arguments of a step take memory from its start to its end. On top comes the
largest of three points of the step: in the head, when everything that the
backward pass needs is kept and the logits are computed; in the backward pass of
the last layer; and in the optimizer.
"""

import dataclasses

from t2x.cost_model import device_share
from t2x.cost_model import residuals
from t2x.cost_model import stage_memory
from t2x.cost_model import tpu_tiles
from t2x.layers import moe

# Arrays of a layer's backward pass that are live at once, counted in compiled
# programs: of the feed-forward width (up, gate and hidden with two gradients,
# or up and a gradient), of all heads (queries, keys, values, attention's output
# and a copy), and of the embedding width, within layers and between them.
GATED_HIDDEN, PLAIN_HIDDEN, HEADS, WITHIN, BETWEEN = 5, 2, 5, 3, 4
# Fragmentation of the compiler's heap: the bytes that it reserves beyond the
# live ones, over the live bytes that are not activations kept for the backward
# pass.
HOLES = 0.42


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
  """Temporary memory at one point of a step, without the arguments.

  Attributes:
    name: point of the step: 'head', 'backward', 'optimizer', 'layer' or
      'between stages'.
    parts: bytes by what they hold.
  """

  name: str
  parts: dict[str, float]

  @property
  def bytes(self) -> float:
    """Bytes of all parts."""
    return sum(self.parts.values())


def reserved(phase: Phase) -> float:
  """Returns the bytes that a compiler reserves, fragmentation included."""
  transient = phase.bytes - phase.parts.get('activations', 0.0)
  return phase.bytes + HOLES * transient


def phases(local: device_share.DeviceShare) -> list[Phase]:
  """Returns the temporary memory at the points of a step that can be its peak.

  With stages, these are the head, a layer, and the time between two ticks.
  """
  table = _tables(local)
  if local.plan is not None:
    return _of_stage(local, table)
  kept = _kept(local)
  logits = _logits(local)
  tied = local.config.model.tied_head != 'untied'
  # Where `fsdp` reduces it, a tied table's gradient is computed at the end,
  # with that of the lookup; until then the gradient of the logits is kept.
  pending = (
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
    **pending,
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
    Phase(name='head', parts=head),
    Phase(name='backward', parts=backward),
    Phase(name='optimizer', parts=optimizer),
  ]


def _of_stage(
  local: device_share.DeviceShare, table: dict[str, float]
) -> list[Phase]:
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
  # Buffers of all ticks are live before the first and after the last.
  move = {**between, 'gradients that move': stage_memory.on_the_move(local)}
  return [
    Phase(name='head', parts=head),
    Phase(name='layer', parts=layer),
    Phase(name='between stages', parts=move),
  ]


def _width(local: device_share.DeviceShare) -> int:
  return local.config.model.embed_dim


def _kept(local: device_share.DeviceShare) -> dict[str, float]:
  """Returns the bytes kept from the forward pass for the backward pass."""
  activations = sum(
    layer.num * residuals.of_layer(local, layer) for layer in local.layers
  )
  return {
    'activations': activations,
    'copies of weights': _copies(local),
  }


def _copies(local: device_share.DeviceShare) -> float:
  """Returns the bytes of copies of the weights in the dtype of the products."""
  if local.itemsize == 4:
    return 0.0
  cast = [w for w in local.weights if w.cast]
  return sum(tpu_tiles.padded(w.shape, local.itemsize) for w in cast)


# --- Weights and their gradients. ---


def _gradients(local: device_share.DeviceShare) -> float:
  """Returns the bytes of the gradients of the layers' weights, sharded."""
  return sum(
    tpu_tiles.padded(w.shape, local.itemsize if w.cast else 4)
    for w in local.weights
    if w.in_layers
  )


def _sums(local: device_share.DeviceShare) -> dict[str, float]:
  """Returns the bytes of gradients summed over microbatches, in float32."""
  if local.config.train.accumulate == 1:
    return {}
  whole = local.config.train.accumulate_whole
  kept = sum(w.used / (1 if whole else local.split(w)) for w in local.weights)
  return {'sums of gradients': 4 * kept}


def _gathered(local: device_share.DeviceShare) -> float:
  """Returns the bytes of one layer's weights, gathered over `fsdp`."""
  if local.over('embed') == 1:
    return 0.0
  used = sum(w.used for w in local.weights if w.in_layers and w.cast)
  return local.itemsize * used / local.num_layers


def _tables(local: device_share.DeviceShare) -> dict[str, float]:
  """Returns the bytes of the head's table and of its gradient.

  The table is gathered, and the gradient is not yet reduced.
  """
  size = local.vocab * _width(local)
  loss = local.config.train.loss
  chunked = loss.token_chunks * loss.vocab_chunks > 1
  gathered = local.itemsize * size
  return {
    'gathered': gathered,
    'gradient': (4 if chunked else local.itemsize) * size,
  }


def _logits(local: device_share.DeviceShare) -> float:
  """Returns the bytes of one chunk of logits, float32.

  Their gradient is written in their place.
  """
  loss = local.config.train.loss
  chunks = loss.token_chunks * loss.vocab_chunks
  return 4 * local.targets * local.vocab / chunks


def working_set(
  local: device_share.DeviceShare, layer: device_share.Layer
) -> float:
  """Returns the bytes of a layer's backward pass, without kept activations."""
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

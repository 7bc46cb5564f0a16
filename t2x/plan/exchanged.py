"""Bytes that one device exchanges in a step, from shapes alone.

Counted as `collectives` counts: what an all-gather returns, and what the others
are given. Weights are gathered over `fsdp` for the forward and the backward
pass, and their gradients reduced; gradients of what devices have each are
summed over the axes that split tokens; activations are summed over `tensor`.
What `train.remat` makes again is sent again, too.
"""

from collections.abc import Iterator
import dataclasses

from t2x import sharding
from t2x.layers import moe
from t2x.plan import executed
from t2x.plan import local as local_lib

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
  """Bytes of a step.

  Attributes:
    part: what for.
    kind: as the program asks for it; a compiler may turn a reduce-scatter or
      an all-gather into permutes beside the product.
    axes: mesh axes along which they move.
    bytes: in a step, on one device.
  """

  part: str
  kind: str
  axes: Axes
  bytes: float


def messages(local: local_lib.Local) -> list[Message]:
  """Returns all that a device exchanges, but for scalars."""
  found = [*_of_weights(local), *_of_tables(local)]
  for layer in local.layers:
    found += _of_layer(local, layer)
  if local.plan is not None:
    found += _of_stages(local)
  return [m for m in found if m.bytes and local.size(m.axes) > 1]


def total(
  found: list[Message], kind: str | None = None, axis: str | None = None
) -> float:
  """Returns the bytes of all, of a kind, or along an axis."""
  return sum(
    m.bytes
    for m in found
    if kind in (None, m.kind) and (axis is None or axis in m.axes)
  )


# --- Weights. ---


def _of_weights(local: local_lib.Local) -> Iterator[Message]:
  """Gathers of what `embed` splits, and reductions of gradients."""
  config = local.config
  c = local.itemsize
  reduced = 4 if config.rules.reduce_dtype == 'float32' else c
  staged = local.plan is not None
  batch = local.axes('batch', 'length')
  # Stages gather a layer once a step, or for every visit.
  once = staged and config.pipeline.gather == 'once'
  whole = config.train.accumulate_whole and config.train.accumulate > 1
  for weight in local.weights:
    if not weight.in_layers:
      continue
    split = tuple(
      a for a in local.axes('embed') if 'embed' in weight.axes
    )
    own = _own_axes(local, weight)
    rest = tuple(a for a in batch if a not in (*split, *own))
    size = reduced if weight.cast or len(weight.axes) > 2 else 4
    if split:
      times = 1 if once or whole else local.num_microbatches
      visits = 1 if once or whole else _visits(local, weight)
      yield Message(
        part='gathers of weights',
        kind='all-gather',
        axes=split,
        bytes=visits * c * weight.used,
      )
      yield Message(
        part='reductions of gradients',
        kind='reduce-scatter',
        axes=split,
        bytes=times * size * weight.used * _windowed(local, split),
      )
    yield from _reduced(local, weight, rest, split, size)


def _windowed(local: local_lib.Local, split: Axes) -> float:
  """A reduce-scatter beside its product is passed on once more than needed."""
  num = local.size(split)
  return (num + 1) / num


def _visits(local: local_lib.Local, weight: local_lib.Weight) -> float:
  """How often a weight is gathered: forward and backward."""
  if local.plan is None:
    return 2 * local.num_microbatches
  again = local.plan.table.recompute
  return (2 + again) * local.num_microbatches


def _own_axes(local: local_lib.Local, weight: local_lib.Weight) -> Axes:
  """Axes along which devices have other experts."""
  return local.axes('experts') if 'experts' in weight.axes else ()


def _reduced(local, weight, rest: Axes, split: Axes, size: int):
  """Sums over axes that split tokens and not the weight."""
  late = tuple(a for a in rest if a in local.by_hand)
  early = tuple(a for a in rest if a not in late)
  kept = weight.used / local.size(split)
  yield Message(
    part='reductions of gradients',
    kind='all-reduce',
    axes=early,
    bytes=(1 if local.plan else local.num_microbatches) * size * kept,
  )
  # What is summed over microbatches is float32.
  yield Message(
    part='reductions of gradients',
    kind='all-reduce',
    axes=late,
    bytes=(size if local.num_microbatches == 1 or local.plan else 4) * kept,
  )


# --- Tables. ---


def _of_tables(local: local_lib.Local) -> Iterator[Message]:
  """Token vectors, and the head."""
  config, c = local.config, local.itemsize
  D, V, tokens = config.model.embed_dim, local.vocab, local.tokens
  times = local.num_microbatches
  embed, batch = local.axes('embed'), local.axes('batch', 'length')
  vocab, rest = local.axes('vocab'), tuple(a for a in batch if a not in embed)
  late = tuple(a for a in rest if a in local.by_hand)
  early = tuple(a for a in rest if a not in late)
  say = lambda part, kind, axes, size: Message(
    part=part, kind=kind, axes=axes, bytes=size
  )
  activation = c * tokens * D
  for source in _looked_up(local):
    size = c * local.rows * source * D / local.over('length')
    if exchanged(local):
      yield say('embeddings', 'all-to-all', embed, 2 * times * size)
      yield say('embeddings', 'all-reduce', vocab, times * size)
    else:
      yield say('embeddings', 'all-gather', embed, times * c * V * D)
      yield say('embeddings', 'reduce-scatter', embed, times * 4 * V * D)
      yield say('embeddings', 'all-reduce', vocab, times * size)
  yield say(
    'embeddings', 'all-reduce', early, times * 4 * V * D / local.size(embed)
  )
  yield say('head', 'all-gather', embed, times * c * V * D)
  yield say('head', 'reduce-scatter', embed, times * c * V * D)
  yield say('head', 'all-reduce', early, times * c * V * D / local.size(embed))
  yield say('head', 'all-reduce', vocab, times * activation)
  tables = [w for w in local.weights if not w.in_layers and 'vocab' in w.axes]
  if late:
    kept = sum(w.used for w in tables) / local.size(embed)
    yield say('reductions of gradients', 'all-reduce', late, 4 * kept)


def _looked_up(local: local_lib.Local) -> list[int]:
  """Lengths of the rows that are looked up."""
  data = local.config.data
  return [local.length] + [data.length] * data.objective.has_encoder


def exchanged(local: local_lib.Local) -> bool:
  """Whether token vectors travel and not the table; see `Embed`."""
  embed, c = local.axes('embed'), local.itemsize
  rows = local.axes('batch')
  if not embed or not {*embed} <= {*rows} - {*local.by_hand}:
    return False
  if local.plan is not None:
    return False
  return 2 * local.tokens * c < local.vocab * (c + 4)


# --- Activations. ---


def _of_layer(
  local: local_lib.Local, layer: local_lib.Layer
) -> Iterator[Message]:
  D, c = local.config.model.embed_dim, local.itemsize
  num = executed.passes(local, layer)
  tokens = local.rows * layer.queries / local.over('length')
  size = c * tokens * D
  yield from _of_tensor(local, layer, num, size)
  yield from _of_bias(local, layer, num)
  if local.over('length') > 1:
    yield from _of_context(local, layer, num, tokens)
  if isinstance(layer.mlp, moe.MoeConfig):
    yield from _of_experts(local, layer, num)


def _of_tensor(local, layer, num, size: float) -> Iterator[Message]:
  """Each branch sums its output, and the gradient of its input."""
  again = executed.made_again(local, layer)
  parallel = local.config.model.residual == 'parallel'
  fine = tuple(
    a for a in local.axes('norm_length') if a not in local.axes('length')
  )
  branches = [('heads', 'output'), ('mlp', 'mlp_down')]
  if layer.encoded is not None:
    branches.append(('heads', 'cross_output'))
  for axis, name in branches:
    axes = local.axes(axis)
    if axis == 'mlp' and isinstance(layer.mlp, moe.MoeConfig):
      axes = tuple(a for a in axes if a not in local.axes('batch'))
    if not axes and not fine:
      continue
    repeats = num['made again'] if name in again else 0
    if fine:
      into = num['forward'] + num['backward']
      into += num['made again'] if again else 0
      out = num['forward'] + repeats + num['backward']
      yield Message(
        part='sums of activations',
        kind='all-gather',
        axes=fine,
        bytes=into * size,
      )
      yield Message(
        part='sums of activations',
        kind='reduce-scatter',
        axes=fine,
        bytes=out * size,
      )
      continue
    if parallel and axis == 'mlp':
      continue  # Both branches are summed at once.
    yield Message(
      part='sums of activations',
      kind='all-reduce',
      axes=axes,
      bytes=(num['forward'] + repeats + num['backward']) * size,
    )


def _of_bias(local, layer, num) -> Iterator[Message]:
  """The gradient of a bias on the scores, of every head and pair, float32."""
  if not local.has_bias:
    return
  rows = tuple(a for a in local.axes('batch') if a not in local.by_hand)
  heads = layer.kind.num_heads / local.over('heads')
  size = 4 * heads * executed.pairs(local, layer, False)
  yield Message(
    part='attention',
    kind='all-reduce',
    axes=rows,
    bytes=num['backward'] * size,
  )


def _of_context(local, layer, num, tokens: float) -> Iterator[Message]:
  """Keys and values in a ring, or heads against sequence."""
  kind, c = layer.kind, local.itemsize
  C, axes = local.over('length'), local.axes('length')
  heads = kind.num_heads / local.over('heads')
  own = kind.kv_heads / local.over('kv_heads')
  again = 'scores' in executed.made_again(local, layer)
  repeats = num['made again'] if again else 0
  if local.config.rules.context_attention == 'all_to_all':
    copied = max(own, C)
    size = c * tokens * kind.head_dim * 2 * (heads + copied)
    yield Message(
      part='attention',
      kind='all-to-all',
      axes=axes,
      bytes=(num['forward'] + repeats + num['backward']) * size,
    )
    return
  size = 2 * c * tokens * kind.head_dim * own
  hops = (C - 1) * (num['forward'] + repeats) + (2 * C - 1) * num['backward']
  yield Message(
    part='attention', kind='collective-permute', axes=axes, bytes=hops * size
  )


def _of_experts(local, layer, num) -> Iterator[Message]:
  """Slots travel to their experts and back, and so do their gradients."""
  moved = tuple(a for a in local.axes('experts') if a in local.axes('batch'))
  D, c = local.config.model.embed_dim, local.itemsize
  again = 'mlp_down' in executed.made_again(local, layer)
  passes = num['forward'] + num['backward'] + again * num['made again']
  if layer.mlp.router.capacity:
    size = c * executed.slots(local, layer) * D
    yield Message(
      part='experts', kind='all-to-all', axes=moved, bytes=2 * passes * size
    )
    return
  tokens = local.rows * layer.queries / local.over('length')
  size = c * tokens * D * local.size(moved)
  for kind in ('all-gather', 'reduce-scatter'):
    yield Message(part='experts', kind=kind, axes=moved, bytes=passes * size)


# --- Stages. ---


def _of_stages(local: local_lib.Local) -> Iterator[Message]:
  """Messages to neighbours; weights that move once a step, and shared ones."""
  plan = local.plan
  assert plan is not None
  told, data = plan.told, local.config.data
  c, D = local.itemsize, local.config.model.embed_dim
  lengths = sum(_looked_up(local))
  state = c * local.rows * lengths * D / local.over('length')
  pipe = (sharding.PIPE,)
  ticks = int(told.sends_down_T.sum() + told.sends_up_T.sum())
  yield Message(
    part='messages of stages',
    kind='collective-permute',
    axes=pipe,
    bytes=local.config.train.accumulate * ticks * state,
  )
  del data
  for weight in local.weights:
    if weight.in_layers:
      if not plan.place.is_contiguous:
        # As they are kept, float32, and their gradients.
        kept = weight.used / local.size(
          local.axes('embed') if 'embed' in weight.axes else ()
        )
        yield Message(
          part='weights of stages',
          kind='all-to-all',
          axes=pipe,
          bytes=2 * 4 * kept,
        )
      continue
    split = local.axes('embed') if 'embed' in weight.axes else ()
    kept = 4 * weight.used / local.size(split)
    yield Message(
      part='weights of stages', kind='all-gather', axes=pipe, bytes=kept
    )
    yield Message(
      part='weights of stages', kind='all-reduce', axes=pipe, bytes=kept
    )

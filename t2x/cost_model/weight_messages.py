"""Estimates the bytes of weights and gradients that devices exchange."""

from collections.abc import Iterator

from t2x.cost_model import device_share
from t2x.cost_model import message
from t2x.cost_model import weight_shards
from t2x.parallel import sharding


def of_layers(local: device_share.DeviceShare) -> Iterator[message.Message]:
  """Yields the gathers of layers' weights and reductions of their gradients."""
  config = local.config
  c = local.itemsize
  reduced = 4 if config.rules.reduce_dtype == 'float32' else c
  staged = local.plan is not None
  batch = local.axes('batch', 'length')
  # Stages gather a layer once a step, or each time that they run it.
  once = staged and config.pipeline.gather == 'once'
  # Weights are gathered before all microbatches, and reduced after them.
  whole = {*local.axes('embed')} <= {*local.by_hand}
  for weight in local.weights:
    if not weight.in_layers:
      continue
    split = tuple(a for a in local.axes('embed') if 'embed' in weight.axes)
    experts = _expert_axes(local, weight)
    rest = tuple(a for a in batch if a not in (*split, *experts))
    low = _is_low(weight)
    size = reduced if low else 4
    if split:
      times = 1 if whole else _times(local, weight)
      visits = 1 if once or whole else _visits(local, weight)
      yield message.Message(
        part='gathers of weights',
        kind='all-gather',
        axes=split,
        bytes=visits * (c if low else 4) * weight.used,
      )
      yield message.Message(
        part='reductions of gradients',
        kind='reduce-scatter',
        axes=split,
        bytes=times * size * weight.used * _windowed(local, weight),
      )
    yield from _reduced(local, weight, rest, split, size)


def _is_low(weight: weight_shards.Weight) -> bool:
  """Whether a weight is used in the dtype of the activations.

  The weights of norms are used in float32.
  """
  return weight.cast or '_bias_' in weight.path


def _windowed(
  local: device_share.DeviceShare, weight: weight_shards.Weight
) -> float:
  """Returns the bytes of a reduce-scatter over those of one by itself.

  The compiler cuts a product into parts and passes each on beside the next,
  once more than needed. It does not do so for experts, which call the
  collective explicitly, nor in the loops of stages, which not all devices run
  alike.
  """
  if local.plan is not None or 'experts' in weight.axes:
    return 1.0
  num = local.over('embed')
  return (num + 1) / num


def _visits(
  local: device_share.DeviceShare, weight: weight_shards.Weight
) -> float:
  """Returns the number of gathers of a weight in a step, in all passes."""
  if local.plan is None:
    # Experts are gathered explicitly, and kept if nothing is recomputed.
    kept = 'experts' in weight.axes and local.config.train.remat == 'none'
    return (1 if kept else 2) * local.num_microbatches
  loops = ('forward', 'recompute', 'backward')
  runs = (local.runs(loop, weight.tower, weight.member) for loop in loops)
  return sum(runs) / local.slots(weight.tower)


def _times(
  local: device_share.DeviceShare, weight: weight_shards.Weight
) -> float:
  """Returns the number of gradients of a weight computed in a step."""
  if local.plan is None:
    return local.num_microbatches
  runs = local.runs('weight', weight.tower, weight.member)
  return runs / local.slots(weight.tower)


def _expert_axes(
  local: device_share.DeviceShare, weight: weight_shards.Weight
) -> message.Axes:
  """Returns the axes along which devices have different experts."""
  return local.axes('experts') if 'experts' in weight.axes else ()


def _reduced(
  local: device_share.DeviceShare,
  weight: weight_shards.Weight,
  rest: message.Axes,
  split: message.Axes,
  size: int,
) -> Iterator[message.Message]:
  """Yields sums of gradients over axes that split tokens and not the weight.

  Args:
    local: the share of the device.
    weight: the parameter.
    rest: axes that split tokens and not the weight.
    split: axes over which `embed` splits the weight.
    size: bytes of an element of the gradient.
  """
  late = tuple(a for a in rest if a in local.by_hand)
  early = tuple(a for a in rest if a not in late)
  kept = weight.used / local.size(split)
  yield message.Message(
    part='reductions of gradients',
    kind='all-reduce',
    axes=early,
    bytes=_times(local, weight) * size * kept,
  )
  # Sums over microbatches are float32.
  yield message.Message(
    part='reductions of gradients',
    kind='all-reduce',
    axes=late,
    bytes=4 * kept,
  )


# --- Tables. ---


def of_tables(local: device_share.DeviceShare) -> list[message.Message]:
  """Returns the messages of the token table: of lookups and of the head."""
  return _of_embeddings(local) + _of_head(local) + _of_both(local)


def _of_both(local: device_share.DeviceShare) -> list[message.Message]:
  """Returns the gathers of the tables, and the sums after all microbatches.

  With stages, the tables are gathered once a step.
  """
  embed, late = local.axes('embed'), local.by_hand
  c, times = local.itemsize, local.num_microbatches
  size = c * local.vocab * local.config.model.embed_dim
  tables = [w for w in local.weights if not w.in_layers and 'vocab' in w.axes]
  kept = sum(w.used for w in tables) / local.size(embed)
  once = local.plan is not None
  gather = lambda part: message.Message(
    part=part,
    kind='all-gather',
    axes=embed,
    bytes=(1 if once else times) * size,
  )
  return [
    *([] if exchanges_vectors(local) else [gather('embeddings')]),
    gather('head'),
    message.Message(
      part='reductions of gradients',
      kind='all-reduce',
      axes=late,
      bytes=4 * kept,
    ),
  ]


def _of_embeddings(local: device_share.DeviceShare) -> list[message.Message]:
  """Returns the messages of lookups and of the table's gradients."""
  c, D, V = local.itemsize, local.config.model.embed_dim, local.vocab
  embed, vocab, early = local.axes('embed'), local.axes('vocab'), _early(local)
  listed = []
  for i, (length, forward, backward) in enumerate(lookups(local)):
    add = lambda kind, axes, size: listed.append(
      message.Message(part='embeddings', kind=kind, axes=axes, bytes=size)
    )
    vectors = c * local.rows * length / local.over('length') * D
    add('all-reduce', vocab, forward * vectors)
    if exchanges_vectors(local):
      add('all-to-all', embed, (forward + backward) * vectors)
    if i and local.plan is None:
      backward = 0  # Gradients of both lookups are added, and reduced at once.
    if not exchanges_vectors(local):
      add('reduce-scatter', embed, backward * 4 * V * D)
    add('all-gather', _fine(local), forward * vectors)
    add('all-reduce', early, backward * 4 * V * D / local.size(embed))
    if local.plan is not None:
      rows = tuple(
        a for a in local.axes('batch', 'length') if a not in local.by_hand
      )
      positions = sum(w.used for w in local.weights if 'table_PD' in w.path)
      add('all-reduce', rows, backward * 4 * positions)
  return listed


def lookups(local: device_share.DeviceShare) -> list[tuple[int, float, float]]:
  """Returns the lookups in the token table.

  Returns:
    For each sequence that is embedded (the encoder's, if there is one, and the
    predicted one): its length, and the number of lookups and of their gradients
    in a step.
  """
  data, plan, num = local.config.data, local.plan, local.num_microbatches
  lengths = [data.length] * data.objective.has_encoder + [local.length]
  if plan is None:
    return [(length, num, num) for length in lengths]
  towers = [tower.name for tower in plan.placement.towers]
  runs = local.runs
  return [
    (length, runs('enter', tower), runs('enter_backward', tower))
    for length, tower in zip(lengths, towers, strict=True)
  ]


def _of_head(local: device_share.DeviceShare) -> list[message.Message]:
  """Returns the messages of the head, without the gather of its table."""
  c, D, V = local.itemsize, local.config.model.embed_dim, local.vocab
  times, embed = local.heads, local.axes('embed')
  of_head = lambda kind, axes, size: message.Message(
    part='head', kind=kind, axes=axes, bytes=times * size
  )
  return [
    of_head('reduce-scatter', embed, c * V * D),
    of_head('all-reduce', _early(local), c * V * D / local.size(embed)),
    of_head('all-reduce', local.axes('vocab'), c * local.targets * D),
    of_head('all-gather', _fine(local), c * local.targets * D),
  ]


def _early(local: device_share.DeviceShare) -> message.Axes:
  """Returns the axes that split tokens and no table, except `Local.by_hand`."""
  out = (*local.axes('embed'), *local.by_hand)
  return tuple(a for a in local.axes('batch', 'length') if a not in out)


def _fine(local: device_share.DeviceShare) -> message.Axes:
  """Returns the axes that split a sequence between layers, not within them."""
  length = local.axes('length')
  return tuple(a for a in local.axes('norm_length') if a not in length)


def exchanges_vectors(local: device_share.DeviceShare) -> bool:
  """Whether devices exchange tokens' vectors, not the table; see `Embed`."""
  embed, c = local.axes('embed'), local.itemsize
  rows = local.axes('batch')
  if not embed or not {*embed} <= {*rows} - {*local.by_hand}:
    return False
  if {*local.axes('vocab')} & {*rows, *local.axes('length')}:
    return False
  staged = local.plan is not None
  return staged or 2 * local.targets * c < local.vocab * (c + 4)


# --- Stages. ---


def of_stages(local: device_share.DeviceShare) -> Iterator[message.Message]:
  """Yields messages between stages: activations, and weights once a step."""
  plan = local.plan
  assert plan is not None
  c, D = local.itemsize, local.config.model.embed_dim
  lengths = [length for length, *_ in lookups(local)]
  tokens = local.rows * sum(lengths) / local.over('length')
  along_pipe = lambda part, kind, size: message.Message(
    part=part, kind=kind, axes=(sharding.PIPE,), bytes=size
  )
  ticks = int(
    plan.instructions.sends_down_T.sum() + plan.instructions.sends_up_T.sum()
  )
  times = local.config.train.accumulate
  yield along_pipe(
    'messages of stages', 'collective-permute', times * ticks * c * tokens * D
  )
  for weight in local.weights:
    split = local.axes('embed') if 'embed' in weight.axes else ()
    kept = weight.used / local.size(split)
    if not weight.in_layers:
      size = c if 'vocab' in weight.axes else 4
      yield along_pipe('weights of stages', 'all-gather', size * kept)
      yield along_pipe('weights of stages', 'all-reduce', 4 * kept)
    elif not plan.placement.is_contiguous:
      # Weights go in the dtype of their use, gradients come back in float32.
      size = (c if _is_low(weight) else 4) + 4
      yield along_pipe('weights of stages', 'all-to-all', size * kept)

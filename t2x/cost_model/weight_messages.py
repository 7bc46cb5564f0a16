"""Bytes of weights: gathered, their gradients reduced, moved to stages."""

from collections.abc import Iterator

from t2x.cost_model import device_share
from t2x.cost_model import message
from t2x.cost_model import weight_shards
from t2x.parallel import sharding


def of_layers(local: device_share.Local) -> Iterator[message.Message]:
  """Gathers of what `embed` splits, and reductions of gradients."""
  config = local.config
  c = local.itemsize
  reduced = 4 if config.rules.reduce_dtype == 'float32' else c
  staged = local.plan is not None
  batch = local.axes('batch', 'length')
  # Stages gather a layer once a step, or for every visit.
  once = staged and config.pipeline.gather == 'once'
  # Weights are gathered before all microbatches, and reduced after them.
  whole = {*local.axes('embed')} <= {*local.by_hand}
  for weight in local.weights:
    if not weight.in_layers:
      continue
    split = tuple(a for a in local.axes('embed') if 'embed' in weight.axes)
    own = _own_axes(local, weight)
    rest = tuple(a for a in batch if a not in (*split, *own))
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
  """Whether it is used in the dtype of activations; norms are float32."""
  return weight.cast or '_bias_' in weight.path


def _windowed(local: device_share.Local, weight: weight_shards.Weight) -> float:
  """A reduce-scatter beside its product is passed on once more than needed.

  Not that of experts, which asks for the exchange itself, nor in loops of
  stages, of whose devices some do something else.
  """
  if local.plan is not None or 'experts' in weight.axes:
    return 1.0
  num = local.over('embed')
  return (num + 1) / num


def _visits(local: device_share.Local, weight: weight_shards.Weight) -> float:
  """How often a weight is gathered: forward and backward."""
  if local.plan is None:
    # Experts, gathered by hand, are kept where nothing is made again.
    kept = 'experts' in weight.axes and local.config.train.remat == 'none'
    return (1 if kept else 2) * local.num_microbatches
  loops = ('forward', 'recompute', 'backward')
  runs = (local.runs(loop, weight.tower, weight.member) for loop in loops)
  return sum(runs) / local.slots(weight.tower)


def _times(local: device_share.Local, weight: weight_shards.Weight) -> float:
  """How often a weight's gradient is made, of the share that is used."""
  if local.plan is None:
    return local.num_microbatches
  runs = local.runs('weight', weight.tower, weight.member)
  return runs / local.slots(weight.tower)


def _own_axes(
  local: device_share.Local, weight: weight_shards.Weight
) -> message.Axes:
  """Axes along which devices have other experts."""
  return local.axes('experts') if 'experts' in weight.axes else ()


def _reduced(local, weight, rest: message.Axes, split: message.Axes, size: int):
  """Sums over axes that split tokens and not the weight."""
  late = tuple(a for a in rest if a in local.by_hand)
  early = tuple(a for a in rest if a not in late)
  kept = weight.used / local.size(split)
  yield message.Message(
    part='reductions of gradients',
    kind='all-reduce',
    axes=early,
    bytes=_times(local, weight) * size * kept,
  )
  # What is summed over microbatches is float32.
  yield message.Message(
    part='reductions of gradients',
    kind='all-reduce',
    axes=late,
    bytes=4 * kept,
  )


# --- Tables. ---


def of_tables(local: device_share.Local) -> list[message.Message]:
  """Returns what token vectors and the head cost."""
  return _of_embeddings(local) + _of_head(local) + _of_both(local)


def _of_both(local: device_share.Local) -> list[message.Message]:
  """Sums after all microbatches; tables that all stages gather, once."""
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
    *([] if exchanged(local) else [gather('embeddings')]),
    gather('head'),
    message.Message(
      part='reductions of gradients',
      kind='all-reduce',
      axes=late,
      bytes=4 * kept,
    ),
  ]


def _of_embeddings(local: device_share.Local) -> list[message.Message]:
  c, D, V = local.itemsize, local.config.model.embed_dim, local.vocab
  embed, vocab, early = local.axes('embed'), local.axes('vocab'), _early(local)
  found = []
  for i, (length, forward, backward) in enumerate(looked_up(local)):
    say = lambda kind, axes, size: found.append(
      message.Message(part='embeddings', kind=kind, axes=axes, bytes=size)
    )
    vectors = c * local.rows * length / local.over('length') * D
    say('all-reduce', vocab, forward * vectors)
    if exchanged(local):
      say('all-to-all', embed, (forward + backward) * vectors)
    if i and local.plan is None:
      backward = 0  # Gradients of both lookups are added, and reduced at once.
    if not exchanged(local):
      say('reduce-scatter', embed, backward * 4 * V * D)
    say('all-gather', _fine(local), forward * vectors)
    say('all-reduce', early, backward * 4 * V * D / local.size(embed))
    if local.plan is not None:
      rows = tuple(
        a for a in local.axes('batch', 'length') if a not in local.by_hand
      )
      positions = sum(w.used for w in local.weights if 'table_PD' in w.path)
      say('all-reduce', rows, backward * 4 * positions)
  return found


def looked_up(local: device_share.Local) -> list[tuple[int, float, float]]:
  """Returns (length, times, times of the gradient) of what is looked up."""
  data, plan, num = local.config.data, local.plan, local.num_microbatches
  lengths = [data.length] * data.objective.has_encoder + [local.length]
  if plan is None:
    return [(length, num, num) for length in lengths]
  towers = [tower.name for tower in plan.place.towers]
  runs = local.runs
  return [
    (length, runs('enter', tower), runs('enter_backward', tower))
    for length, tower in zip(lengths, towers, strict=True)
  ]


def _of_head(local: device_share.Local) -> list[message.Message]:
  c, D, V = local.itemsize, local.config.model.embed_dim, local.vocab
  times, embed = local.heads, local.axes('embed')
  say = lambda kind, axes, size: message.Message(
    part='head', kind=kind, axes=axes, bytes=times * size
  )
  return [
    say('reduce-scatter', embed, c * V * D),
    say('all-reduce', _early(local), c * V * D / local.size(embed)),
    say('all-reduce', local.axes('vocab'), c * local.targets * D),
    say('all-gather', _fine(local), c * local.targets * D),
  ]


def _early(local: device_share.Local) -> message.Axes:
  """Axes that split tokens and no table, but for those by hand."""
  out = (*local.axes('embed'), *local.by_hand)
  return tuple(a for a in local.axes('batch', 'length') if a not in out)


def _fine(local: device_share.Local) -> message.Axes:
  """Axes that split a sequence between layers alone."""
  length = local.axes('length')
  return tuple(a for a in local.axes('norm_length') if a not in length)


def exchanged(local: device_share.Local) -> bool:
  """Whether token vectors travel and not the table; see `Embed`."""
  embed, c = local.axes('embed'), local.itemsize
  rows = local.axes('batch')
  if not embed or not {*embed} <= {*rows} - {*local.by_hand}:
    return False
  if {*local.axes('vocab')} & {*rows, *local.axes('length')}:
    return False
  staged = local.plan is not None
  return staged or 2 * local.targets * c < local.vocab * (c + 4)


# --- Stages. ---


def of_stages(local: device_share.Local) -> Iterator[message.Message]:
  """Messages to neighbours; weights that move once a step, and shared ones."""
  plan = local.plan
  assert plan is not None
  told, c, D = plan.told, local.itemsize, local.config.model.embed_dim
  lengths = [length for length, *_ in looked_up(local)]
  tokens = local.rows * sum(lengths) / local.over('length')
  say = lambda part, kind, size: message.Message(
    part=part, kind=kind, axes=(sharding.PIPE,), bytes=size
  )
  ticks = int(told.sends_down_T.sum() + told.sends_up_T.sum())
  times = local.config.train.accumulate
  yield say(
    'messages of stages', 'collective-permute', times * ticks * c * tokens * D
  )
  for weight in local.weights:
    split = local.axes('embed') if 'embed' in weight.axes else ()
    kept = weight.used / local.size(split)
    if not weight.in_layers:
      size = c if 'vocab' in weight.axes else 4
      yield say('weights of stages', 'all-gather', size * kept)
      yield say('weights of stages', 'all-reduce', 4 * kept)
    elif not plan.place.is_contiguous:
      # There as they are used, and their gradients back in float32.
      size = (c if _is_low(weight) else 4) + 4
      yield say('weights of stages', 'all-to-all', size * kept)

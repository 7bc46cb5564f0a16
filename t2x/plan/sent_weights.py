"""Bytes of weights: gathered, their gradients reduced, moved to stages."""

from collections.abc import Iterator

from t2x import sharding
from t2x.plan import local as local_lib
from t2x.plan import message


def of_layers(local: local_lib.Local) -> Iterator[message.Message]:
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
    split = tuple(a for a in local.axes('embed') if 'embed' in weight.axes)
    own = _own_axes(local, weight)
    rest = tuple(a for a in batch if a not in (*split, *own))
    size = reduced if weight.cast or len(weight.axes) > 2 else 4
    if split:
      times = 1 if whole else local.num_microbatches
      visits = 1 if once or whole else _visits(local, weight)
      yield message.Message(
        part='gathers of weights',
        kind='all-gather',
        axes=split,
        bytes=visits * c * weight.used,
      )
      yield message.Message(
        part='reductions of gradients',
        kind='reduce-scatter',
        axes=split,
        bytes=times * size * weight.used * _windowed(local, split),
      )
    yield from _reduced(local, weight, rest, split, size)


def _windowed(local: local_lib.Local, split: message.Axes) -> float:
  """A reduce-scatter beside its product is passed on once more than needed."""
  num = local.size(split)
  return (num + 1) / num


def _visits(local: local_lib.Local, weight: local_lib.Weight) -> float:
  """How often a weight is gathered: forward and backward."""
  if local.plan is None:
    return 2 * local.num_microbatches
  again = local.plan.table.recompute
  return (2 + again) * local.num_microbatches


def _own_axes(local: local_lib.Local, weight: local_lib.Weight) -> message.Axes:
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
    bytes=local.num_microbatches * size * kept,
  )
  # What is summed over microbatches is float32.
  yield message.Message(
    part='reductions of gradients',
    kind='all-reduce',
    axes=late,
    bytes=4 * kept,
  )


# --- Tables. ---


def of_tables(local: local_lib.Local) -> Iterator[message.Message]:
  """Token vectors, and the head."""
  config, c = local.config, local.itemsize
  D, V, tokens = config.model.embed_dim, local.vocab, local.tokens
  times, length = local.num_microbatches, local.axes('length')
  embed, batch = local.axes('embed'), local.axes('batch', 'length')
  vocab, rest = local.axes('vocab'), tuple(a for a in batch if a not in embed)
  late = tuple(a for a in rest if a in local.by_hand)
  early = tuple(a for a in rest if a not in late)
  say = lambda part, kind, axes, size: message.Message(
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
  # Between layers sequences are split more finely: gathered for the head, and
  # for the gradient of the lookup.
  fine = tuple(a for a in local.axes('norm_length') if a not in length)
  yield say('head', 'all-gather', fine, times * activation)
  yield say('embeddings', 'all-gather', fine, times * activation)
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


# --- Stages. ---


def of_stages(local: local_lib.Local) -> Iterator[message.Message]:
  """Messages to neighbours; weights that move once a step, and shared ones."""
  plan = local.plan
  assert plan is not None
  told, data = plan.told, local.config.data
  c, D = local.itemsize, local.config.model.embed_dim
  lengths = sum(_looked_up(local))
  state = c * local.rows * lengths * D / local.over('length')
  pipe = (sharding.PIPE,)
  ticks = int(told.sends_down_T.sum() + told.sends_up_T.sum())
  yield message.Message(
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
        yield message.Message(
          part='weights of stages',
          kind='all-to-all',
          axes=pipe,
          bytes=2 * 4 * kept,
        )
      continue
    split = local.axes('embed') if 'embed' in weight.axes else ()
    kept = 4 * weight.used / local.size(split)
    yield message.Message(
      part='weights of stages', kind='all-gather', axes=pipe, bytes=kept
    )
    yield message.Message(
      part='weights of stages', kind='all-reduce', axes=pipe, bytes=kept
    )

"""Whether the parts of an experiment fit each other and the devices.

Single configs check their own fields; this finds what they cannot see. It runs
before anything is built or compiled.
"""

import math

from t2x.attention import all_to_all
from t2x.attention import context
from t2x.config import experiment
from t2x.config import objective_consistency
from t2x.config import partitioning
from t2x.data import config as data_config
from t2x.data import input_pipeline as data_pipeline
from t2x.hardware import machines
from t2x.layers import attention_config
from t2x.layers import attention_kinds
from t2x.layers import embed
from t2x.layers import experts
from t2x.layers import local_heads
from t2x.layers import moe
from t2x.objectives import prefix_lm
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding

Experiment = experiment.Experiment
Partitioning = partitioning.Partitioning


def check(config: Experiment, num_devices: int) -> None:
  """Checks that the parts of an experiment fit each other and the devices.

  Args:
    config: the experiment.
    num_devices: the number of devices of the mesh.

  Raises:
    ValueError: parts of the experiment do not fit each other or the devices.
    ShardingError: an array cannot be split as the layout says.
  """
  data_pipeline.check(config.data)
  machines.check_overrides(config.compiler_options)
  sizes = mesh_lib.sizes(config.mesh, num_devices)
  sharding.check_rules(config.rules, sizes)
  partitioned = partitioning.of(config, sizes)
  _check_offload(partitioned)
  _check_pipeline(partitioned)
  _check_attention(partitioned)
  _check_rows(partitioned)
  _check_context(partitioned)
  _check_activations(config)
  _check_groups(partitioned)
  _check_experts(partitioned)
  objective_consistency.check(partitioned)
  _check_lengths(config)
  _check_chunks(partitioned)


def _check_pipeline(partitioned: Partitioning) -> None:
  config = partitioned.config
  if partitioned.pipeline is None or partitioned.context_size == 1:
    return
  ring = config.rules.context_attention == 'ring'
  if ring and not config.pipeline.uniform:
    raise ValueError(
      'rules.context_attention=ring sends keys from device to device while '
      'other stages of the pipeline do something else. Set '
      'rules.context_attention=all_to_all, or pipeline.uniform=true, where all '
      'stages do the same, masked.'
    )


def _check_offload(partitioned: Partitioning) -> None:
  """Layers are updated one by one, and stages keep what they choose."""
  config, sizes = partitioned.config, partitioned.sizes
  train = config.train
  if partitioned.has_stages and train.execution.saved['offload']:
    raise partitioning.PipelineError(
      f'train.remat={train.remat}: the stages of a pipeline keep activations '
      'on their devices. Set train.remat to none, full, dots or save:NAMES, '
      'or mesh.pipe=1.'
    )
  split = sharding.mesh_axes(config.rules.layers)
  parts = math.prod(sizes[a] for a in split) * sizes.get(sharding.PIPE, 1)
  if train.offload == 'optimizer' and parts > 1:
    raise partitioning.PipelineError(
      'train.offload=optimizer updates stacked layers one by one, and here '
      f'they lie on different devices (mesh.pipe={sizes[sharding.PIPE]}, '
      f'rules.layers={",".join(split) or "none"}). Set train.offload=none, or '
      'mesh.pipe=1 and rules.layers=none.'
    )


def _check_attention(partitioned: Partitioning) -> None:
  """Kinds of attention say which rows and layouts they are for."""
  config, sizes = partitioned.config, partitioned.sizes
  parts = data_config.parts(config.data).values()
  packed = [
    own.batching.kind
    for own in parts
    if isinstance(own.batching, data_config.FULL)
  ]
  has_prefix = any(
    isinstance(own.objective, prefix_lm.PrefixLM) for own in parts
  )
  splits = partitioned.context_size > 1
  ring = splits and config.rules.context_attention == 'ring'
  for kind in config.model.kinds:
    # A memory is looked at from the row, by distance.
    kind.check_length(config.data.length + config.model.memory)
    if kind.mixes_rows and packed:
      raise ValueError(
        f'model.attention={kind.kind} mixes the keys of a whole row, and '
        f'data.batching={packed[0]} puts several documents into one, which '
        'would see each other. Set data.batching=pad.'
      )
    if has_prefix and not isinstance(kind, attention_config.Softmax):
      softmax = attention_kinds.all_of(attention_kinds.SoftmaxConfig)
      raise ValueError(
        f'model.attention={kind.kind} has no prefix that is seen from both '
        'sides: data.objective=prefix_lm is for softmax kinds '
        f'({", ".join(k.kind for k in softmax)}). Set another of the two.'
      )
    if ring and not isinstance(kind, attention_config.Softmax):
      raise sharding.ShardingError(
        f'model.attention={kind.kind}: {context.NEEDS_EXCHANGE}'
      )
    if splits and kind.global_projections:
      raise sharding.ShardingError(
        'attention.global_projections=true takes the first tokens of whole '
        f'rows, and mesh.context={sizes["context"]} splits them. Set it to '
        'false, or mesh.context=1.'
      )


def _check_rows(partitioned: Partitioning) -> None:
  config, sizes = partitioned.config, partitioned.sizes
  rows = config.data.batch_size
  need = partitioned.rows_multiple
  if rows % need:
    axes = partitioned.row_axes
    by = ' x '.join(f'mesh.{a}={sizes[a]}' for a in axes if sizes.get(a, 1) > 1)
    micro, other = f'train.accumulate={config.train.accumulate}', ''
    if partitioned.has_stages:
      asked = config.pipeline.microbatches
      micro += f' x pipeline.microbatches={asked}'
      of_each, rest = divmod(rows * asked, need)
      if not rest and not config.pipeline.own_table:
        near = ' or '.join(map(str, near_divisors(of_each, asked)))
        other = f', set pipeline.microbatches to {near}'
    less = f'{rows // need * need} or ' if rows > need else ''
    raise ValueError(
      f'data.batch_size={rows} rows cannot be dealt to {by or "one device"} '
      f'in {micro} microbatches: it must be a multiple of {need}. Set it to '
      f'{less}{-(-rows // need) * need}{other}, or change the mesh.'
    )


def _check_context(partitioned: Partitioning) -> None:
  config, sizes = partitioned.config, partitioned.sizes
  has_encoder = config.data.objective.has_encoder
  parts = partitioned.target_multiple
  if has_encoder:  # Its targets are padded.
    parts = partitioned.source_multiple
  rules = config.rules
  axes = {*sharding.mesh_axes(rules.length), *partitioned.fine_axes}
  named = ' x '.join(f'mesh.{a}={sizes[a]}' for a in sorted(axes))
  for length in data_config.buckets(config.data):
    if length % parts:
      raise ValueError(
        f'data.length: a row of {length} tokens cannot be split over {named} '
        f'(rules.length, rules.norm_length): it must be a multiple of {parts}. '
        f'Set it to {-(-length // parts) * parts}, or change the mesh.'
      )
  devices = partitioned.context_size
  if devices > 1 and config.rules.context_attention == 'all_to_all':
    split = sharding.mesh_axes(config.rules.kv_heads)
    parts = math.prod(sizes[a] for a in split)
    for kind in config.model.kinds:
      all_to_all.repeats(kind.num_heads, kind.kv_heads, devices, parts)


# What models constrain; those of plain feed-forward layers apart.
_ACTIVATIONS = (
  ('batch', 'length', 'act_embed'),
  ('batch', 'norm_length', 'act_embed'),
  ('batch', 'length', 'heads', None),
  ('batch', 'length', 'kv_heads', None),
  ('vocab', 'act_embed'),
)
_HIDDEN = ('batch', 'length', 'mlp')


def _check_activations(config: Experiment) -> None:
  kinds = config.model.mlp_kinds
  plain = not all(isinstance(kind, moe.MoeConfig) for kind in kinds)
  for axes in (*_ACTIVATIONS, *((_HIDDEN,) if plain else ())):
    sharding.to_spec(axes, config.rules)


def _check_groups(partitioned: Partitioning) -> None:
  """Query heads must find their key/value heads on their device."""
  config, sizes = partitioned.config, partitioned.sizes
  rules, fine = config.rules, partitioned.fine_axes
  over = lambda axes: math.prod(
    sizes[a] for a in sharding.mesh_axes(axes) if a in fine
  )
  parts, kv_parts = over(rules.heads), over(rules.kv_heads)
  for kind in config.model.kinds:
    # What does not divide is found where parameters are.
    if kind.num_heads % parts == 0 and kind.kv_heads % kv_parts == 0:
      num, held = kind.num_heads // parts, kind.kv_heads // kv_parts
      local_heads.key_heads(kind, num, held)


def _check_experts(partitioned: Partitioning) -> None:
  config, sizes = partitioned.config, partitioned.sizes
  rules = config.rules
  if any(isinstance(kind, moe.MoeConfig) for kind in config.model.mlp_kinds):
    kept = lambda axes: [a for a in sharding.mesh_axes(axes) if sizes[a] > 1]
    experts.check_axes(*map(kept, (rules.experts, rules.batch, rules.length)))


def _check_chunks(partitioned: Partitioning) -> None:
  config = partitioned.config
  loss, model = config.train.loss, config.model
  rows = embed.padded(model.vocab_size, model.vocab_multiple)
  if rows % loss.vocab_chunks:
    raise ValueError(
      f'train.loss.vocab_chunks={loss.vocab_chunks} does not divide the {rows} '
      'rows of the vocabulary table. Choose a divisor, or another '
      'model.vocab_multiple.'
    )
  for bucket in data_config.buckets(config.data):
    length = data_config.num_targets(config.data, bucket)
    parts = partitioned.target_multiple
    length = -(-length // parts) * parts // partitioned.context_size
    if length % loss.token_chunks:
      raise ValueError(
        f'train.loss.token_chunks={loss.token_chunks} does not divide the '
        f'{length} targets of a row on each device. Choose a divisor, or '
        'another data.length.'
      )


def _check_lengths(config: Experiment) -> None:
  limit = config.model.max_length
  if limit is not None and config.data.length > limit:
    raise ValueError(
      f'data.length={config.data.length} is more than the '
      f'model.position.max_length={limit} positions of the model. Set them '
      'to fit.'
    )


def check_vocabulary(config: Experiment, vocab_size: int) -> None:
  """Raises ValueError if the tokenizer has ids that the model has not."""
  if vocab_size > config.model.vocab_size:
    raise ValueError(
      f'The tokenizer has {vocab_size} ids and model.vocab_size='
      f'{config.model.vocab_size}. Set model.vocab_size={vocab_size} or '
      'more, or a smaller data.tokenizer.vocab_size.'
    )


def near_divisors(number: int, near: int) -> list[int]:
  """Returns the two divisors that are nearest to a number, in order."""
  small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
  found = {*small, *(number // n for n in small)}
  return sorted(sorted(found, key=lambda n: (abs(n - near), n))[:2])

"""Warnings about a plan, each with a change that would help."""

from collections.abc import Iterator
import math

from t2x.config import experiment
from t2x.hardware import gpu_targets
from t2x.layers import attention_config
from t2x.layers import moe
from t2x.layers import position
from t2x.layers import routing
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding
from t2x.planning import plan as plan_lib
from t2x.planning import remedies
from t2x.planning import sharding_table

_LANES = 128  # Columns of a TPU's matrix unit and of its vector registers.
_BLOCK = 32  # Queries in the smallest block of a GPU's kernel.
_LARGE = 0.05  # Share of a device's memory from which copies are a warning.


def of(
  config: experiment.Experiment,
  plan: plan_lib.Plan,
  write: remedies.Write = remedies.set_text,
) -> list[str]:
  """Returns warnings about a plan, each with a remedy.

  Args:
    config: the experiment that was planned.
    plan: its plan.
    write: a function from settings to command-line flags, as for
      `remedies.remedy`.
  """
  if plan.fits is False:
    where = plan.topology, plan.num_slices
    first = [remedies.remedy(config, *where, write)]
  else:
    first = []
  checks = (
    _copies,
    _padding,
    _gathers,
    _gathers_by_sums,
    _exposed,
    _idle,
    _precision,
    _blocks,
    _recomputed,
  )
  others = [line for check in checks for line in check(config, plan)]
  return first + others


def _copies(
  config: experiment.Experiment, plan: plan_lib.Plan
) -> Iterator[str]:
  """Warns of large arrays that many devices each hold."""
  table = sharding_table.make(config, math.prod(plan.sizes.values()))
  limit = plan.memory.limit or plan.memory.peak
  spare = sum(
    row.spare_bytes
    for rows in table.groups.values()
    for row in rows
    if row.copies > 1
  )
  if spare < _LARGE * limit:
    return
  large = sharding_table.largest_copies(table, 1)
  if not large:
    return
  row = large[0]
  copied = sharding_table.copied_over(row, table)
  axes = ', '.join(f'{axis}={size}' for axis, size in copied.items())
  yield (
    f'copies of state take {sharding_table.bytes_text(spare)} of each device: '
    f'{row.path} alone lies {row.copies} times, over {axes}. Give these '
    'devices to mesh.fsdp, or name the axes in the rule of one of its '
    'dimensions (rules.embed, rules.vocab, rules.mlp, rules.heads).'
  )


def _padding(
  config: experiment.Experiment, plan: plan_lib.Plan
) -> Iterator[str]:
  if plan.chip is None or plan.chip in gpu_targets.TARGETS:
    return
  tensor = plan.sizes['tensor']
  for kind in dict.fromkeys(config.model.kinds):
    if kind.head_dim % _LANES:
      filled = kind.head_dim / (-(-kind.head_dim // _LANES) * _LANES)
      yield (
        f'model.attention.head_dim={kind.head_dim} fills '
        f'{sharding_table.percent(filled)} of the {_LANES} lanes of a TPU: '
        'scores take as long as with 128. Fewer, wider heads cost the same.'
      )
      break
  for mlp in dict.fromkeys(config.model.mlp_kinds):
    width = mlp.hidden // tensor
    if mlp.hidden % tensor == 0 and width % _LANES:
      yield (
        f'mlp.hidden={mlp.hidden} over tensor={tensor} leaves {width} columns '
        f'to a device, no multiple of {_LANES}. Choose another mesh.tensor.'
      )
      break
    if isinstance(mlp, moe.MoeConfig) and isinstance(
      mlp.router, routing.TokenChoice
    ):
      capacity = mlp.router.capacity
      if capacity and capacity > 1.0:
        share = 1.0 - 1.0 / capacity
        yield (
          f"at even balance {sharding_table.percent(share)} of the experts' "
          f'slots stay empty (mlp.router.capacity={capacity}) and are '
          'computed all the same. A smaller one drops more tokens where '
          'balance is uneven.'
        )


def _gathers(
  config: experiment.Experiment, plan: plan_lib.Plan
) -> Iterator[str]:
  num = config.train.accumulate
  fsdp = plan.sizes['fsdp']
  if num == 1 or fsdp == 1 or plan.sizes['pipe'] > 1:
    return
  gathered = sum(
    row.bytes
    for row in plan.collectives
    if row.kind == 'all-gather' and 'fsdp' in row.axes
  )
  yield (
    f'all weights are gathered over fsdp={fsdp} in each of '
    f'train.accumulate={num} microbatches, '
    f'{sharding_table.bytes_text(gathered)} a step. Fewer microbatches with '
    'train.remat=full (or train.loss.token_chunks) need fewer; '
    'train.accumulate_whole=true reduces gradients once, for memory.'
  )


def _gathers_by_sums(
  config: experiment.Experiment, plan: plan_lib.Plan
) -> Iterator[str]:
  """Warns of weights that the compiler gathers by all-reduces."""
  fsdp, rule = plan.sizes['fsdp'], sharding.mesh_axes(config.rules.embed)
  part = next((n for n in range(2, fsdp) if fsdp % n == 0), None)
  if 'fsdp' not in rule or not part or plan.topology.count('x') < 2:
    return
  along = {'all-gather': 0.0, 'all-reduce': 0.0}
  for row in plan.collectives:
    if row.kind in along and row.axes == ('fsdp',):
      along[row.kind] += row.bytes
  weights = sum(plan.memory.state[sharding_table.PARAMETERS].values()) * fsdp
  # Float32 ones: bfloat16 halves are gathered once or twice.
  if along['all-gather'] > 0.2 * weights or along['all-reduce'] < 0.4 * weights:
    return
  data = plan.sizes['data'] * part
  yield (
    f'the compiler gathers weights over fsdp={fsdp} by all-reduces of whole '
    f'arrays, {sharding_table.bytes_text(along["all-reduce"])} a step, which '
    'send twice as much as gathers. TPUs of three sides do so for an axis '
    f'along all of them. With mesh.data={data} mesh.fsdp={fsdp // part} it may '
    'gather.'
  )


def _exposed(
  config: experiment.Experiment, plan: plan_lib.Plan
) -> Iterator[str]:
  r = plan.roofline
  if r is None or r.exposed < 0.1 * r.seconds:
    return
  row = max(plan.collectives, key=lambda row: row.exposed)
  share = r.exposed / r.seconds
  yield (
    f'{sharding_table.percent(share)} of the least time are exchanges beside '
    f'no product, most of them {row.kind} along {row.along} '
    f'({sharding_table.bytes_text(row.bytes - row.hidden)}). '
    + _remedy(row, config, plan)
  )


def _remedy(
  row: plan_lib.CollectiveTotal,
  config: experiment.Experiment,
  plan: plan_lib.Plan,
) -> str:
  slices = plan.num_slices
  between = mesh_lib.dcn_sizes(config.mesh, plan.sizes, slices)
  for axis in row.axes:
    if row.between is not False and axis != 'data' and between[axis] > 1:
      return (
        f'Keep mesh.{axis} within a slice, and mesh.data between them: '
        f'mesh.dcn.data={slices}, the other axes of mesh.dcn 1, and mesh.data '
        f'a multiple of {slices}.'
      )
  if 'tensor' in row.axes:
    return (
      'A smaller mesh.tensor sends less; '
      'rules.norm_length=context,tensor splits what remains.'
    )
  if 'context' in row.axes:
    return 'A smaller mesh.context, or the other rules.context_attention.'
  if 'expert' in row.axes:
    return 'A smaller mesh.expert sends less far.'
  return 'More tokens to a device hide more.'


def _idle(config: experiment.Experiment, plan: plan_lib.Plan) -> Iterator[str]:
  if plan.roofline is None or plan.roofline.idle < 0.2:
    return
  yield (
    f'stages wait {sharding_table.percent(plan.roofline.idle)} of the time. '
    'More pipeline.microbatches, pipeline.schedule=interleaved or zb_h1, or a '
    'smaller mesh.pipe.'
  )


def _precision(
  config: experiment.Experiment, plan: plan_lib.Plan
) -> Iterator[str]:
  if plan.chip is not None and config.model.dtype == 'float32':
    yield (
      'activations are float32, which take twice the memory of bfloat16, and '
      'more time. Set model.dtype=bfloat16.'
    )


def _blocks(
  config: experiment.Experiment, plan: plan_lib.Plan
) -> Iterator[str]:
  """Warns of attention that no kernel runs, on a chip that has one."""
  # Ring attention does not use the kernel; simulated devices have none.
  if plan.chip is None or plan.sizes['context'] > 1:
    return
  gpu = plan.chip in gpu_targets.TARGETS
  reason = _no_kernel_reason(config, gpu)
  if reason:
    yield f'attention runs in blocks, and not by a kernel: {reason}'


def _no_kernel_reason(config: experiment.Experiment, gpu: bool) -> str:
  """Returns why a chip's kernel cannot run the attention; '' if it can."""
  bias = config.model.position
  if bias is not None and position.is_bias(bias):
    name = type(bias).__name__
    return f'model.position ({name}) adds a bias to scores, which is not in it.'
  kinds = [
    k for k in config.model.kinds if isinstance(k, attention_config.Softmax)
  ]
  if any(k.kernel == 'blocks' for k in kinds):
    return 'attention.kernel=blocks. Set it to auto.'
  if any(k.dropout for k in kinds):
    return 'attention.dropout is not in it. Set it to 0.'
  multiple = _BLOCK if gpu else _LANES
  if config.data.length % multiple:
    return (
      f'it takes multiples of {multiple} tokens, and data.length='
      f'{config.data.length}.'
    )
  if gpu and any(k.kind != 'dense' or k.soft_cap for k in kinds):
    return 'windows, other patterns and soft caps are not in the one for GPUs.'
  return ''


def _recomputed(
  config: experiment.Experiment, plan: plan_lib.Plan
) -> Iterator[str]:
  if plan.flops.executed and plan.flops.ratio > 1.5:
    yield (
      f"the program computes {plan.flops.ratio:.2f} of the model's FLOPs. "
      'Look at train.remat (full costs a third), the blocks that masks cut '
      'through (model.attention.block), slots of experts, uniform stages, and '
      'products of the optimizer (optim=muon), which mesh.data repeats and '
      'mesh.fsdp splits.'
    )

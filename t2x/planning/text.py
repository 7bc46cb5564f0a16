"""Formats a plan as text, and as a JSON object."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math
from typing import Any

from t2x.planning import plan as plan_lib
from t2x.planning import sharding_table
from t2x.tracking import text_table

_GIB = 2**30


def gib(num: float) -> str:
  """Returns bytes as GiB, with three digits or so: '7.66', '0.012'."""
  value = num / _GIB
  digits = 2 if value >= 0.995 else 3
  return f'{value:,.{digits}f}'


def flops(num: float) -> str:
  """Returns FLOPs to four digits: '109.3 TFLOP', '13.29 GFLOP'."""
  if num < 1e11:
    return f'{num / 1e9:,.4g} GFLOP'
  return f'{num / 1e12:,.4g} TFLOP'


def time(seconds: float) -> str:
  """Returns a time to three digits: '0.56 s', '86.2 ms'."""
  if seconds >= 1.0:
    return f'{seconds:,.3g} s' if seconds < 100 else f'{seconds:,.0f} s'
  return f'{1000 * seconds:.3g} ms'


def title(
  name: str, topology: str, num_slices: int, sizes: Mapping[str, int]
) -> str:
  """Returns a line that names the experiment, the devices and the layout.

  Args:
    name: name of the experiment.
    topology: name of the topology.
    num_slices: number of slices of that topology.
    sizes: number of devices along each mesh axis.
  """
  num, place = math.prod(sizes.values()), where(topology, num_slices)
  layout = sharding_table.layout_text(sizes)
  return f'{name} on {place} ({num:,} devices), {layout}'


def where(topology: str, num_slices: int) -> str:
  """Returns the name of the devices: `v5e:4x4`, or `2 x v5e:4x4`."""
  return f'{num_slices} x {topology}' if num_slices > 1 else topology


def text(name: str, plan: plan_lib.Plan, advice: Sequence[str] = ()) -> str:
  """Returns a plan as text.

  Args:
    name: name of the experiment.
    plan: its plan.
    advice: warnings, from `advice.of`.
  """
  lines = [
    title(name, plan.topology, plan.num_slices, plan.sizes),
    '',
    *_memory(plan),
    '',
    *_flops(plan),
  ]
  if plan.collectives:
    lines += ['', *_sent(plan)]
  if plan.stages:
    lines += ['', *_stages(plan)]
  if plan.roofline is not None:
    lines += ['', *_roofline(plan)]
  lines += ['', f'lowered and compiled in {plan.compile_seconds:.0f} s']
  if advice:
    lines += ['', *(f'warning: {line}' for line in advice)]
  return '\n'.join(lines)


def _memory(plan: plan_lib.Plan) -> list[str]:
  memory = plan.memory
  rows = [['memory of a device', 'GiB']]
  for group, modules in memory.state.items():
    if group == 'counters':
      continue
    rows.append([group, gib(sum(modules.values()))])
    rows += [[f'  {name}', gib(size)] for name, size in _large(modules)]
  rows.append(
    ['all arguments, with the batch and padding', gib(memory.arguments)]
  )
  rows.append(['temporaries', gib(memory.temporaries)])
  rows += [
    [f'  {name}', gib(size)] for name, size in _large(memory.activations)
  ]
  unused = memory.temporaries - sum(memory.activations.values())
  if memory.activations and unused > memory.temporaries / 100:
    rows.append(['  not in use at the peak', gib(unused)])
  if memory.host:
    rows.append(['in the memory of the hosts', gib(memory.host)])
  rows.append(['peak: the most that is in use at a time', gib(memory.peak)])
  lines = text_table.aligned(rows, '<>')
  return [*lines, _verdict(plan)]


def _verdict(plan: plan_lib.Plan) -> str:
  memory = plan.memory
  if plan.refused is not None:
    return f'does not fit: the compiler says "{plan.refused}"'
  if memory.limit is None:
    return 'of a memory whose size is not known'
  fits = 'fits' if plan.fits else 'DOES NOT FIT'
  return f'{fits}: a device has {gib(memory.limit)} GiB'


def _large(sums: Mapping[str, float]) -> list[tuple[str, float]]:
  """Returns the parts above a hundredth of the sum, and the sum of the rest."""
  least = sum(sums.values()) / 100
  large = [(name, size) for name, size in sums.items() if size >= least]
  rest = sum(sums.values()) - sum(size for _, size in large)
  if len(large) == 1 and rest == 0:
    return []
  return large + ([('other', rest)] if rest >= least / 10 else [])


def _flops(plan: plan_lib.Plan) -> list[str]:
  f = plan.flops
  lines = [f'FLOPs of a device in a step: the model has {flops(f.model)}']
  if f.executed:
    lines.append(
      f'  executed: {flops(f.executed_matmul)} in products, '
      f"{flops(f.kernels)} in kernels: {f.ratio:.3f} of the model's"
    )
  return lines + [f'  {line}' for line in plan.formula.splitlines()[1:3]]


def _sent(plan: plan_lib.Plan) -> list[str]:
  rows = [['sent by a device', 'along', 'times', 'MB', 'beside products']]
  for row in plan.collectives:
    if row.bytes < plan.collectives[0].bytes / 1e4:
      continue
    rows.append(
      [row.kind, row.along, f'{row.times:,.0f}']
      + [f'{row.bytes / 1e6:,.1f}', sharding_table.percent(_share(row))]
    )
  total = sum(row.bytes for row in plan.collectives)
  hidden = sum(row.hidden for row in plan.collectives)
  share = hidden / total if total else 0.0
  rows.append(
    ['all', '', '', f'{total / 1e6:,.1f}', sharding_table.percent(share)]
  )
  return text_table.aligned(rows, '<<>>>')


def _stages(plan: plan_lib.Plan) -> list[str]:
  rows = [['stage', 'executed', 'sent']]
  for i, stage in enumerate(plan.stages):
    sent = sharding_table.bytes_text(stage.sent)
    rows.append([f'{i}', flops(stage.executed), sent])
  return [plan.schedule, *text_table.aligned(rows, '>>>')]


def _share(row: plan_lib.CollectiveTotal) -> float:
  return row.hidden / row.bytes if row.bytes else 0.0


def _roofline(plan: plan_lib.Plan) -> list[str]:
  r = plan.roofline
  assert r is not None and plan.mfu_limit is not None
  idle = f', stages idle {sharding_table.percent(r.idle)}' if r.idle else ''
  return [
    'roofline (a model by published figures of the chip, not a measurement):',
    f'  products {time(r.compute)}, memory {time(r.memory)}, exchanges '
    f'{time(r.network)} of which {time(r.exposed)} beside no product{idle}',
    f'  bound by {r.bound}: a step takes {time(r.seconds)} at least, so that '
    f'MFU is {sharding_table.percent(plan.mfu_limit)} at most',
  ]


def to_json(plan: plan_lib.Plan, advice: Sequence[str] = ()) -> dict[str, Any]:
  """Returns a plan as nested dicts, lists and scalars, of one device.

  Args:
    plan: the plan.
    advice: warnings, from `advice.of`.
  """
  memory, f, r = plan.memory, plan.flops, plan.roofline
  kinds: dict[str, float] = {}
  for row in plan.collectives:
    kinds[row.kind] = kinds.get(row.kind, 0.0) + row.bytes
  return {
    'topology': plan.topology,
    'num_slices': plan.num_slices,
    'mesh': plan.sizes,
    'memory': {
      'arguments_bytes': memory.arguments,
      'temporaries_bytes': memory.temporaries,
      'peak_bytes': memory.peak,
      'host_bytes': memory.host,
      'limit_bytes': memory.limit,
      'state': memory.state,
      'activations': memory.activations,
    },
    'flops': {
      'model': f.model,
      'executed_matmul': f.executed_matmul,
      'kernels': f.kernels,
      'ratio': f.ratio,
    },
    'collectives': {
      'total_bytes': sum(row.bytes for row in plan.collectives),
      'by_kind': kinds,
      'rows': [dataclasses.asdict(row) for row in plan.collectives],
    },
    'roofline': r
    and {
      **dataclasses.asdict(r),
      'seconds': r.seconds,
      'bound': r.bound,
      'mfu_limit': plan.mfu_limit,
    },
    'pipeline': {
      'schedule': plan.schedule,
      'stages': [dataclasses.asdict(stage) for stage in plan.stages],
    }
    if plan.stages
    else None,
    'compile_seconds': plan.compile_seconds,
    'fits': plan.fits,
    'refused': plan.refused,
    'warnings': list(advice),
  }

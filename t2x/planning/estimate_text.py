"""Formats an estimate as text, and as a JSON object."""

from typing import Any

from t2x.cost_model import estimate as estimate_lib
from t2x.planning import text as text_lib


def text(estimate: estimate_lib.Estimate, limit: float | None = None) -> str:
  """Returns the parts of memory, FLOPs and communication, the largest first.

  Args:
    estimate: the estimate.
    limit: bytes of memory that a device has; None if unknown.
  """
  rows = lambda parts, unit: [
    f'  {size / unit:12,.3f}  {name}'
    for name, size in sorted(parts.items(), key=lambda item: -item[1])
    if size
  ]
  phase, peak = estimate.peak_phase, text_lib.gib(estimate.peak_bytes)
  lines = [
    f'memory of a device: {peak} GiB at its peak ({phase.name})',
    *rows(estimate.arguments | phase.parts, 2**30),
  ]
  if limit is not None:
    fits = 'should fit' if estimate.peak_bytes <= limit else 'should NOT fit'
    lines.append(f'{fits}: a device has {text_lib.gib(limit)} GiB')
  return '\n'.join(
    [
      *lines,
      f'products: {estimate.executed_flops / 1e12:,.3f} TFLOP, without those '
      'of the optimizer',
      *rows(estimate.flops, 1e12),
      f'sent by a device: {estimate.sent_bytes() / 1e9:,.3f} GB',
      *rows(_sent(estimate), 1e9),
    ]
  )


def to_json(
  estimate: estimate_lib.Estimate, limit: float | None = None
) -> dict[str, Any]:
  """Returns an estimate as nested dicts, in bytes and FLOPs of one device.

  Args:
    estimate: the estimate.
    limit: bytes of memory that a device has; None if unknown.
  """
  return {
    'mesh': dict(estimate.sizes),
    'memory': {
      'arguments_bytes': estimate.argument_bytes,
      'temporaries_bytes': estimate.temporary_bytes,
      'peak_bytes': estimate.peak_bytes,
      'limit_bytes': limit,
      'parts': estimate.arguments | estimate.peak_phase.parts,
    },
    'flops': {'executed': estimate.executed_flops, 'parts': estimate.flops},
    'collectives': {
      'total_bytes': estimate.sent_bytes(),
      'parts': _sent(estimate),
    },
    'fits': None if limit is None else bool(estimate.peak_bytes <= limit),
  }


def _sent(estimate: estimate_lib.Estimate) -> dict[str, float]:
  """Returns the bytes sent by purpose, kind of collective and mesh axes."""
  sums: dict[str, float] = {}
  for message in estimate.messages:
    name = f'{message.part} ({message.kind} over {",".join(message.axes)})'
    sums[name] = sums.get(name, 0.0) + message.bytes
  return sums

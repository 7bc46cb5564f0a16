"""An estimate as lines of text, and as one JSON object."""

from typing import Any

from t2x.cost_model import estimate as estimate_lib
from t2x.planning import text as text_lib


def text(found: estimate_lib.Estimate, limit: float | None = None) -> str:
  """Returns the parts as lines, the largest of each kind first.

  Args:
    found: the estimate.
    limit: bytes of memory that a device has, where that is known.
  """
  rows = lambda parts, unit: [
    f'  {size / unit:12,.3f}  {name}'
    for name, size in sorted(parts.items(), key=lambda item: -item[1])
    if size
  ]
  fullest, peak = found.fullest, text_lib.gib(found.peak_bytes)
  lines = [
    f'memory of a device: {peak} GiB at the fullest moment ({fullest.name})',
    *rows(found.arguments | fullest.parts, 2**30),
  ]
  if limit is not None:
    fits = 'should fit' if found.peak_bytes <= limit else 'should NOT fit'
    lines.append(f'{fits}: a device has {text_lib.gib(limit)} GiB')
  return '\n'.join(
    [
      *lines,
      f'products: {found.executed_flops / 1e12:,.3f} TFLOP, without those of '
      'the optimizer',
      *rows(found.flops, 1e12),
      f'sent by a device: {found.sent_bytes() / 1e9:,.3f} GB',
      *rows(_sent(found), 1e9),
    ]
  )


def to_json(
  found: estimate_lib.Estimate, limit: float | None = None
) -> dict[str, Any]:
  """Returns the same, in bytes and FLOPs of a device."""
  return {
    'mesh': dict(found.sizes),
    'memory': {
      'arguments_bytes': found.argument_bytes,
      'temporaries_bytes': found.temporary_bytes,
      'peak_bytes': found.peak_bytes,
      'limit_bytes': limit,
      'parts': found.arguments | found.fullest.parts,
    },
    'flops': {'executed': found.executed_flops, 'parts': found.flops},
    'collectives': {'total_bytes': found.sent_bytes(), 'parts': _sent(found)},
    'fits': None if limit is None else bool(found.peak_bytes <= limit),
  }


def _sent(found: estimate_lib.Estimate) -> dict[str, float]:
  sums: dict[str, float] = {}
  for message in found.messages:
    name = f'{message.part} ({message.kind} over {",".join(message.axes)})'
    sums[name] = sums.get(name, 0.0) + message.bytes
  return sums

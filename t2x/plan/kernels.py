"""The FLOPs of kernels, whose text is not HLO: told by their names."""

import re

from t2x.attention import splash
from t2x.plan import hlo
from t2x.plan import loops

_FORWARD = re.compile(splash.FLOPS + r'(\d+)')
# Products of a TPU's backward kernel for each of the forward pass's two: scores,
# dP, dV and dK, or scores, dP and dQ. A GPU's has a label of its own; the sums
# that go before it are no products.
_FACTORS = {'_dkv_': 2.0, '_dq_': 1.5, '_preprocess_': 0.0}


def kernel_flops(text: str, trips: loops.Trips | None = None) -> int:
  """Returns the FLOPs of the products in attention kernels, on one device.

  Args:
    text: of `compiled.as_text()`.
    trips: of loops of which the text does not tell them.

  Raises:
    ValueError: a loop with kernels in it has an unknown number of trips.
  """
  found = loops.executed(hlo.parse(text), _find, lambda flops: flops, trips)
  return round(sum(flops * times for flops, times, _ in found))


def flops_of(instruction: hlo.Instruction) -> float:
  """Returns the FLOPs of one instruction: 0 where it is no such kernel."""
  if instruction.op != 'custom-call':
    return 0.0
  # Scopes end where the kernel's own names begin.
  label = _FORWARD.search(instruction.op_name)
  if label is None:
    return 0.0
  own = instruction.op_name[label.end() :]
  factor = next((n for part, n in _FACTORS.items() if part in own), 1.0)
  return float(label[1]) * factor


def _find(scope: loops.Scope, instruction: hlo.Instruction) -> list[float]:
  flops = flops_of(instruction)
  return [flops] if flops else []

"""The FLOPs of kernels, whose text is not HLO: told by their names."""

import re

from t2x.attention import splash
from t2x.hlo import execution
from t2x.hlo import module

# Beside a kernel, its scopes hold calls of the compiler's own.
_KERNEL = re.compile(r'target="(tpu_custom_call|__gpu\$xla\.gpu\.triton)"')
_LABEL = re.compile(splash.FLOPS + r'(\d+)')
# Products of a TPU's backward kernel of attention for each of the forward
# pass's two: scores, dP, dV and dK, or scores, dP and dQ. A GPU's has a label
# of its own; the sums that go before it are no products.
_FACTORS = {'_dkv_': 2.0, '_dq_': 1.5, '_preprocess_': 0.0}


def kernel_flops(text: str, trips: execution.Trips | None = None) -> int:
  """Returns the FLOPs of the products in kernels, on one device.

  Those of attention, and of experts without a capacity.

  Args:
    text: of `compiled.as_text()`.
    trips: of loops of which the text does not tell them.

  Raises:
    ValueError: a loop with kernels in it has an unknown number of trips.
  """
  found = execution.executed(
    module.parse(text), _find, lambda flops: flops, trips
  )
  return round(sum(flops * times for flops, times, _ in found))


def flops_of(instruction: module.Instruction) -> float:
  """Returns the FLOPs of one instruction: 0 where it is no such kernel."""
  if instruction.op != 'custom-call':
    return 0.0
  if not _KERNEL.search(instruction.attributes):
    return 0.0
  return flops_named(instruction.op_name) or 0.0


def flops_named(path: str) -> float | None:
  """Returns the FLOPs of a kernel by the scopes that it is in, if they tell.

  Args:
    path: the scopes, and the kernel's own names after them.
  """
  label = _LABEL.search(path)
  if label is None:
    return None
  own = path[label.end() :]
  factor = next((n for part, n in _FACTORS.items() if part in own), 1.0)
  return float(label[1]) * factor


def _find(
  scope: execution.Scope, instruction: module.Instruction
) -> list[float]:
  flops = flops_of(instruction)
  return [flops] if flops else []

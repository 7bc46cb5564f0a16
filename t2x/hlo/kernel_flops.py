"""Reads the FLOPs of custom kernels from labels in their names.

The code of a kernel is not HLO, so its products cannot be counted there.
"""

import re

from t2x.attention import splash
from t2x.hlo import execution
from t2x.hlo import module

# A kernel; in the same scopes there are custom calls that the compiler makes.
_KERNEL = re.compile(r'target="(tpu_custom_call|__gpu\$xla\.gpu\.triton)"')
_LABEL = re.compile(splash.FLOPS + r'(\d+)')
# FLOPs of the backward kernels of attention on a TPU, over those of the forward
# pass, which computes two products. The kernel of dK and dV computes four
# (scores, dP, dV and dK), that of dQ three (scores, dP and dQ). A GPU's kernel
# has its own label; the sums that are computed before it are no products.
_FACTORS = {'_dkv_': 2.0, '_dq_': 1.5, '_preprocess_': 0.0}


def kernel_flops(text: str, trips: execution.Trips | None = None) -> int:
  """Returns the FLOPs of the products in kernels, on one device.

  The kernels are those of attention, and of experts without a capacity.

  Args:
    text: the program, as `compiled.as_text()` prints it.
    trips: trip counts of the loops whose text does not hold them.

  Raises:
    ValueError: a loop with kernels in it has an unknown number of trips.
  """
  return execution.total(text, lambda _, i: flops_of(i) or None, trips)


def flops_of(instruction: module.Instruction) -> float:
  """Returns the FLOPs of one instruction; 0 if it is no labelled kernel."""
  if instruction.op != 'custom-call':
    return 0.0
  if not _KERNEL.search(instruction.attributes):
    return 0.0
  return flops_named(instruction.op_name) or 0.0


def flops_named(path: str) -> float | None:
  """Returns the FLOPs in the label of a kernel; None if it has no label.

  Args:
    path: the scopes of the kernel, and its own names after them, such as those
      of the passes forward and backward.
  """
  label = _LABEL.search(path)
  if label is None:
    return None
  names = path[label.end() :]
  factor = next((n for part, n in _FACTORS.items() if part in names), 1.0)
  return float(label[1]) * factor

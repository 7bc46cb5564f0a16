"""Counts the FLOPs of the matrix products in a compiled program."""

import math
import re

import numpy as np

from t2x.hlo import execution
from t2x.hlo import module


def matrix_flops(text: str, trips: execution.Trips | None = None) -> int:
  """Returns the FLOPs of products and convolutions on one device.

  A product of (M, K) and (K, N) takes 2 M N K. Of a convolution (which is how
  a TPU writes a product) only positions within its input count. Kernels that
  are not HLO (Pallas, cuDNN) are not counted.

  Args:
    text: the program, as `compiled.as_text()` prints it.
    trips: trip counts of the loops whose text does not hold them.

  Raises:
    ValueError: a loop with products in it has an unknown number of trips.
  """
  return execution.total(text, lambda s, i: flops_of(s, i) or None, trips)


def flops_of(scope: execution.Scope, instruction: module.Instruction) -> int:
  """Returns the FLOPs of one instruction; 0 if it is no product."""
  if instruction.op == 'convolution':
    return _convolution(scope, instruction)
  if instruction.op == 'dot':
    pattern = r'lhs_contracting_dims=\{([\d,]*)\}'
  elif re.search(
    r'target="__cublas\$(gemm|lt\$matmul)', instruction.attributes
  ):
    pattern = r'lhs_contracting_dimensions\W*:\[([^\]]*)\]'
  else:
    return 0
  dims = re.search(pattern, instruction.attributes)
  assert dims, instruction.attributes
  lhs = _dims(scope.type_of(instruction.operands[0]))
  contracted = [lhs[int(i)] for i in re.findall(r'\d+', dims[1])]
  return 2 * math.prod(_dims(instruction.type)) * math.prod(contracted)


def _dims(type_: str) -> tuple[int, ...]:
  return module.shapes(type_)[0][1]


def _convolution(
  scope: execution.Scope, instruction: module.Instruction
) -> int:
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.attributes)
  assert labels, instruction.attributes
  # The kernel's input features are those of one group already.
  left, right = (scope.type_of(name) for name in instruction.operands[:2])
  lhs, rhs, out = (
    dict(zip(names, _dims(type_)))
    for names, type_ in zip(labels.groups(), (left, right, instruction.type))
  )
  window = re.search(r'window=\{([^}]*)\}', instruction.attributes)
  settings = (
    dict(pair.split('=') for pair in window[1].split()) if window else {}
  )
  spatial = sorted(label for label in lhs if label.isdigit())
  flops = 2 * out['b'] * out['f'] * rhs['i']
  for i, label in enumerate(spatial):
    get = lambda name, default, i=i: int(
      settings[name].split('x')[i].split('_')[0]
      if name in settings
      else default
    )
    flops *= overlaps(
      lhs[label],
      rhs[label],
      out[label],
      before=get('pad', 0),
      stride=get('stride', 1),
      spread=get('lhs_dilate', 1),
      dilation=get('rhs_dilate', 1),
    )
  return flops


def overlaps(
  size: int,
  kernel: int,
  out: int,
  *,
  before: int,
  stride: int,
  spread: int,
  dilation: int,
) -> int:
  """Counts the multiplications of a convolution along one dimension.

  Those are the pairs of a kernel position and an output position that read an
  element of the input, and not its padding.

  Args:
    size: number of elements of the input.
    kernel: number of elements of the kernel.
    out: number of elements of the output.
    before: padding in front of the input; a negative one cuts the input.
    stride: steps of the kernel from one output position to the next.
    spread: dilation of the input.
    dilation: dilation of the kernel.
  """
  starts = np.arange(out) * stride - before
  count = 0
  for k in range(kernel):
    at = starts + k * dilation
    inside = (at >= 0) & (at < (size - 1) * spread + 1) & (at % spread == 0)
    count += int(inside.sum())
  return count

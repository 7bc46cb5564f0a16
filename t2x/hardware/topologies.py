"""Parses names of accelerators: `v5e:4x4`, `h100:8`.

The name of TPUs is the kind of chip and the shape of a slice in chips; the name
of GPUs is the kind and the number in a node. A slice or node that does not
exist is refused with a message that lists those that do. Compilers accept more
of them, but some then end the process.

Sources: docs.cloud.google.com/tpu/docs, the page of each version, for shapes
and sizes of slices; `gpu_targets` for nodes.
"""

from collections.abc import Iterable
import dataclasses
import difflib
import itertools
import math
import re

from t2x.hardware import gpu_targets


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slices:
  """Slices in which one kind of TPU is available.

  Attributes:
    max_chips: number of chips of the largest slice.
    shapes: shapes of the small slices, in chips.
    cubes: True if larger slices have three sides, each a multiple of four.
    name: libtpu's name for the chip.
  """

  max_chips: int
  shapes: tuple[tuple[int, ...], ...]
  cubes: bool
  name: str

  @property
  def num_dims(self) -> int:
    """Number of sides of a slice."""
    return 3 if self.cubes else 2


_FLAT = (1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)
_SMALL = (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)
TPUS = {
  'v4': Slices(max_chips=4096, shapes=_SMALL, cubes=True, name='v4'),
  'v5e': Slices(max_chips=256, shapes=_FLAT, cubes=False, name='v5e'),
  'v5p': Slices(max_chips=8960, shapes=_SMALL, cubes=True, name='v5p'),
  'v6e': Slices(max_chips=256, shapes=_FLAT, cubes=False, name='v6e'),
  '7x': Slices(max_chips=9216, shapes=_SMALL, cubes=True, name='tpu7x'),
}
_ALIASES = {'tpu7x': '7x', 'v7x': '7x', 'a100-80': 'a100'}
_FORM = (
  'A topology is a kind of TPU and the shape of a slice in chips, v5e:4x4, or '
  'a kind of GPU and their number in a node, h100:8'
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
  """A slice of TPUs or a node of GPUs.

  Attributes:
    chip: a name of `machines.CHIPS`.
    shape: shape of a slice in chips, or (number of GPUs in a node,).
  """

  chip: str
  shape: tuple[int, ...]

  @property
  def is_gpu(self) -> bool:
    """Whether this is a node of GPUs."""
    return self.chip in gpu_targets.TARGETS

  @property
  def libtpu(self) -> str:
    """The name by which libtpu knows a slice."""
    return f'{TPUS[self.chip].name}:{_text(self.shape)}'

  def __str__(self) -> str:
    return f'{self.chip}:{_text(self.shape)}'


def parse(name: str) -> Topology:
  """Parses the name of a topology.

  Args:
    name: name such as `v5e:4x4`, `v5p:4x4x8`, `7x:2x2x1`, `h100:8` or
      `a100-40:16`.

  Raises:
    ValueError: there is no such topology; the message lists similar ones and
      those that exist.
  """
  kind, _, size = name.strip().lower().partition(':')
  chip = _ALIASES.get(kind, kind)
  if chip not in TPUS and chip not in gpu_targets.TARGETS:
    raise ValueError(_unknown(name, kind))
  if not re.fullmatch(r'\d+(x\d+)*', size):
    raise ValueError(_no_size(name, chip))
  topology = Topology(chip=chip, shape=tuple(map(int, size.split('x'))))
  (_check_node if topology.is_gpu else _check_slice)(name, topology)
  return topology


def largest(name: str) -> tuple[int, str]:
  """Returns the chips of the largest slice or node of a kind, and its name.

  Args:
    name: name of any topology of that kind, as for `parse`.
  """
  chip = parse(name).chip
  if chip in TPUS:
    shape, *_ = _nearest(TPUS[chip], TPUS[chip].max_chips)
  else:
    shape = (gpu_targets.TARGETS[chip].node_sizes[-1],)
  return math.prod(shape), _names(chip, [shape])


def _unknown(name: str, kind: str) -> str:
  kinds = *TPUS, *gpu_targets.TARGETS
  close = difflib.get_close_matches(kind, kinds, n=2)
  hint = f' Did you mean {" or ".join(close)}?' if close else ''
  return (
    f'{name!r}: there is no kind {kind!r}.{hint} {_FORM}; kinds are '
    f'{", ".join(kinds)}.'
  )


def _no_size(name: str, chip: str) -> str:
  if chip in TPUS:
    shapes = _names(chip, TPUS[chip].shapes)
    return f'{name!r} needs the shape of a slice in chips: {shapes}.'
  sizes = _names(chip, [(n,) for n in gpu_targets.TARGETS[chip].node_sizes])
  return f'{name!r} needs the number of GPUs in a node: {sizes}.'


def _check_node(name: str, topology: Topology) -> None:
  sizes = gpu_targets.TARGETS[topology.chip].node_sizes
  if topology.shape in [(n,) for n in sizes]:
    return
  exist = _names(topology.chip, [(n,) for n in sizes])
  total, most = math.prod(topology.shape), sizes[-1]
  advice = ''
  if total > most:
    nodes = -(-total // most)
    advice = (
      f' {nodes} nodes are {topology.chip}:{most} with num_slices={nodes}.'
    )
  raise ValueError(
    f'{name!r}: there is no such node. There are {exist}.{advice}'
  )


def _check_slice(name: str, topology: Topology) -> None:
  slices, shape = TPUS[topology.chip], topology.shape
  dims, chips = slices.num_dims, math.prod(shape)
  has_dims = len(shape) == dims
  if has_dims and _exists(slices, shape):
    return
  if not has_dims:
    reason = f'a slice has {dims} sides in chips, and this has {len(shape)}'
  elif chips > slices.max_chips:
    reason = f'the largest slice has {slices.max_chips:,} chips, this {chips:,}'
  else:
    reason = 'there is no such slice'
  exist = _names(topology.chip, slices.shapes)
  if slices.cubes:
    exist += f', and sides of multiples of 4, up to {slices.max_chips:,} chips'
  near = _names(topology.chip, _nearest(slices, chips))
  raise ValueError(f'{name!r}: {reason}. Near are {near}. There are {exist}.')


def _exists(slices: Slices, shape: tuple[int, ...]) -> bool:
  if not slices.cubes:
    return tuple(sorted(shape)) in slices.shapes
  cubes = min(shape) > 0 and not any(side % 4 for side in shape)
  return shape in slices.shapes or (
    cubes and math.prod(shape) <= slices.max_chips
  )


def _nearest(slices: Slices, chips: int) -> list[tuple[int, ...]]:
  """Returns the two shapes nearest to a number of chips, the nearest first."""
  shapes = list(slices.shapes)
  if slices.cubes:
    sides = range(4, 29, 4)
    cubes = itertools.combinations_with_replacement(sides, 3)
    shapes += [cube for cube in cubes if math.prod(cube) <= slices.max_chips]
  distance = lambda s: abs(math.log(math.prod(s) / max(chips, 1)))
  return sorted(shapes, key=lambda s: (distance(s), sum(s)))[:2]


def _names(chip: str, shapes: Iterable[tuple[int, ...]]) -> str:
  return ', '.join(f'{chip}:{_text(shape)}' for shape in shapes)


def _text(shape: tuple[int, ...]) -> str:
  return 'x'.join(map(str, shape))

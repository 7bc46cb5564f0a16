"""A table of how a layout shards every array of a train state.

table = sharding_table.make(config, num_devices=256)
print(sharding_table.text(table))

An array is replicated if `copies` > 1 devices hold the same part of it. Of the
bytes that all devices hold of it, the share 1 - 1 / copies are copies beyond
the first: 0 if every byte lies on one device alone, and 7 / 8 if each of eight
devices has the whole array. Nothing is allocated or compiled.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import html
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh
import numpy as np

from t2x.config import abstract_state
from t2x.config import experiment
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding
from t2x.tracking import text_table

PARAMETERS = 'parameters'
# Field of the train state -> its name in the table.
_GROUPS = {
  'model': PARAMETERS,
  'opt_state': 'optimizer state',
  'ema': 'moving average',
  'counters': 'counters',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayRow:
  """One array.

  Attributes:
    path: dotted path within its part of the train state.
    shape: shape of the whole array.
    dtype: name of its dtype.
    axes: logical axis of each dimension; () if they are not known.
    cuts: mesh axes that split each dimension, the outermost first.
    num_bytes: bytes of the whole array.
    bytes_per_device: bytes of one device's part.
    copies: number of devices that hold the same part.
  """

  path: str
  shape: tuple[int, ...]
  dtype: str
  axes: tuple[str | None, ...]
  cuts: tuple[tuple[str, ...], ...]
  num_bytes: int
  bytes_per_device: int
  copies: int

  @property
  def replicated(self) -> float:
    """Share of the bytes on all devices that are copies beyond the first."""
    return 1 - 1 / self.copies

  @property
  def spare_bytes(self) -> int:
    """Bytes of a device that would be free if the array were not copied."""
    return self.bytes_per_device - self.bytes_per_device // self.copies

  @property
  def spec(self) -> str:
    """The PartitionSpec as it is written in code."""
    entries = [a[0] if len(a) == 1 else a or None for a in self.cuts]
    return f'P({", ".join(map(repr, entries))})'


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingTable:
  """A train state on a mesh.

  Attributes:
    sizes: number of devices along each mesh axis, in the mesh's order.
    groups: arrays of each part of the state that has any.
  """

  sizes: dict[str, int]
  groups: dict[str, tuple[ArrayRow, ...]]

  @property
  def num_devices(self) -> int:
    """Number of devices of the mesh."""
    return math.prod(self.sizes.values())

  @property
  def layout(self) -> str:
    """The axes of more than one device: `fsdp=64, tensor=4`."""
    return layout_text(self.sizes)

  def _repr_html_(self) -> str:
    """Returns the table as a notebook shows it."""
    return f'<pre>{html.escape(text(self))}</pre>'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Total:
  """Sums over some arrays.

  Attributes:
    num_bytes: bytes of the whole arrays.
    bytes_per_device: bytes of one device's parts.
    replicated: share of the bytes on all devices that are copies beyond the
      first.
  """

  num_bytes: int
  bytes_per_device: int
  replicated: float


def make(config: experiment.Experiment, num_devices: int) -> ShardingTable:
  """Returns the table of an experiment's train state.

  Args:
    config: the experiment.
    num_devices: number of devices of its mesh.

  Raises:
    ShardingError: the layout is impossible.
  """
  sizes = mesh_lib.sizes(config.mesh, num_devices)
  mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
  state, _ = abstract_state.shapes_of(config, mesh)
  parts = {
    'model': state.model,
    'opt_state': state.opt_state,
    'ema': state.ema,
    'counters': {'step': state.step, 'num_skipped': state.num_skipped},
  }
  groups = {
    name: tuple(_rows(parts[part], sizes, part != 'opt_state'))
    for part, name in _GROUPS.items()
  }
  groups = {name: rows for name, rows in groups.items() if rows}
  return ShardingTable(sizes=sizes, groups=groups)


def _rows(
  tree: Any, sizes: Mapping[str, int], has_axes: bool
) -> Iterator[ArrayRow]:
  """Yields the arrays of a part of the train state.

  Args:
    tree: the part, with sharded shapes as its arrays.
    sizes: number of devices along each mesh axis.
    has_axes: True if its variables have the logical axes of their arrays.
  """
  leaves = jax.tree_util.tree_leaves_with_path(
    tree, is_leaf=sharding.is_variable
  )
  for path, leaf in leaves:
    variable = sharding.is_variable(leaf)
    array = leaf.get_value() if variable else leaf
    if not hasattr(array, 'shape'):
      continue  # Leaves that optax masks.
    # A factored moment of an optimizer has lost a dimension of its parameter.
    axes = sharding.axes_of(leaf, array.ndim) if variable and has_axes else ()
    yield _row(sharding.path_name(path), array, axes, sizes)


def _row(
  path: str,
  array: jax.ShapeDtypeStruct,
  axes: Sequence[str | None],
  sizes: Mapping[str, int],
) -> ArrayRow:
  placement: Any = array.sharding
  missing = len(array.shape) - len(placement.spec)
  spec = tuple(placement.spec) + (None,) * missing
  cuts = tuple(sharding.mesh_axes(entry) for entry in spec)
  parts = math.prod(sizes[a] for axes_of_dim in cuts for a in axes_of_dim)
  item = np.dtype(array.dtype).itemsize
  return ArrayRow(
    path=path,
    shape=tuple(array.shape),
    dtype=np.dtype(array.dtype).name,
    axes=tuple(axes),
    cuts=cuts,
    num_bytes=item * math.prod(array.shape),
    bytes_per_device=item * math.prod(placement.shard_shape(array.shape)),
    copies=math.prod(sizes.values()) // parts,
  )


def total(table: ShardingTable, group: str | None = None) -> Total:
  """Returns the sums over the arrays of a train state.

  Args:
    table: the train state.
    group: name of the part to sum; None sums all of it.
  """
  groups = table.groups.values() if group is None else [table.groups[group]]
  rows = [row for part in groups for row in part]
  whole = sum(row.num_bytes for row in rows)
  local = sum(row.bytes_per_device for row in rows)
  share = 1 - whole / (local * table.num_devices) if local else 0.0
  return Total(num_bytes=whole, bytes_per_device=local, replicated=share)


def largest_copies(table: ShardingTable, most: int = 3) -> list[ArrayRow]:
  """Returns the replicated parameters whose copies take most memory.

  Args:
    table: the train state.
    most: largest number of parameters to return.
  """
  copied = [row for row in table.groups[PARAMETERS] if row.copies > 1]
  return sorted(copied, key=lambda row: -row.spare_bytes)[:most]


def copied_over(row: ArrayRow, table: ShardingTable) -> dict[str, int]:
  """Returns the mesh axes along which an array is copied, and their sizes."""
  used = {axis for axes in row.cuts for axis in axes}
  return {a: n for a, n in table.sizes.items() if n > 1 and a not in used}


# --- As text and as JSON. ---


def layout_text(sizes: Mapping[str, int]) -> str:
  """Returns the axes of more than one device: `fsdp=64, tensor=4`."""
  axes = [f'{a}={n}' for a, n in sizes.items() if n > 1]
  return ', '.join(axes) or 'one device'


def bytes_text(num: float) -> str:
  """Returns bytes to three digits or more: `12 B`, `1.57 MB`, `1,230 GB`."""
  for unit, size in (('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
    if num >= 0.9995 * size:
      value = num / size
      digits = max(0, 2 - int(math.log10(value * 1.0005)))
      return f'{value:,.{digits}f} {unit}'
  return f'{num:,.0f} B'


def percent(share: float) -> str:
  """Returns a share as a percentage: `12.5%`."""
  return f'{100 * share:.1f}%'


def copies_text(row: ArrayRow, table: ShardingTable) -> str:
  """Returns the number of an array's copies and their mesh axes, or 'none'."""
  copied = copied_over(row, table)
  if row.copies == 1:
    return 'none'
  return f'{row.copies} over {", ".join(f"{a}={n}" for a, n in copied.items())}'


def text(table: ShardingTable) -> str:
  """Returns the parameters and the totals as a table of text."""
  header = 'parameter shape dtype axes spec B/device copies replicated'.split()
  rows = [
    [
      row.path,
      'x'.join(map(str, row.shape)) or 'scalar',
      row.dtype,
      ','.join(axis or '-' for axis in row.axes),
      row.spec,
      f'{row.bytes_per_device:,}',
      f'{row.copies}',
      percent(row.replicated),
    ]
    for row in table.groups[PARAMETERS]
  ]
  return '\n'.join(
    [*text_table.aligned([header, *rows], '<<<<<>>>'), '', *_totals(table)]
  )


def _totals(table: ShardingTable) -> list[str]:
  sums = {name: total(table, name) for name in table.groups}
  sums['all'] = total(table)
  rows = [['', 'whole', 'on each device', 'replicated']]
  rows += [
    [name, bytes_text(s.num_bytes), bytes_text(s.bytes_per_device)]
    + [percent(s.replicated)]
    for name, s in sums.items()
  ]
  largest = [
    f'{row.path} ({bytes_text(row.bytes_per_device)} on each device, copies: '
    f'{copies_text(row, table)})'
    for row in largest_copies(table)
  ]
  return [
    f'{table.layout} ({table.num_devices} devices)',
    *text_table.aligned(rows, '<>>>'),
    f'largest replicated: {"; ".join(largest) or "none"}',
    'replicated: of the bytes on all devices, the share that are copies beyond '
    'the first.',
  ]


def to_json(table: ShardingTable) -> dict[str, Any]:
  """Returns the table as nested dicts, lists and scalars."""
  entry = lambda row: {
    **dataclasses.asdict(row),
    'spec': row.spec,
    'replicated': row.replicated,
  }
  groups = {name: list(map(entry, rows)) for name, rows in table.groups.items()}
  sums = {name: dataclasses.asdict(total(table, name)) for name in table.groups}
  return {
    'mesh': table.sizes,
    'num_devices': table.num_devices,
    'totals': {**sums, 'all': dataclasses.asdict(total(table))},
    **groups,
  }

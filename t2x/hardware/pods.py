"""TPU slices as Google Cloud names them: types, machines, hosts, labels.

pod = pods.parse('v5p-128', num_slices=2)    # or 'v5p:4x4x4'
pod.num_hosts, pod.machine, pod.accelerator

Sources: cloud.google.com/tpu/docs, the page of each version, and the tables of
xpk (commit 367c838). A name such as v5p-128 counts TensorCores on v4, v5p and
7x, two in a chip, and chips on v5e and v6e.
"""

import dataclasses
import difflib
import math
import re

from t2x.hardware import topologies


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kind:
  """What is the same for all slices of one version.

  Attributes:
    prefix: start of the name of an accelerator type.
    cores: number by which that name counts a chip.
    label: value of the node label cloud.google.com/gke-tpu-accelerator.
    machine: machine type of a host with four chips.
    runtime: software version of a TPU VM.
    devices: devices of a chip, as JAX counts them.
    single: machine type of a host with one chip; None where there is none.
  """

  prefix: str
  cores: int
  label: str
  machine: str
  runtime: str
  devices: int = 1
  single: str | None = None


_KINDS = {
  'v4': _Kind(
    prefix='v4',
    cores=2,
    label='tpu-v4-podslice',
    machine='ct4p-hightpu-4t',
    runtime='tpu-ubuntu2204-base',
  ),
  'v5e': _Kind(
    prefix='v5litepod',
    cores=1,
    label='tpu-v5-lite-podslice',
    machine='ct5lp-hightpu-4t',
    runtime='v2-alpha-tpuv5-lite',
    single='ct5lp-hightpu-1t',
  ),
  'v5p': _Kind(
    prefix='v5p',
    cores=2,
    label='tpu-v5p-slice',
    machine='ct5p-hightpu-4t',
    runtime='v2-alpha-tpuv5',
  ),
  'v6e': _Kind(
    prefix='v6e',
    cores=1,
    label='tpu-v6e-slice',
    machine='ct6e-standard-4t',
    runtime='v2-alpha-tpuv6e',
    single='ct6e-standard-1t',
  ),
  '7x': _Kind(
    prefix='tpu7x',
    cores=2,
    label='tpu7x',
    machine='tpu7x-standard-4t',
    runtime='v2-alpha-tpu7-ubuntu2404',
    devices=2,
  ),
}
_PREFIXES = {'v5e': 'v5e', '7x': '7x', 'v7x': '7x'} | {
  kind.prefix: chip for chip, kind in _KINDS.items()
}
_CHIPS_A_HOST = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pod:
  """Slices of one kind and shape.

  Attributes:
    topology: one slice.
    num_slices: number of slices.
  """

  topology: topologies.Topology
  num_slices: int = 1

  @property
  def _kind(self) -> _Kind:
    return _KINDS[self.topology.chip]

  @property
  def chips(self) -> int:
    """Number of chips of a slice."""
    return math.prod(self.topology.shape)

  @property
  def hosts(self) -> int:
    """Number of hosts of a slice."""
    return max(self.chips // _CHIPS_A_HOST, 1)

  @property
  def chips_per_host(self) -> int:
    """Number of chips of a host."""
    return min(self.chips, _CHIPS_A_HOST)

  @property
  def num_devices(self) -> int:
    """Number of devices of all slices, as JAX counts them."""
    return self.chips * self._kind.devices * self.num_slices

  @property
  def shape(self) -> str:
    """Shape of a slice in chips, as text: '4x4x8'."""
    return 'x'.join(map(str, self.topology.shape))

  @property
  def accelerator(self) -> str:
    """Accelerator type of a slice: 'v5p-128', 'v5litepod-16'."""
    return f'{self._kind.prefix}-{self.chips * self._kind.cores}'

  @property
  def prefix(self) -> str:
    """Start of the accelerator type: 'v5p', 'v5litepod'."""
    return self._kind.prefix

  @property
  def has_default_shape(self) -> bool:
    """Whether its accelerator type alone stands for this shape."""
    try:
      return parse(self.accelerator).topology.shape == self.topology.shape
    except ValueError:
      return False

  @property
  def label(self) -> str:
    """Value of the node label cloud.google.com/gke-tpu-accelerator."""
    return self._kind.label

  @property
  def machine(self) -> str:
    """Machine type of a host."""
    single = self._kind.single
    return single if self.chips == 1 and single else self._kind.machine

  @property
  def runtime(self) -> str:
    """Software version of a TPU VM."""
    return self._kind.runtime


def of_launcher(name: str, num_slices: int = 1) -> Pod:
  """Returns the slices of a launcher's fields, which messages name."""
  try:
    return parse(name, num_slices)
  except ValueError as error:
    raise ValueError(
      f'launcher.slice={name}, num_slices={num_slices}: {error}'
    ) from error


def parse(name: str, num_slices: int = 1) -> Pod:
  """Returns the slices of a name.

  Args:
    name: accelerator type, such as 'v5e-16', 'v5litepod-16' or 'v5p-128', or
      topology, such as 'v5p:4x4x4'.
    num_slices: number of slices.

  Raises:
    ValueError: there is no such slice; the message names the nearest.
  """
  if num_slices < 1:
    raise ValueError(f'num_slices={num_slices}; it is 1 or more.')
  if ':' in name:
    topology = topologies.parse(name)
    if topology.is_gpu:
      raise ValueError(f'{name!r} are GPUs, and this needs a slice of TPUs.')
    return Pod(topology=topology, num_slices=num_slices)
  match = re.fullmatch(r'(?P<prefix>.+)-(?P<size>\d+)', name.strip().lower())
  chip = _PREFIXES.get(match['prefix']) if match else None
  if match is None or chip is None:
    chips = [c for c in _PREFIXES if name.lower().startswith(c)]
    examples = [e for e in _examples() if e.startswith(tuple(chips))]
    close = difflib.get_close_matches(
      name.lower(), examples or _examples(), n=2, cutoff=0.3
    )
    hint = f' Did you mean {" or ".join(close)}?' if close else ''
    raise ValueError(
      f'{name!r} is no slice of TPUs.{hint} Slices are named like '
      'v4-32, v5e-16, v5p-128, v6e-256 and tpu7x-128, or by their shape, like '
      'v5p:4x4x4.'
    )
  sizes = {pod.accelerator.rpartition('-')[2]: pod for pod in _pods(chip)}
  if match['size'] not in sizes:
    size = int(match['size'])
    near = sorted(sizes, key=lambda n: abs(math.log(int(n) / max(size, 1))))[:2]
    prefix = match['prefix']
    raise ValueError(
      f'{name!r}: there is no such slice. Near are '
      f'{" and ".join(f"{prefix}-{n}" for n in sorted(near, key=int))}.'
    )
  return dataclasses.replace(sizes[match['size']], num_slices=num_slices)


def _pods(chip: str) -> list[Pod]:
  """Returns a slice of each size, of those of one size the most compact."""
  slices = topologies.TPUS[chip]
  shapes = list(slices.shapes)
  if slices.cubes:
    sides = [4 * 2**i for i in range(6)]
    shapes += [
      (a, b, c)
      for a in sides
      for b in sides
      for c in sides
      if a <= b <= c <= 2 * a * 2 and a * b * c <= slices.max_chips
    ]
  by_size: dict[int, tuple[int, ...]] = {}
  for shape in sorted(shapes, key=sum):
    by_size.setdefault(math.prod(shape), shape)
  return [
    Pod(topology=topologies.Topology(chip=chip, shape=shape))
    for _, shape in sorted(by_size.items())
  ]


def _examples() -> list[str]:
  return [pod.accelerator for chip in _KINDS for pod in _pods(chip)]

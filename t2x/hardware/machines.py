"""Accelerator chips and machines: names, memory, bandwidth, compiler options.

The function `machines()` of an experiment names the machines that its config
runs on, and the settings that differ on each; `--machine=NAME` chooses one.
Every program of a run is compiled with `compiler_options`, with or without that
flag.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import difflib
from typing import Any

from t2x.hardware import compiler_options as compiler_options_lib
from t2x.parallel import mesh as mesh_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
  """Devices to run on, and the settings that they need.

  Attributes:
    chip: name of the kind of device, one of `CHIPS`.
    num_devices: number of devices of all slices, as JAX counts them.
    num_slices: number of slices; a node of GPUs is a slice.
    settings: settings of the experiment for this machine, such as mesh, remat
      and batch, as `name=value` for --set.
  """

  chip: str
  num_devices: int
  num_slices: int = 1
  settings: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    if self.chip not in CHIPS:
      raise ValueError(
        f'Machine(chip={self.chip!r}); it is one of {", ".join(CHIPS)}.'
      )
    if self.num_devices < 1 or self.num_slices < 1:
      raise ValueError(
        f'A machine has {self.num_devices} devices in {self.num_slices} '
        'slices; there is at least one of each.'
      )
    if self.num_devices % self.num_slices:
      raise ValueError(
        f'{self.num_devices} devices cannot lie in {self.num_slices} slices of '
        'one size. Give the devices of all slices.'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One kind of device.

  Attributes:
    kinds: prefixes of JAX's `device_kind`.
    memory: bytes of memory of one JAX device; a TPU7x chip is two devices.
    bandwidth: bandwidth of a device's memory, in bytes per second.
    link: bandwidth of one link to a neighbour on the torus in one direction, in
      bytes per second; for a GPU that of all its links into the node's switch.
    network: bandwidth of a device to other slices or nodes, in bytes per
      second.
    options: function from the number of slices to options of the compiler.
  """

  kinds: tuple[str, ...]
  memory: float
  bandwidth: float
  link: float
  network: float
  options: Callable[[int], compiler_options_lib.Options]


# Memory, its bandwidth and the links as on the pages that flops.py names: a
# page gives the sum over a chip's links (4 on v5e and v6e, 6 on the others) in
# both directions. Between slices of TPUs: "How to Scale Your Model" (Google
# DeepMind, 2025), the table of TPU specs. GPUs: data sheets of DGX systems,
# NVLink one way and a network port for each GPU. The first entry whose kind
# matches is a device's.
CHIPS = {
  'v4': Chip(
    kinds=('TPU v4',),
    memory=32e9,
    bandwidth=1.2e12,
    link=50e9,
    network=6.25e9,
    options=compiler_options_lib.v4,
  ),
  'v5e': Chip(
    kinds=('TPU v5 lite', 'TPU v5e'),
    memory=16e9,
    bandwidth=819e9,
    link=50e9,
    network=3.125e9,
    options=compiler_options_lib.v5e,
  ),
  # v5p calls itself 'TPU v5'.
  'v5p': Chip(
    kinds=('TPU v5',),
    memory=95e9,
    bandwidth=2.765e12,
    link=100e9,
    network=6.25e9,
    options=compiler_options_lib.v5p,
  ),
  'v6e': Chip(
    kinds=('TPU v6 lite', 'TPU v6e'),
    memory=32e9,
    bandwidth=1.638e12,
    link=100e9,
    network=12.5e9,
    options=compiler_options_lib.v6e,
  ),
  # Two devices share a chip's memory and links.
  '7x': Chip(
    kinds=('TPU7x', 'TPU v7x'),
    memory=96e9,
    bandwidth=3.69e12,
    link=50e9,
    network=6.25e9,
    options=compiler_options_lib.v7x,
  ),
  'a100-40': Chip(
    kinds=('NVIDIA A100-SXM4-40GB',),
    memory=40e9,
    bandwidth=1.555e12,
    link=300e9,
    network=25e9,
    options=compiler_options_lib.gpu,
  ),
  'a100': Chip(
    kinds=('NVIDIA A100',),
    memory=80e9,
    bandwidth=2.039e12,
    link=300e9,
    network=25e9,
    options=compiler_options_lib.gpu,
  ),
  'h100': Chip(
    kinds=('NVIDIA H100',),
    memory=80e9,
    bandwidth=3.35e12,
    link=450e9,
    network=50e9,
    options=compiler_options_lib.gpu,
  ),
  'h200': Chip(
    kinds=('NVIDIA H200',),
    memory=141e9,
    bandwidth=4.8e12,
    link=450e9,
    network=50e9,
    options=compiler_options_lib.gpu,
  ),
  'b200': Chip(
    kinds=('NVIDIA B200',),
    memory=180e9,
    bandwidth=8e12,
    link=900e9,
    network=50e9,
    options=compiler_options_lib.gpu,
  ),
}


def chip_of(device_kind: str) -> str | None:
  """Returns the name in `CHIPS` of a device; None for a CPU or unknown chip.

  Args:
    device_kind: JAX's `device_kind`, such as 'TPU v5 lite'.
  """
  if device_kind.startswith('TPU v4 lite'):  # Another chip than the v4.
    return None
  matches = (n for n, c in CHIPS.items() if device_kind.startswith(c.kinds))
  return next(matches, None)


def compiler_options(
  device_kind: str, num_slices: int = 1
) -> compiler_options_lib.Options:
  """Returns options of the compiler, for `jax.jit(compiler_options=...)`.

  Args:
    device_kind: JAX's `device_kind`, such as 'TPU v5 lite'.
    num_slices: number of slices that the devices lie in; options for the
      network between slices are only for several.

  Returns:
    Values by name; empty for an unknown chip.
  """
  if device_kind == 'cpu':
    return dict(compiler_options_lib.CPU)
  chip = chip_of(device_kind)
  return CHIPS[chip].options(num_slices) if chip else {}


def options_of(
  devices: Sequence[Any],
  overrides: Sequence[str] = (),
  *,
  diverge: bool = False,
) -> compiler_options_lib.Options:
  """Returns `compiler_options` of devices, with the user's overrides.

  Args:
    devices: the devices of a mesh.
    overrides: options of the user: 'name=value' adds or replaces one, 'name='
      removes one.
    diverge: True if some devices run parts of the program more often than
      others.
  """
  slices = mesh_lib.num_slices(devices)
  options = compiler_options(devices[0].device_kind, slices)
  if diverge and options:  # An unknown chip has no options.
    options |= _diverging(devices[0].device_kind)
  for text in overrides:
    name, _, value = text.partition('=')
    options.pop(name, None)
    if value:
      options[name] = value
  return options


def _diverging(device_kind: str) -> compiler_options_lib.Options:
  if device_kind.startswith('TPU'):
    return compiler_options_lib.DIVERGE_TPU
  is_gpu = device_kind.startswith('NVIDIA')
  return compiler_options_lib.DIVERGE_GPU if is_gpu else {}


def check_overrides(overrides: Sequence[str]) -> None:
  """Checks the form of overrides, as for `options_of`.

  Raises:
    ValueError: an override is not of the form xla_NAME=VALUE.
  """
  for text in overrides:
    name, equals, _ = text.partition('=')
    if not equals or not name.startswith('xla_'):
      raise ValueError(
        f'compiler_options={text!r}; an option is xla_NAME=VALUE, or xla_NAME= '
        'to leave it to the compiler. Several are separated by commas.'
      )


# --- A run's machine. ---


def find(machines: Mapping[str, Machine], name: str) -> Machine:
  """Returns the machine of a name.

  Args:
    machines: the machines of an experiment, by name.
    name: name of the machine, from --machine.

  Raises:
    ValueError: there is no such machine; the message lists similar names.
  """
  if name in machines:
    return machines[name]
  if not machines:
    raise ValueError(
      f'--machine={name}: this experiment lists no machines. Give its '
      'settings with --set instead.'
    )
  close = difflib.get_close_matches(name, machines, n=3, cutoff=0.4)
  hint = f' Did you mean {" or ".join(close)}?' if close else ''
  raise ValueError(
    f'--machine={name} is not one of this experiment.{hint} It has '
    f'{", ".join(machines)}.'
  )


def check(name: str, machine: Machine, devices: Sequence[Any]) -> None:
  """Checks that the devices are those of the named machine.

  Args:
    name: name of the machine, from --machine.
    machine: the machine of that name.
    devices: the devices of this process.

  Raises:
    ValueError: they are not; the message lists both.
  """
  kind, slices = devices[0].device_kind, mesh_lib.num_slices(devices)
  here = chip_of(kind), len(devices), slices
  if here == (machine.chip, machine.num_devices, machine.num_slices):
    return
  kinds = ' or '.join(repr(k) for k in CHIPS[machine.chip].kinds)
  raise ValueError(
    f'--machine={name} is {_count(machine.num_devices, machine.num_slices)} '
    f'of kind {kinds}, and this process sees {_count(len(devices), slices)} of '
    f'kind {kind!r}. Name the machine that this is, or leave --machine out and '
    'set mesh and batch with --set.'
  )


def _count(devices: int, slices: int) -> str:
  plural = lambda n, what: f'{n} {what}' + ('s' if n != 1 else '')
  return f'{plural(devices, "device")} in {plural(slices, "slice")}'

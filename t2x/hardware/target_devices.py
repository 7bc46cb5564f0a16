"""Devices that are not here, to compile programs for.

mesh = mesh_lib.make(config.mesh, target_devices.devices('v5e:2x4'))
compiled = target_devices.compile(lowering.lower_step(config, mesh))

Nothing is allocated. The TPU compiler (the extra `plan`) needs no TPU. The GPU
compiler (`plan-gpu`) needs no GPU and no CUDA.
"""

from collections.abc import Mapping
import functools
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies as jax_topologies

from t2x.hardware import backends
from t2x.hardware import gpu_targets
from t2x.hardware import topologies
from t2x.parallel import simulated_devices

# Read when libtpu is loaded. It then asks no cloud's metadata server, and
# several processes can load it at once.
_ENVIRONMENT = {
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
}
_MOST = 1024  # Most simulated devices; each has its own threads.


@functools.cache
def devices(
  topology: str, num_slices: int = 1, host: str | None = None
) -> tuple[Any, ...]:
  """Returns the devices of a topology.

  Args:
    topology: name of a slice or node, as for `topologies.parse`: `v5e:2x4` is
      a TPU slice of eight chips, `h100:8` a node of eight GPUs. `cpu:8` is
      eight devices that this machine simulates, for tests.
    num_slices: number of these slices or nodes; `mesh.slice_of` tells the one
      that a device lies in.
    host: shape of the chips of one TPU host, such as '2x4'; None for 2x2.

  Raises:
    ValueError: there is no such topology, or its compiler is not installed.
  """
  if topology.startswith('cpu:'):
    return _simulated(topology, num_slices, host)
  parsed = topologies.parse(topology)
  if num_slices < 1:
    raise ValueError(f'num_slices={num_slices}; there is at least one slice.')
  if host is not None and not re.fullmatch(r'\d+x\d+(x\d+)?', host):
    raise ValueError(
      f'Chips of a host are given as sides of a square or block, such as 2x4, '
      f'and not as {host!r}.'
    )
  try:
    if parsed.is_gpu:
      return tuple(_gpus(parsed, num_slices).devices)
    return tuple(_tpus(parsed, num_slices, host).devices)
  except jax.errors.JaxRuntimeError as error:
    first, *_ = str(error).splitlines()
    raise ValueError(
      f'The compiler for {topology} (num_slices={num_slices}) cannot describe '
      f'it: {first}'
    ) from None


def _tpus(
  topology: topologies.Topology, num_slices: int, host: str | None
) -> jax_topologies.TopologyDescription:
  if not backends.has_module('libtpu'):
    raise ValueError(
      f'Compiling for {topology} needs the TPU compiler, libtpu, which is not '
      "installed: pip install '.[plan]' (Linux on x86-64)."
    )
  options: dict[str, Any] = {}
  if num_slices > 1:
    options['num_slices'] = num_slices
  if topology.chip == 'v4':  # One device a chip, as in the cloud.
    options['chip_config_name'] = 'megacore'
  if host is not None:
    sides = [int(side) for side in host.split('x')]
    options['chips_per_host_bounds'] = (*sides, 1)[:3]
  elif math.prod(topology.shape) == 1:  # By default hosts have four chips.
    options['chips_per_host_bounds'] = (1, 1, 1)
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  return jax_topologies.get_topology_desc(topology.libtpu, 'tpu', **options)


def _gpus(
  topology: topologies.Topology, num_slices: int
) -> jax_topologies.TopologyDescription:
  if not any(map(backends.has_module, backends.CUDA)):
    raise ValueError(
      f"Compiling for {topology} needs XLA's GPU compiler, which is not "
      "installed: pip install '.[plan-gpu]' (Linux; no GPU is needed)."
    )
  try:
    return jax_topologies.get_topology_desc(
      topology.chip,
      'cuda',
      target_config=gpu_targets.text(topology.chip),
      topology=f'{num_slices}x1x{topology.shape[0]}',
    )
  except NotImplementedError:  # JAX did not accept the plugin.
    raise ValueError(
      f"Compiling for {topology} needs XLA's GPU compiler, which is installed "
      'but was refused as JAX started, with a message of its own. Set '
      'JAX_PLATFORMS=cpu, without which it looks for CUDA; the versions of '
      f'jax-cuda13-plugin and jax-cuda13-pjrt must be {jax.__version__}.'
    ) from None


def _simulated(
  topology: str, num_slices: int, host: str | None
) -> tuple[Any, ...]:
  number = topology.removeprefix('cpu:')
  if not number.isdigit() or int(number) < 1 or num_slices > 1 or host:
    raise ValueError(
      f'{topology}: simulated devices lie in one slice on one host and have a '
      'number alone, as in cpu:8.'
    )
  if int(number) > _MOST:
    raise ValueError(
      f'{topology}: a machine simulates at most {_MOST} devices. Name fewer, '
      'or a topology of TPUs or GPUs, which are compiled for and not simulated.'
    )
  simulated_devices.ask_for(int(number))
  simulated = tuple(jax.devices('cpu'))
  if len(simulated) != int(number):
    raise ValueError(
      f'{topology}: this process simulates {len(simulated)} devices already. '
      f'Give that number, or take {simulated_devices.COUNT} out of XLA_FLAGS.'
    )
  return simulated


def compile(
  lowered: jax.stages.Lowered, options: Mapping[str, Any] | None = None
) -> jax.stages.Compiled:
  """Compiles a program for devices that need not be here.

  Args:
    lowered: the program.
    options: options of the compiler, by name; None for its defaults.
  """
  # JAX's persistent cache can write programs of devices that are not here, but
  # not read them.
  name = 'jax_persistent_cache_min_compile_time_secs'
  before = getattr(jax.config, name)
  jax.config.update(name, 1e9)
  try:
    return lowered.compile(compiler_options=dict(options or {}))
  finally:
    jax.config.update(name, before)

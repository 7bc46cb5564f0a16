"""Steps compiled for devices that are not here.

mesh = mesh_lib.make(config.mesh, absent.devices('v5e:2x4'))
compiled = absent.compile(absent.lower_step(config, mesh))

Nothing is allocated. The TPU compiler (the extra `plan`) needs no TPU, the GPU
compiler (`plan-gpu`) no GPU and no CUDA: `target_devices.devices('h100:8')`.
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

# Read where libtpu is loaded: no question to a cloud's metadata server, and
# several processes at once.
_ENVIRONMENT = {
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
}
_MOST = 1024  # Each has threads of its own.


@functools.cache
def devices(
  topology: str, num_slices: int = 1, host: str | None = None
) -> tuple[Any, ...]:
  """Returns the devices of a topology, all in one program.

  Args:
    topology: of a slice, as `topologies.parse` reads it: `v5e:2x4` is a TPU
      slice of eight chips, `h100:8` a node of eight GPUs. `cpu:8` is eight
      devices that this machine simulates, to try things out.
    num_slices: how many of these slices or nodes; devices tell theirs by
      `slice_index`.
    host: shape of the chips of one TPU host, `2x4`; by default 2x2.

  Raises:
    ValueError: there is no such topology, or its compiler is not installed.
  """
  if topology.startswith('cpu:'):
    return _simulated(topology, num_slices, host)
  wanted = topologies.parse(topology)
  if num_slices < 1:
    raise ValueError(f'num_slices={num_slices}; there is at least one slice.')
  if host is not None and not re.fullmatch(r'\d+x\d+(x\d+)?', host):
    raise ValueError(
      f'Chips of a host are given as sides of a square or block, such as 2x4, '
      f'and not as {host!r}.'
    )
  try:
    if wanted.is_gpu:
      return tuple(_gpus(wanted, num_slices).devices)
    return tuple(_tpus(wanted, num_slices, host).devices)
  except jax.errors.JaxRuntimeError as error:
    first, *_ = str(error).splitlines()
    raise ValueError(
      f'The compiler for {topology} (num_slices={num_slices}) cannot describe '
      f'it: {first}'
    ) from None


def _tpus(wanted: topologies.Topology, num_slices: int, host: str | None):
  if not backends.has_module('libtpu'):
    raise ValueError(
      f'Compiling for {wanted} needs the TPU compiler, libtpu, which is not '
      "installed: pip install '.[plan]' (Linux on x86-64)."
    )
  options: dict[str, Any] = {}
  if num_slices > 1:
    options['num_slices'] = num_slices
  if wanted.chip == 'v4':  # One device a chip, as where they are rented.
    options['chip_config_name'] = 'megacore'
  if host is not None:
    sides = [int(side) for side in host.split('x')]
    options['chips_per_host_bounds'] = (*sides, 1)[:3]
  elif math.prod(wanted.shape) == 1:  # By default hosts have four.
    options['chips_per_host_bounds'] = (1, 1, 1)
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  return jax_topologies.get_topology_desc(wanted.libtpu, 'tpu', **options)


def _gpus(wanted: topologies.Topology, num_slices: int):
  if not any(map(backends.has_module, backends.CUDA)):
    raise ValueError(
      f"Compiling for {wanted} needs XLA's GPU compiler, which is not "
      "installed: pip install '.[plan-gpu]' (Linux; no GPU is needed)."
    )
  try:
    return jax_topologies.get_topology_desc(
      wanted.chip,
      'cuda',
      target_config=gpu_targets.text(wanted.chip),
      topology=f'{num_slices}x1x{wanted.shape[0]}',
    )
  except NotImplementedError:  # JAX has not taken the plugin.
    raise ValueError(
      f"Compiling for {wanted} needs XLA's GPU compiler, which is installed "
      'but was refused as JAX started, with a message of its own. Set '
      'JAX_PLATFORMS=cpu, without which it looks for CUDA; the versions of '
      f'jax-cuda13-plugin and jax-cuda13-pjrt must be {jax.__version__}.'
    ) from None


def _simulated(topology: str, num_slices: int, host: str | None):
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
  found = tuple(jax.devices('cpu'))
  if len(found) != int(number):
    raise ValueError(
      f'{topology}: this process simulates {len(found)} devices already. Give '
      f'that number, or take {simulated_devices.COUNT} out of XLA_FLAGS.'
    )
  return found


def compile(
  lowered: jax.stages.Lowered, options: Mapping[str, Any] | None = None
) -> jax.stages.Compiled:
  """Compiles a program for devices that may be absent.

  Args:
    lowered: the program.
    options: of the compiler.
  """
  # JAX's persistent cache can write the programs of absent devices, but not
  # read them.
  name = 'jax_persistent_cache_min_compile_time_secs'
  before = getattr(jax.config, name)
  jax.config.update(name, 1e9)
  try:
    return lowered.compile(compiler_options=dict(options or {}))
  finally:
    jax.config.update(name, before)

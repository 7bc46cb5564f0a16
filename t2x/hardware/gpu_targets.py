"""Descriptions of NVIDIA GPUs for XLA's compiler, where no GPU is present.

Sources: NVIDIA's data sheets of the A100, H100, H200 (SXM) and HGX B200, its
white papers on the A100 and H100 (multiprocessors, clocks), and the tables of
compute capabilities in the CUDA C++ Programming Guide. The B200's
multiprocessors, L2 and clock are those that its driver reports. Memory and its
bandwidth are those of `machines.CHIPS`.
"""

import dataclasses

from t2x.hardware import machines


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
  """One kind of GPU.

  Attributes:
    kind: JAX's `device_kind`, the name that the driver gives it.
    capability: CUDA compute capability, (major, minor).
    cores: number of streaming multiprocessors.
    l2: bytes of the L2 cache.
    clock: highest clock rate, in GHz.
    node_sizes: numbers of GPUs with which nodes are rented, ascending.
  """

  kind: str
  capability: tuple[int, int]
  cores: int
  l2: int
  clock: float
  node_sizes: tuple[int, ...] = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Capability:
  """Figures that all GPUs of a compute capability share.

  Attributes:
    units: number of float32 units of a multiprocessor.
    shared: shared memory of a multiprocessor, in KiB.
    suffix: XLA's name for instructions that only this capability has.
  """

  units: int
  shared: int
  suffix: str


_CAPABILITIES = {
  (8, 0): _Capability(units=64, shared=164, suffix='NONE'),
  (9, 0): _Capability(units=128, shared=228, suffix='ACCELERATED_FEATURES'),
  (10, 0): _Capability(units=128, shared=228, suffix='ACCELERATED_FEATURES'),
}

_A100 = Target(
  kind='NVIDIA A100-SXM4-80GB',
  capability=(8, 0),
  cores=108,
  l2=40 * 2**20,
  clock=1.41,
)
_H100 = Target(
  kind='NVIDIA H100 80GB HBM3',
  capability=(9, 0),
  cores=132,
  l2=50 * 2**20,
  clock=1.98,
)
# By the names of `machines.CHIPS`.
TARGETS = {
  'a100': _A100,
  'a100-40': dataclasses.replace(
    _A100,
    kind='NVIDIA A100-SXM4-40GB',
    node_sizes=(1, 2, 4, 8, 16),
  ),
  'h100': _H100,
  'h200': dataclasses.replace(_H100, kind='NVIDIA H200'),
  'b200': Target(
    kind='NVIDIA B200',
    capability=(10, 0),
    cores=148,
    l2=126 * 2**20,
    clock=1.965,
  ),
}

# Limits of a block of threads and of a multiprocessor are the same for all.
# CUDA keeps 1 KiB of the shared memory for itself.
_TEXT = """
gpu_device_info {{
  cuda_compute_capability {{
    major: {major} minor: {minor} feature_extension: {suffix}
  }}
  core_count: {cores}
  fpus_per_core: {units}
  clock_rate_ghz: {clock}
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2}
  device_memory_size: {memory}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {block}
  shared_memory_per_core: {shared}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{kind}"
"""


def text(name: str) -> str:
  """Returns the description of a GPU, a GpuTargetConfigProto in text form.

  Args:
    name: one of the names in `TARGETS`.
  """
  target, chip = TARGETS[name], machines.CHIPS[name]
  capability = _CAPABILITIES[target.capability]
  return _TEXT.format(
    major=target.capability[0],
    minor=target.capability[1],
    suffix=capability.suffix,
    cores=target.cores,
    units=capability.units,
    clock=target.clock,
    bandwidth=round(chip.bandwidth),
    l2=target.l2,
    memory=round(chip.memory),
    block=(capability.shared - 1) * 1024,
    shared=capability.shared * 1024,
    kind=target.kind,
  )

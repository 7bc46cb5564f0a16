"""NVIDIA GPUs as XLA's compiler wants them described where none is present.

Sources: NVIDIA's data sheets of the A100, H100, H200 (SXM) and HGX B200, its
white papers on the A100 and H100 (multiprocessors, clocks), and the tables of
compute capabilities in the CUDA C++ Programming Guide. The B200's
multiprocessors, L2 and clock are those that its driver reports.
"""

import dataclasses

from t2x.hardware import machines


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
  """One kind of GPU.

  Attributes:
    kind: its `device_kind`, as the driver names it.
    capability: of computing, major and minor.
    cores: multiprocessors.
    bandwidth: of its memory, bytes a second.
    l2: bytes of the second cache.
    clock: GHz, the highest.
    node_sizes: how many of them a node is rented with.
  """

  kind: str
  capability: tuple[int, int]
  cores: int
  bandwidth: float
  l2: int
  clock: float
  node_sizes: tuple[int, ...] = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Capability:
  """What all GPUs of a compute capability have.

  Attributes:
    units: float32 units of a multiprocessor.
    shared: KiB of memory that a multiprocessor's threads share.
    suffix: XLA's name for instructions of this capability alone.
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
  bandwidth=2.039e12,
  l2=40 * 2**20,
  clock=1.41,
)
_H100 = Target(
  kind='NVIDIA H100 80GB HBM3',
  capability=(9, 0),
  cores=132,
  bandwidth=3.35e12,
  l2=50 * 2**20,
  clock=1.98,
)
# By the names of `machines.CHIPS`, which has their memory.
TARGETS = {
  'a100': _A100,
  'a100-40': dataclasses.replace(
    _A100,
    kind='NVIDIA A100-SXM4-40GB',
    bandwidth=1.555e12,
    node_sizes=(1, 2, 4, 8, 16),
  ),
  'h100': _H100,
  'h200': dataclasses.replace(_H100, kind='NVIDIA H200', bandwidth=4.8e12),
  'b200': Target(
    kind='NVIDIA B200',
    capability=(10, 0),
    cores=148,
    bandwidth=8e12,
    l2=126 * 2**20,
    clock=1.965,
  ),
}

# The same for all: the guide's limits of a block of threads and of a
# multiprocessor. CUDA keeps 1 KiB of the shared memory for itself.
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
  """Returns a GPU's description, a GpuTargetConfigProto in text form.

  Args:
    name: of `TARGETS`.
  """
  target = TARGETS[name]
  own = _CAPABILITIES[target.capability]
  return _TEXT.format(
    major=target.capability[0],
    minor=target.capability[1],
    suffix=own.suffix,
    cores=target.cores,
    units=own.units,
    clock=target.clock,
    bandwidth=round(target.bandwidth),
    l2=target.l2,
    memory=round(machines.CHIPS[name].memory),
    block=(own.shared - 1) * 1024,
    shared=own.shared * 1024,
    kind=target.kind,
  )

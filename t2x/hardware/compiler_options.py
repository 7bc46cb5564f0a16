"""Options of XLA's compilers for each kind of accelerator.

Sources: XLA's guide to its flags (openxla.org/xla/flags_guidance), the settings
that axlearn and MaxText publish for TPUs, and JAX-Toolbox's for GPUs. Compilers
check the names in tests/hardware/test_machines.py. No option was timed: the
effects that comments describe were seen in programs compiled with libtpu 0.0.42
and 0.0.52.
"""

import jax

Options = dict[str, bool | int | str]

# Options of TPUs of every generation.
TPU: Options = {
  # Orders a program so that collectives run beside computation. It is the
  # default, and is set here because the options below need it.
  'xla_tpu_enable_latency_hiding_scheduler': True,
  # Two uses of a weight share one gather if they are at most this number of
  # instructions apart. By default the weights of queries, keys and values are
  # gathered twice in the backward pass of FSDP: 58.7 against 52.4 MB a step at
  # width 512, fsdp=8.
  'xla_tpu_spmd_threshold_for_allgather_cse': 10000,
}

# Runs FSDP's gathers beside the products before them; v5e's default. Only for
# v5e: on other chips libtpu 0.0.52 refuses the fusions, which could give wrong
# results there.
ASYNC_GATHER: Options = {
  # Lets an all-gather start and end at different places of the program.
  'xla_enable_async_all_gather': True,
  # Carries out a collective piece by piece inside the fusions beside it.
  'xla_tpu_enable_async_collective_fusion': True,
  # ... all-gathers too.
  'xla_tpu_enable_async_collective_fusion_fuse_all_gather': True,
  # ... over several fusions, where one is too short to hide it.
  'xla_tpu_enable_async_collective_fusion_multiple_steps': True,
  # Lets the core that computes drive the collective at the same time.
  'xla_tpu_overlap_compute_collective_tc': True,
}

# The same for the sums of gradients. With both options, the scheduler treats
# all-reduces as asynchronous; in the small steps of the tests it finds nothing
# to run beside them, and makes them synchronous again.
ASYNC_REDUCE: Options = {
  # Lets an all-reduce start and end at different places of the program.
  'xla_enable_async_all_reduce': True,
  # Carries it out inside fusions.
  'xla_tpu_enable_async_collective_fusion_fuse_all_reduce': True,
}

# The same by the SparseCores, which other chips have beside the cores that
# compute. With it libtpu 0.0.42 makes v5p's gathers asynchronous; 0.0.52 does
# not.
SPARSE_GATHER: Options = {
  # Lets the SparseCores carry out all-gathers.
  'xla_tpu_enable_sparse_core_collective_offload_all_gather': True,
}

# For tensor and sequence parallelism: a product is cut into as many steps as
# there are devices, each of which runs beside the permute that brings the next
# piece. The conservative modes cut only where the compiler is sure of a gain.
COLLECTIVE_MATMUL: Options = {
  # All-gather, then product.
  'xla_tpu_all_gather_collective_matmul_mode': 'post_spmd_conservative',
  # Product, then reduce-scatter.
  'xla_tpu_reduce_scatter_collective_matmul_mode': 'post_spmd_conservative',
}

# Where some devices run parts of a program more often than others, compilers
# must not turn other collectives into permutes, which wait for all devices.
DIVERGE_TPU: Options = {
  **dict.fromkeys(COLLECTIVE_MATMUL, 'none'),
  # Off. Otherwise the compiler may reduce gradients in shares of another size,
  # and shift their rows between neighbours afterwards (v5e, v5p: 2048 x 7168
  # over fsdp=8).
  'xla_tpu_ars_halo_exchange_count': 0,
}
# The same for GPUs: no collective matmul, which is XLA's default.
DIVERGE_GPU: Options = {'xla_gpu_threshold_for_windowed_einsum_mib': 100_000}

# For collectives between slices, over the data centre's network.
TPU_DCN: Options = {
  # Reduces a layer's gradients while the next layer's are computed.
  'xla_tpu_enable_data_parallel_all_reduce_opt': True,
  # ... also gradients whose size differs from that of the stack that keeps
  # them. Takes some memory.
  'xla_tpu_data_parallel_opt_different_sized_ops': True,
  # Gathers between slices for a layer during the layer before (weights that
  # `mesh.dcn.fsdp` splits).
  'xla_tpu_enable_ag_backward_pipelining': True,
  # The most transfers between hosts at once; a few leave the network idle.
  'xla_max_concurrent_host_send_recv': 100,
}

CPU: Options = {
  # This pass sums bfloat16 in float32. It ends the process if the sum is in a
  # `shard_map` over some of the axes: "Invalid binary instruction opcode
  # copy" (jax 0.10.2, 0.12.0.1).
  'xla_disable_hlo_passes': 'all-reduce-promotion',
}

GPU: Options = {
  # Orders a program so that collectives run beside computation; off by default.
  'xla_gpu_enable_latency_hiding_scheduler': True,
  # Unrolls a loop by two, so that pipelined arrays need no copy.
  'xla_gpu_enable_while_loop_double_buffering': True,
  # Joins gathers up to this number of bytes, which fills the links and leaves
  # computation for the next gather to run beside.
  'xla_gpu_all_gather_combine_threshold_bytes': 128 * 2**20,
  # ... reduce-scatters, which also take memory until they are joined.
  'xla_gpu_reduce_scatter_combine_threshold_bytes': 64 * 2**20,
  # ... all-reduces.
  'xla_gpu_all_reduce_combine_threshold_bytes': 128 * 2**20,
  # Joins gathers of different dimensions too.
  'xla_gpu_enable_all_gather_combine_by_dim': False,
  # ... and reduce-scatters.
  'xla_gpu_enable_reduce_scatter_combine_by_dim': False,
  # Collectives go first where they need the same units as a kernel.
  'xla_gpu_enable_highest_priority_async_stream': True,
  # Products by cuBLAS, which is faster for large ones.
  'xla_gpu_enable_triton_gemm': False,
  # Collective matmul from this number of MiB of a split operand: activations of
  # tensor parallelism reach it, a layer's weights do not.
  'xla_gpu_threshold_for_windowed_einsum_mib': 512,
  # ... with its steps on several streams.
  'xla_gpu_multi_streamed_windowed_einsum': True,
}


def v4(num_slices: int) -> Options:
  """Returns the options for TPU v4.

  Args:
    num_slices: number of slices; options for the network between them are only
      for several.
  """
  asynchronous: Options = {
    # Lets an all-gather start and end at different places of the program. Not
    # inside fusions: with all options of v5e they can need more scratch memory
    # than the 16 MiB of a core.
    'xla_enable_async_all_gather': True,
    # The same for the permutes of a ring. The default from v5 on.
    'xla_enable_async_collective_permute': True,
  }
  return {**TPU, **COLLECTIVE_MATMUL, **asynchronous, **_dcn(num_slices)}


def v5e(num_slices: int) -> Options:
  """Returns the options for TPU v5e; the argument is as for `v4`."""
  asynchronous = {**ASYNC_GATHER, **ASYNC_REDUCE}
  return {**TPU, **asynchronous, **COLLECTIVE_MATMUL, **_dcn(num_slices)}


def v5p(num_slices: int) -> Options:
  """Returns the options for TPU v5p; the argument is as for `v4`."""
  return {**TPU, **COLLECTIVE_MATMUL, **SPARSE_GATHER, **_dcn(num_slices)}


def v6e(num_slices: int) -> Options:
  """Returns the options for TPU v6e; the argument is as for `v4`."""
  # The share of the chip's 128 MiB of vector memory that one operation may use
  # (16 MiB by default): a product in larger tiles reads its operands less
  # often.
  vmem: Options = {'xla_tpu_scoped_vmem_limit_kib': 96 * 1024}
  return {**v5p(num_slices), **vmem}


def v7x(num_slices: int) -> Options:
  """Returns the options for TPU7x; the argument is as for `v4`."""
  of_chip: Options = {
    # As on v6e, of 64 MiB.
    'xla_tpu_scoped_vmem_limit_kib': 60 * 1024,
    # Gradients are summed by the SparseCores, beside the products.
    'xla_tpu_enable_sparse_core_collective_offload_all_reduce': True,
  }
  return {**TPU, **COLLECTIVE_MATMUL, **of_chip, **_dcn(num_slices)}


def _pipelined() -> Options:
  """Returns options that run a GPU's collectives beside other layers' products.

  The weights of a scanned layer are gathered during the layer before it, and
  its gradients are scattered (FSDP) or summed (data parallelism) during the
  layer after it.
  """
  kinds = 'all_gather', 'reduce_scatter', 'all_reduce'
  if jax.__version_info__ < (0, 11):
    return {f'xla_gpu_enable_pipelined_{kind}': True for kind in kinds}
  on = 'COLLECTIVE_PIPELINING_MODE_ON'
  return {f'xla_gpu_pipeline_{kind}': on for kind in kinds}


def gpu(num_slices: int) -> Options:
  """Returns the options for NVIDIA's GPUs.

  Args:
    num_slices: number of nodes.
  """
  if num_slices == 1:
    return {**GPU, **_pipelined()}
  larger: Options = {
    # Fewer and larger messages between nodes, whose network has high latency.
    'xla_gpu_all_reduce_combine_threshold_bytes': 512 * 2**20,
  }
  return {**GPU, **_pipelined(), **larger}


def _dcn(num_slices: int) -> Options:
  return TPU_DCN if num_slices > 1 else {}

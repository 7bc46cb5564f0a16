"""Options of XLA's compilers for each kind of accelerator.

Sources: XLA's guide to its flags (openxla.org/xla/flags_guidance), the settings
that axlearn and MaxText publish for TPUs, and JAX-Toolbox's for GPUs. Names are
checked by compilers in tests/hardware/test_machines.py. Nothing here was timed:
what is said to show was seen in programs compiled with libtpu 0.0.42 and
0.0.52.
"""

import jax

Options = dict[str, bool | int | str]

# All of a TPU's, of every generation.
TPU: Options = {
  # Orders a program so that exchanges run beside computation. The default;
  # held here since without it nothing of what follows shows.
  'xla_tpu_enable_latency_hiding_scheduler': True,
  # A weight whose uses lie up to so many instructions apart is gathered once
  # for both. By default queries', keys' and values' are gathered twice in the
  # backward pass of FSDP: 58.7 against 52.4 MB a step at width 512, fsdp=8.
  'xla_tpu_spmd_threshold_for_allgather_cse': 10000,
}

# FSDP's gathers beside the products before them; v5e's default. Of v5e alone:
# libtpu 0.0.52 refuses the fusions elsewhere, as what may give wrong results.
ASYNC_GATHER: Options = {
  # Lets an all-gather start and end at different places of the program.
  'xla_enable_async_all_gather': True,
  # Carries out an exchange piece by piece inside the fusions beside it.
  'xla_tpu_enable_async_collective_fusion': True,
  # ... all-gathers too.
  'xla_tpu_enable_async_collective_fusion_fuse_all_gather': True,
  # ... over several fusions, where one is too short to hide it.
  'xla_tpu_enable_async_collective_fusion_multiple_steps': True,
  # Lets the core that computes drive the exchange at the same time.
  'xla_tpu_overlap_compute_collective_tc': True,
}

# The same for gradients that are summed. With both on, the scheduler takes
# all-reduces for asynchronous; in the small steps of the tests it then finds
# nothing to run beside them, and makes them synchronous again.
ASYNC_REDUCE: Options = {
  # Lets an all-reduce start and end at different places of the program.
  'xla_enable_async_all_reduce': True,
  # Carries it out inside fusions.
  'xla_tpu_enable_async_collective_fusion_fuse_all_reduce': True,
}

# The same by the SparseCores, which other chips have beside those that compute.
# libtpu 0.0.42 makes v5p's gathers asynchronous by it, 0.0.52 leaves them.
SPARSE_GATHER: Options = {
  # Lets them carry out all-gathers.
  'xla_tpu_enable_sparse_core_collective_offload_all_gather': True,
}

# Tensor and sequence parallelism's: a product is cut into as many steps as
# there are devices, each beside the permute that brings the next piece. The
# conservative modes cut only where the compiler is sure of a gain.
COLLECTIVE_MATMUL: Options = {
  # All-gather, then product.
  'xla_tpu_all_gather_collective_matmul_mode': 'post_spmd_conservative',
  # Product, then reduce-scatter.
  'xla_tpu_reduce_scatter_collective_matmul_mode': 'post_spmd_conservative',
}

# Where devices run parts of a program unlike often, compilers must make no
# permutes of other exchanges: they would wait for all devices.
DIVERGE_TPU: Options = {
  **dict.fromkeys(COLLECTIVE_MATMUL, 'none'),
  # Off: else gradients may be reduced in shares of a size that suits the
  # compiler, their rows shifted between neighbours afterwards (v5e, v5p: 2048 x
  # 7168 over fsdp=8).
  'xla_tpu_ars_halo_exchange_count': 0,
}
# The same of a GPU's: no collective matmul, as XLA has it by default.
DIVERGE_GPU: Options = {'xla_gpu_threshold_for_windowed_einsum_mib': 100_000}

# Between slices, over the data centre's network.
TPU_DCN: Options = {
  # Reduces a layer's gradients while the next layer's are computed.
  'xla_tpu_enable_data_parallel_all_reduce_opt': True,
  # ... gradients of other sizes than the stack they are kept in, too. Takes
  # some memory.
  'xla_tpu_data_parallel_opt_different_sized_ops': True,
  # Gathers between slices for a layer during the layer before (weights that
  # `mesh.dcn.fsdp` splits).
  'xla_tpu_enable_ag_backward_pipelining': True,
  # So many transfers between hosts at once; few leave the network idle.
  'xla_max_concurrent_host_send_recv': 100,
}

CPU: Options = {
  # The pass would sum bfloat16 in float32, and ends the process where the sum
  # stands in a `shard_map` over some axes: "Invalid binary instruction opcode
  # copy" (jax 0.10.2, 0.12.0.1).
  'xla_disable_hlo_passes': 'all-reduce-promotion',
}

GPU: Options = {
  # Orders a program so that exchanges run beside computation; off by default.
  'xla_gpu_enable_latency_hiding_scheduler': True,
  # Unrolls a loop by two, so that what is pipelined needs no copy.
  'xla_gpu_enable_while_loop_double_buffering': True,
  # Joins gathers up to so many bytes, so that the links are full; no more, so
  # that the next has something to run beside.
  'xla_gpu_all_gather_combine_threshold_bytes': 128 * 2**20,
  # ... reduce-scatters, which also wait in memory for each other.
  'xla_gpu_reduce_scatter_combine_threshold_bytes': 64 * 2**20,
  # ... all-reduces.
  'xla_gpu_all_reduce_combine_threshold_bytes': 128 * 2**20,
  # Joins gathers of different dimensions too.
  'xla_gpu_enable_all_gather_combine_by_dim': False,
  # ... and reduce-scatters.
  'xla_gpu_enable_reduce_scatter_combine_by_dim': False,
  # Exchanges go first where they wait for the same units as a kernel.
  'xla_gpu_enable_highest_priority_async_stream': True,
  # Products by cuBLAS, which is the faster for large ones.
  'xla_gpu_enable_triton_gemm': False,
  # Collective matmul from so many MiB of a split operand: activations of
  # tensor parallelism reach that, a layer's weights do not.
  'xla_gpu_threshold_for_windowed_einsum_mib': 512,
  # ... with its steps on several streams.
  'xla_gpu_multi_streamed_windowed_einsum': True,
}


def v4(num_slices: int) -> Options:
  """Returns those of TPU v4."""
  own: Options = {
    # Lets an all-gather start and end at different places of the program. Not
    # inside fusions: with all of the above they can ask for more scratch memory
    # than the 16 MiB that a core has.
    'xla_enable_async_all_gather': True,
    # The same for a ring's exchanges. The default from v5 on.
    'xla_enable_async_collective_permute': True,
  }
  return {**TPU, **COLLECTIVE_MATMUL, **own, **_between(num_slices)}


def v5e(num_slices: int) -> Options:
  """Returns those of TPU v5e."""
  asynchronous = {**ASYNC_GATHER, **ASYNC_REDUCE}
  return {**TPU, **asynchronous, **COLLECTIVE_MATMUL, **_between(num_slices)}


def v5p(num_slices: int) -> Options:
  """Returns those of TPU v5p."""
  own = {**SPARSE_GATHER, **_between(num_slices)}
  return {**TPU, **COLLECTIVE_MATMUL, **own}


def v6e(num_slices: int) -> Options:
  """Returns those of TPU v6e."""
  # Of its 128 MiB, what one operation may hold on the chip (16 by default): a
  # larger tile of a product reads its operands less often.
  vmem: Options = {'xla_tpu_scoped_vmem_limit_kib': 96 * 1024}
  return {**v5p(num_slices), **vmem}


def v7x(num_slices: int) -> Options:
  """Returns those of TPU7x."""
  own: Options = {
    # As on v6e, of 64 MiB.
    'xla_tpu_scoped_vmem_limit_kib': 60 * 1024,
    # Gradients are summed by the SparseCores, beside the products.
    'xla_tpu_enable_sparse_core_collective_offload_all_reduce': True,
  }
  return {**TPU, **COLLECTIVE_MATMUL, **own, **_between(num_slices)}


def _pipelined() -> Options:
  """A GPU's exchanges of one scanned layer beside the next's products.

  A layer's weights are gathered during the layer before, its gradients
  scattered (FSDP) or summed (data parallelism) during the layer after.
  """
  kinds = 'all_gather', 'reduce_scatter', 'all_reduce'
  if jax.__version_info__ < (0, 11):
    return {f'xla_gpu_enable_pipelined_{kind}': True for kind in kinds}
  on = 'COLLECTIVE_PIPELINING_MODE_ON'
  return {f'xla_gpu_pipeline_{kind}': on for kind in kinds}


def gpu(num_slices: int) -> Options:
  """Returns those of NVIDIA's GPUs; a slice is a node."""
  if num_slices == 1:
    return {**GPU, **_pipelined()}
  larger: Options = {
    # Fewer and larger between nodes, whose network is slow to start.
    'xla_gpu_all_reduce_combine_threshold_bytes': 512 * 2**20,
  }
  return {**GPU, **_pipelined(), **larger}


def _between(num_slices: int) -> Options:
  return TPU_DCN if num_slices > 1 else {}

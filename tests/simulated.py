"""Simulated devices, for which programs compile as fast as may be."""

from importlib import metadata

from t2x.parallel import simulated_devices


def flags(num_devices: int | None = None) -> str:
  """Returns XLA_FLAGS; without a number, a script is to give it itself.

  Where XLA can still write loops for CPUs in its older way, it does so in half
  the time of the newer one. jax 0.11 and later have the newer one alone. A
  program in one piece saves a sixth: other tests keep the other cores busy.
  """
  chosen = (
    [] if num_devices is None else [f'{simulated_devices.COUNT}={num_devices}']
  )
  if metadata.version('jaxlib').startswith('0.10.'):
    chosen.append('--xla_cpu_parallel_codegen_split_count=1')
    chosen.append('--xla_cpu_use_fusion_emitters=false')
  return ' '.join(chosen)

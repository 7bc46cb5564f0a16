"""Simulated devices, for which programs compile as fast as may be."""

from importlib import metadata

_COUNT = '--xla_force_host_platform_device_count'


def flags(num_devices: int | None = None) -> str:
  """Returns XLA_FLAGS; without a number, a script is to give it itself.

  Where XLA can still write loops for CPUs in its older way, it does so in half
  the time of the newer one. jax 0.11 and later have the newer one alone.
  """
  chosen = [] if num_devices is None else [f'{_COUNT}={num_devices}']
  if metadata.version('jaxlib').startswith('0.10.'):
    chosen.append('--xla_cpu_use_fusion_emitters=false')
  return ' '.join(chosen)

"""Chooses the JAX backends that a process starts.

Where libtpu is installed for its compiler alone, without a TPU, JAX would start
it all the same: it looks for chips and logs several lines of errors.
"""

import importlib.util
import os
import pathlib
import sys

_PCI = pathlib.Path('/sys/bus/pci/devices')
_GOOGLE = '0x1ae0'  # Google's number as a PCI vendor.
# First bytes of the PCI class of Google's disks and network cards.
_OTHER_CLASSES = ('0x01', '0x02')
# JAX's plugins for NVIDIA, which contain XLA's GPU compiler.
CUDA = ('jax_plugins.xla_cuda13', 'jax_plugins.xla_cuda12')
_NVIDIA = ('/dev/nvidia0', '/dev/nvidiactl', '/dev/dxg')
_chosen = ''  # What `skip_missing_tpu` has set JAX_PLATFORMS to.
_FORCED = ('JAX_PLATFORMS', 'JAX_FORCE_TPU_INIT')


def skip_missing_tpu() -> None:
  """Tells JAX not to start libtpu on a machine without a TPU.

  Call it before the first use of JAX's devices. A choice of the user's own
  (JAX_PLATFORMS, JAX_FORCE_TPU_INIT) is kept.
  """
  if any(name in os.environ for name in _FORCED):
    return
  if not has_module('libtpu') or has_tpu():
    return
  gpu = any(map(os.path.exists, _NVIDIA)) and any(map(has_module, CUDA))
  platforms = 'cuda,cpu' if gpu else 'cpu'
  os.environ['JAX_PLATFORMS'] = platforms  # For processes that this one starts.
  global _chosen
  _chosen = platforms
  if jax := sys.modules.get('jax'):  # It has read the environment.
    if not jax.config.jax_platforms:
      jax.config.update('jax_platforms', platforms)


def given_environment() -> dict[str, str]:
  """Returns the environment for processes that start on other machines."""
  result = dict(os.environ)
  if _chosen and result.get('JAX_PLATFORMS') == _chosen:
    del result['JAX_PLATFORMS']
  return result


def has_tpu(pci: pathlib.Path = _PCI) -> bool:
  """Whether a TPU may be attached to this machine.

  Args:
    pci: directory in which Linux lists PCI devices.
  """
  return any(
    _read(device / 'vendor') == _GOOGLE
    and not _read(device / 'class').startswith(_OTHER_CLASSES)
    for device in pci.glob('*')
  )


def has_module(name: str) -> bool:
  """Whether a module, such as `package.plugin`, is installed."""
  try:
    return importlib.util.find_spec(name) is not None
  except ModuleNotFoundError:  # Not even the package.
    return False


def _read(file: pathlib.Path) -> str:
  try:
    return file.read_text().strip()
  except OSError:  # It has gone, or may not be read.
    return ''

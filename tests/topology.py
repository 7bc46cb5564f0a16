"""Devices of TPU slices that are not there, from libtpu's own description."""

import importlib.util
import os

from jax.experimental import topologies
import pytest

# Read when libtpu is loaded: it must not ask a cloud what machine this is.
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-8')
os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')


def devices(name: str, num_slices: int = 1, **options):
  """Returns the devices of `name`, such as v5e:4x4; skips without libtpu."""
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('libtpu is not installed: bash scripts/setup.sh tpu')
  if num_slices > 1:
    options['num_slices'] = num_slices
  return topologies.get_topology_desc(name, 'tpu', **options).devices

"""Devices that are not here, and what is said where a compiler is missing."""

import importlib.util

import gpu
import jax
import pytest
import tpu

from t2x.hardware import gpu_targets
from t2x.hardware import machines
from t2x.hardware import target_devices
from t2x.models import flops
from t2x.parallel import mesh as mesh_lib


def test_slices_of_tpus():
  found = tpu.devices('v5e:2x4', 3)
  assert (len(found), mesh_lib.num_slices(found)) == (24, 3)
  assert len(tpu.devices('v6e:1x1')) == 1


def test_no_slices():
  with pytest.raises(ValueError, match='num_slices=0; there is at least one'):
    target_devices.devices('v5e:2x4', 0)


def test_a_compiler_that_is_missing(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  message = r"for v5e:8x8 needs .* libtpu, .*: pip install '\.\[plan\]'"
  with pytest.raises(ValueError, match=message):
    target_devices.devices('v5e:8x8')
  message = r"for b200:2 needs .* GPU compiler.*: pip install '\.\[plan-gpu\]'"
  with pytest.raises(ValueError, match=message):
    target_devices.devices('b200:2')


def test_a_compiler_that_refuses(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name)

  def refuse(name, platform, **options):
    if platform == 'cuda':
      raise NotImplementedError('topology not implemented for cuda')
    raise jax.errors.JaxRuntimeError('INVALID_ARGUMENT: why\n=== trace')

  monkeypatch.setattr(
    target_devices.jax_topologies, 'get_topology_desc', refuse
  )
  message = rf'for h100:2 .* Set JAX_PLATFORMS=cpu.* be {jax.__version__}\.$'
  with pytest.raises(ValueError, match=message):
    target_devices.devices('h100:2')
  message = r'for v6e:8x8 \(num_slices=7\) cannot .*: INVALID_ARGUMENT: why$'
  with pytest.raises(ValueError, match=message):
    target_devices.devices('v6e:8x8', 7)


# --- GPUs. ---


@pytest.mark.parametrize('name', gpu_targets.TARGETS)
def test_targets_are_chips_that_are_known(name):
  kind = gpu_targets.TARGETS[name].kind
  assert machines.chip_of(kind) == name
  assert flops.peak_flops(kind, 'bfloat16')
  text = gpu_targets.text(name)
  assert f'device_description_str: "{kind}"' in text
  assert f'device_memory_size: {machines.CHIPS[name].memory:.0f}\n' in text


def test_units_and_clock_give_the_published_rate():
  """Float32 outside of tensor cores, of the data sheets: 2 a unit and cycle."""
  published = {'a100': 19.5, 'h100': 67, 'h200': 67, 'b200': 75}  # TFLOP/s
  for name, rate in published.items():
    lines = dict(
      line.strip().split(': ')
      for line in gpu_targets.text(name).splitlines()
      if line.count(': ') == 1
    )
    units = int(lines['core_count']) * int(lines['fpus_per_core'])
    got = 2 * units * float(lines['clock_rate_ghz']) / 1e3
    assert got == pytest.approx(rate, rel=0.02)


@pytest.mark.parametrize('name', gpu_targets.TARGETS)
def test_nodes(name):
  found = gpu.devices(f'{name}:8', 2)
  assert len(found) == 16
  assert {d.device_kind for d in found} == {gpu_targets.TARGETS[name].kind}
  assert mesh_lib.num_slices(found) == 2


def test_a_mesh_over_nodes():
  made = gpu.mesh('h100:8', 2, data=2, fsdp=4, tensor=2)
  nodes = made.devices.reshape(2, 8)
  assert [{d.id // 8 for d in node} for node in nodes] == [{0}, {1}]
  options = machines.options_of([*made.devices.flat])
  name = 'xla_gpu_all_reduce_combine_threshold_bytes'
  assert options[name] == 512 * 2**20

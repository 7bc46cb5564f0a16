"""A process looks for no TPU where there is none."""

import os
import subprocess
import sys

import extras
import pytest

from t2x.hardware import backends

# As experiments do, which import JAX first.
_LOOK = """
import jax
from t2x import main
main.app_run(lambda: print(jax.devices()[0].platform))
"""


def machine(root, **devices):
  """Writes what Linux says of PCI devices: name -> (vendor, class)."""
  for name, (vendor, kind) in devices.items():
    (root / name).mkdir(parents=True)
    (root / name / 'vendor').write_text(vendor + '\n')
    (root / name / 'class').write_text(kind + '\n')
  return root


def test_a_tpu_is_told_from_other_devices(tmp_path):
  network = ('0x1ae0', '0x020000')  # Google's virtual network card.
  disk = ('0x1ae0', '0x010802')
  others = dict(a=network, b=disk, c=('0x10de', '0x030200'))
  assert not backends.has_tpu(machine(tmp_path / 'no', **others))
  found = machine(tmp_path / 'yes', **others, d=('0x1ae0', '0x120000'))
  assert backends.has_tpu(found)
  assert not backends.has_tpu(tmp_path / 'no_such_directory')


@pytest.mark.parametrize(
  'installed, tpu, given, wanted',
  [
    (True, False, {}, 'cpu'),
    (True, True, {}, None),
    (False, False, {}, None),
    (True, False, {'JAX_PLATFORMS': 'tpu'}, 'tpu'),
    (True, False, {'JAX_PLATFORMS': ''}, ''),
    (True, False, {'JAX_FORCE_TPU_INIT': '1'}, None),
  ],
)
def test_jax_is_told(monkeypatch, installed, tpu, given, wanted):
  for name in ('JAX_PLATFORMS', 'JAX_FORCE_TPU_INIT'):
    monkeypatch.delenv(name, raising=False)
  for name, value in given.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(backends, 'has_module', lambda name: installed)
  monkeypatch.setattr(backends, 'has_tpu', lambda: tpu)
  monkeypatch.setattr(backends, '_NVIDIA', ())
  monkeypatch.delitem(sys.modules, 'jax')  # It would really be told.
  backends.skip_missing_tpu()
  assert os.environ.get('JAX_PLATFORMS') == wanted


def test_a_gpu_is_still_found(monkeypatch, tmp_path):
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  monkeypatch.setattr(backends, 'has_module', lambda name: True)
  monkeypatch.setattr(backends, 'has_tpu', lambda: False)
  monkeypatch.setattr(backends, '_NVIDIA', (tmp_path,))
  monkeypatch.delitem(sys.modules, 'jax')
  backends.skip_missing_tpu()
  assert os.environ['JAX_PLATFORMS'] == 'cuda,cpu'


@pytest.mark.skipif(backends.has_tpu(), reason='there is a TPU')
def test_libtpu_says_nothing():
  extras.need('libtpu', extra='plan')
  env = {k: v for k, v in os.environ.items() if k != 'JAX_PLATFORMS'}
  done = subprocess.run(
    [sys.executable, '-c', _LOOK], capture_output=True, text=True, env=env
  )
  assert done.returncode == 0
  assert 'TPU' not in done.stderr, done.stderr

"""Programs compiled ahead of time: the file, and what refuses it."""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import pathlib
import pickle
import types
import zipfile

import jax
import numpy as np
import pytest
import simulated
import tiny
import tpu

from t2x.compilation import executables
from t2x.compilation import program as program_lib
from t2x.config import overrides
from t2x.hardware import target_devices
from t2x.parallel import mesh as mesh_lib
from t2x.trainer import train
from t2x.training import train_step

_ROOT = pathlib.Path(__file__).parents[2]
_SCRIPT = _ROOT / 'scripts' / 'compile_step.py'
_EXPERIMENT = """
import os, pathlib
import tiny

def get_config():
  return tiny.experiment_of(pathlib.Path(os.environ['TINY_DIRECTORY']))
"""


# --- The real thing. ---


@contextlib.contextmanager
def _compiled_names(caplog):
  """Yields a list that fills with the names of what XLA compiles."""
  names: list[str] = []
  caplog.clear()
  with jax.log_compiles(), caplog.at_level(logging.WARNING, 'jax'):
    yield names
  texts = [record.getMessage() for record in caplog.records]
  names += [t for t in texts if t.startswith('Finished XLA compilation')]


@pytest.mark.slow
def test_a_run_takes_programs_of_another_process(tmp_path, caplog):
  script = tmp_path / 'small.py'
  script.write_text(_EXPERIMENT)
  file = tmp_path / 'step.t2x'
  config = tiny.experiment_of(tmp_path)
  with _compiled_names(caplog) as own:
    expected = train.train(config, str(tmp_path / 'a'), show=False)
  # It sees the cache that the run has filled. Of what CPUs read from there they
  # write a file that lacks functions, so nothing may be read.
  compiling = tiny.run(
    tmp_path,
    f'--experiment={script}',
    '--topology=cpu:8',
    f'--out={file}',
    script=str(_SCRIPT),
  )
  said = compiling.stdout
  assert compiling.returncode == 0, compiling.stderr
  assert 'step: compiled in' in said and f'--executable={file}' in said
  half = overrides.override(config, {'train.num_steps': '2'})
  with _compiled_names(caplog) as loaded:
    for part in (half, config):  # From new weights, then from a checkpoint.
      state = train.train(
        part, str(tmp_path / 'b'), executable=str(file), show=False
      )
  for name in ('train_step', 'init_state', 'eval_step'):
    assert any(name in text for text in own), own
    assert not any(name in text for text in loaded), loaded
  assert tiny.losses(tmp_path / 'a') == tiny.losses(tmp_path / 'b')
  jax.tree.map(np.testing.assert_array_equal, state, expected)


@pytest.mark.slow
def test_programs_of_absent_tpus_are_kept(tmp_path):
  config = tiny.experiment_of(tmp_path, mesh__tensor=1)
  file = tmp_path / 'step.t2x'
  mesh = mesh_lib.make(config.mesh, tpu.devices('v5e:2x2'))
  executables.save(str(file), config, mesh)
  manifest = _manifest(file)
  assert set(manifest['programs']) == {'init', 'step', 'evaluate'}
  assert 'libtpu' in manifest['target']['versions']
  places = {d['id']: d for d in manifest['target']['devices']['mesh']}
  assert places[3]['coords'] == [1, 1, 0]
  step = manifest['programs']['step']
  assert step['memory_bytes']['argument'] > 40_000
  assert step['compile_seconds'] > 0
  with zipfile.ZipFile(file) as archive:
    assert len(archive.read('step')) > 100_000
  with pytest.raises(ValueError, match='kind of device: TPU v5 lite in the '):
    _load(file, overrides.override(config, {'mesh.tensor': '2'}))


# --- What refuses a file: its payloads do not matter. ---


@functools.cache
def _made(directory: pathlib.Path) -> bytes:
  """Returns a file of the tiny experiment, whose payloads are no programs."""
  compiled = types.SimpleNamespace(as_text=str, memory_analysis=lambda: None)
  file = directory / 'made.t2x'
  config = tiny.experiment_of(directory)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      executables.target_devices, 'compile', lambda lowered: compiled
    )
    serialized = lambda _: (b'no program' * 100, None, None)
    serializer = executables.serialize_executable
    patch.setattr(serializer, 'serialize', serialized)
    executables.save(str(file), config, mesh_lib.make(config.mesh))
  return file.read_bytes()


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  return tmp_path_factory.mktemp('executables')


@pytest.fixture
def file(directory, tmp_path):
  path = tmp_path / 'step.t2x'
  path.write_bytes(_made(directory))
  return path


def _load(file, config, devices=None):
  mesh = mesh_lib.make(config.mesh, devices)
  program = program_lib.Program(config, mesh, num_steps=4)
  return executables.load(str(file), program)


def _manifest(file) -> dict:
  with zipfile.ZipFile(file) as archive:
    return json.loads(archive.read('manifest.json'))


def _change(file, change, **payloads: bytes) -> None:
  """Writes a file again after `change(manifest)`."""
  with zipfile.ZipFile(file) as archive:
    contents = {name: archive.read(name) for name in archive.namelist()}
  contents |= payloads
  manifest = json.loads(contents.pop('manifest.json'))
  change(manifest)
  with zipfile.ZipFile(file, 'w') as archive:
    archive.writestr('manifest.json', json.dumps(manifest))
    for name, content in contents.items():
      archive.writestr(name, content)


def test_a_setting_that_differs_is_named_and_no_other(directory, file):
  config = tiny.experiment_of(
    directory, model__mlp__hidden=64, optim__b1=0.8, train__checkpoint_every=3
  )
  with pytest.raises(ValueError) as raised:
    _load(file, config)
  message = str(raised.value)
  assert f'--executable={file} was made for another run' in message
  assert 'model.mlp.hidden: 32 in the file, 64 here' in message
  assert 'optim.b1: 0.9 in the file, 0.8 here' in message
  assert 'checkpoint_every' not in message and 'code' not in message
  assert 'Compile again by scripts/compile_step.py' in message
  assert 'leave --executable out' in message


def test_a_program_that_differs_under_the_same_settings(
  directory, file, monkeypatch
):
  real = train_step.train_step

  def twice(state, batch, key, **options):
    state, metrics = real(state, batch, key, **options)
    return state, metrics | {'loss': metrics['loss'] * 2}

  monkeypatch.setattr(train_step, 'train_step', twice)
  config = tiny.experiment_of(directory)
  with pytest.raises(ValueError, match='the lowered step differ, although'):
    _load(file, config)
  # As where the file was compiled by other code.
  code = 't2x/layers/mlp.py'
  _change(file, lambda m: m['source']['code'].update({code: 'other'}))
  with pytest.raises(ValueError, match=f'another run: code: {code}. Compile'):
    _load(file, config)


@pytest.mark.parametrize(
  'change, message',
  [
    (
      lambda m: m['target']['versions'].update(jaxlib='0.0.1'),
      r'another run: jaxlib: 0\.0\.1 in the file, \d\S+ here\. Compile',
    ),
    (
      lambda m: m['target']['options'].update(xla_cpu_new='true'),
      r'run: xla_cpu_new: true in the file, \(not set\) here\. Compile',
    ),
    (
      lambda m: m['target']['flags'].update(XLA_FLAGS='--xla_new=1'),
      'run: XLA_FLAGS: --xla_new=1 in the file, '
      f'{simulated.flags() or "none"} here. Compile',
    ),
    (
      lambda m: m['target']['devices']['mesh'][4].update(id=2048, process=1),
      'device 4 of the mesh: id 2048 of process 1 in the file, id 4 of '
      'process 0 here',
    ),
    (lambda m: m.update(format=2), 'of format 2, and this t2x reads format 1'),
    (lambda m: m['programs'].pop('step'), r"is damaged, .* \('step'\)"),
  ],
)
def test_what_was_made_for_something_else(directory, file, change, message):
  _change(file, change)
  with pytest.raises(ValueError, match=message):
    _load(file, tiny.experiment_of(directory))


def test_other_devices_and_options(directory, file):
  config = tiny.experiment_of(directory, mesh__data=1)
  with pytest.raises(ValueError, match='devices: 8 in the file, 4 here'):
    _load(file, config, jax.devices()[:4])
  config = tiny.experiment_of(
    directory, compiler_options='xla_cpu_enable_fast_math=true'
  )
  with pytest.raises(ValueError, match=r'fast_math: \(not set\) in .*, true '):
    _load(file, config)


@pytest.mark.parametrize(
  'damage',
  [
    lambda data: data[:-200],
    lambda data: b'',
    lambda data: b'{"format": 1}',
    lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
  ],
)
def test_damage_is_told(directory, file, damage):
  file.write_bytes(damage(file.read_bytes()))
  with pytest.raises(ValueError, match='is damaged, or no file of'):
    _load(file, tiny.experiment_of(directory))


def test_a_payload_that_was_exchanged_is_told(directory, file):
  _change(file, lambda m: None, step=b'another')
  with pytest.raises(ValueError, match='step is not what was written'):
    _load(file, tiny.experiment_of(directory))


def test_no_such_file(directory, tmp_path):
  with pytest.raises(ValueError, match='none.t2x: there is no such file'):
    _load(tmp_path / 'none.t2x', tiny.experiment_of(directory))


class _Trap:
  def __init__(self, directory):
    self.directory = directory

  def __reduce__(self):
    return os.mkdir, (self.directory,)


def test_nothing_is_unpickled_before_all_else_matches(directory, file):
  trap = file.parent / 'trap'
  payload = pickle.dumps(_Trap(str(trap)))
  digest = executables.hashlib.sha256(payload).hexdigest()
  _change(
    file,
    lambda m: m['programs']['init'].update(payload=digest),
    init=payload,
  )
  config = tiny.experiment_of(directory)
  other = dataclasses.replace(config, compiler_options=('xla_cpu_new=1',))
  with pytest.raises(ValueError, match='another run'):
    _load(file, other)
  with pytest.raises(ValueError, match='another run'):
    _load(file, overrides.override(config, {'optim.b1': '0.5'}))
  assert not trap.exists()
  with pytest.raises(TypeError):  # The trap does work.
    _load(file, config)
  assert trap.exists()


# --- What is not made. ---


def test_programs_of_stages_are_checked_before_they_are_kept(
  tmp_path, monkeypatch
):
  def check(text):
    raise ValueError(f'would wait forever: {text}')

  monkeypatch.setattr(program_lib.divergence, 'check', check)
  compiled = types.SimpleNamespace(as_text=lambda: 'its text')
  monkeypatch.setattr(executables.target_devices, 'compile', lambda _: compiled)
  config = tiny.experiment_of(
    tmp_path, mesh__tensor=1, mesh__pipe=2, pipeline__microbatches=2
  )
  file = tmp_path / 'step.t2x'
  with pytest.raises(ValueError, match='would wait forever: its text'):
    executables.save(str(file), config, mesh_lib.make(config.mesh))
  assert not file.exists()


def test_rows_of_several_lengths_are_refused(tmp_path):
  config = tiny.experiment_of(
    tmp_path, data__batching='pad', data__batching__buckets='16,32'
  )
  with pytest.raises(ValueError, match=r'buckets=16,32: each length is a'):
    executables.save(str(tmp_path / 'file'), config, mesh_lib.make(config.mesh))


def test_steps_of_an_epoch_are_not_known(tmp_path):
  config = tiny.experiment_of(
    tmp_path, train__num_steps='none', train__num_epochs=2
  )
  with pytest.raises(
    ValueError, match=r'num_epochs=2\.0: how many steps that is'
  ):
    executables.save(str(tmp_path / 'file'), config, mesh_lib.make(config.mesh))


def test_simulated_devices():
  assert target_devices.devices('cpu:8') == tuple(jax.devices())
  with pytest.raises(ValueError, match='cpu:2x4: .* as in cpu:8'):
    target_devices.devices('cpu:2x4')
  with pytest.raises(ValueError, match='cpu:4: this process simulates 8 '):
    target_devices.devices('cpu:4')


def test_topologies_that_are_none():
  with pytest.raises(ValueError, match="'v5e:3x5': there is no such slice"):
    tpu.devices('v5e:3x5')
  with pytest.raises(ValueError, match="such as 2x4, and not as '2by4'"):
    target_devices.devices('v5e:2x4', 1, '2by4')

"""Optimizer state and activations in the hosts' memory: the same training."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
import tiny
import tpu

from t2x.compilation import lowering
from t2x.compilation import program as program_lib
from t2x.config import abstract_state
from t2x.config import consistency
from t2x.hardware import target_devices
from t2x.layers import stack
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding
from t2x.trainer import checkpointer
from t2x.training import optim_state

OPTIMIZER: dict[str, Any] = {'train__offload': 'optimizer'}
ADAFACTOR = {'optim': 'adafactor', 'optim__min_factored': '4'}


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  return tmp_path_factory.mktemp('offload')


def program_of(directory, **settings):
  quickly = {'compiler_options': 'xla_backend_optimization_level=0'}
  config = tiny.experiment_of(directory, **quickly, **settings)
  mesh = mesh_lib.make(config.mesh, jax.devices())
  return program_lib.Program(config, mesh, num_steps=10), mesh


def batch_of(step, bad=()):
  rng = np.random.default_rng(step)
  tokens = lambda: rng.integers(0, 384, (8, 32)).astype(np.int32)
  weights = np.full((8, 32), np.nan if step in bad else 1, np.float32)
  return {'inputs': tokens(), 'targets': tokens(), 'weights': weights}


def trained(directory, steps=3, bad=(), **settings):
  """Returns the state after some steps, and their losses."""
  program, mesh = program_of(directory, **settings)
  losses = []
  with sharding.use(mesh, program.config.rules):
    state = program.init_state()
    for step in range(steps):
      state, metrics = program.step(state, program.place(batch_of(step, bad)))
      losses.append(float(metrics['loss']))
  return state, losses


def assert_close(got, want, **tolerance):
  pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
  for a, b in pairs:
    np.testing.assert_allclose(a, b, **tolerance)


def kinds_of(state):
  """Returns the memories in which moments lie; not those of counts."""
  moments = optim_state.arrays_by_name(state.opt_state).values()
  return {p.get_value().sharding.memory_kind for p in moments}


@pytest.mark.slow
@pytest.mark.parametrize(
  'settings',
  [
    {},
    ADAFACTOR,  # Counts of each parameter.
    {'optim': 'muon', 'train__trainable': '.*mlp.*|.*attention.q.*'},
  ],
  ids=['adamw', 'adafactor', 'muon'],
)
def test_offloaded_moments_train_alike(directory, settings):
  want, losses = trained(directory, bad=(1,), **settings)
  got, found = trained(directory, bad=(1,), **settings, **OPTIMIZER)
  assert kinds_of(got) == {'pinned_host'} and kinds_of(want) == {'device'}
  np.testing.assert_allclose(found, losses, rtol=1e-6)
  assert_close(jax.device_get(got), jax.device_get(want), atol=2e-6)


@pytest.mark.slow
def test_checkpoints_go_between_memories(directory, tmp_path):
  for number, (one, other) in enumerate([({}, OPTIMIZER), (OPTIMIZER, {})]):
    state, _ = trained(directory, steps=1, **one)
    checkpoints = checkpointer.Checkpoints(str(tmp_path / str(number)))
    assert checkpoints.save(1, state, {}) and checkpoints.wait()
    program, _ = program_of(directory, **other)
    found = checkpoints.restore(program.shapes)
    checkpoints.close()
    assert found is not None
    want = 'pinned_host' if other else 'device'
    assert kinds_of(found[1]) == {want}
    assert_close(jax.device_get(found[1]), jax.device_get(state), rtol=0)


@functools.cache
def grads_of(directory, remat):
  program, mesh = program_of(directory, train__remat=remat)
  with sharding.use(mesh, program.config.rules):
    state = program.init_state()
    return jax.device_get(
      program.gradients(state, program.place(batch_of(0)))[0]
    )


@pytest.mark.slow
def test_offloaded_activations_have_the_same_gradients(directory):
  want = grads_of(directory, 'none')
  for remat in ('offload:layer_input,mlp_up', 'save:query;offload:attention'):
    assert_close(grads_of(directory, remat), want, atol=1e-6)


@pytest.mark.parametrize(
  'remat',
  [
    'offload:',
    'offload:mlp',
    'save:layer_input',
    'save:query;offload:query',
    'offload:query;offload:key',
    'host:query',
  ],
)
def test_unknown_names_are_refused(remat):
  with pytest.raises(ValueError, match='offload also takes layer_input'):
    stack.Execution(remat=remat)


def test_stages_do_not_offload(directory):
  pipe = {'mesh__pipe': '2', 'mesh__tensor': '1'}
  for settings, match in [
    ({**pipe, 'train__remat': 'offload:query'}, 'stages .* keep activations'),
    ({**pipe, **OPTIMIZER}, r'one by one.*mesh\.pipe=2'),
    ({'rules__layers': 'data', **OPTIMIZER}, r'rules\.layers=data'),
  ]:
    config = tiny.experiment_of(directory, **settings)
    with pytest.raises(ValueError, match=match):
      consistency.check(config, 8)


@pytest.mark.slow
def test_moments_leave_a_tpus_memory(directory):
  """Arguments lose exactly the moments; a layer's come back at a time."""
  sizes = []
  for offload in ('none', 'optimizer'):
    config = tiny.experiment_of(
      directory,
      train__offload=offload,
      train__remat='full',
      model__num_layers='8',
      model__embed_dim='512',
      model__mlp__hidden='2048',
    )
    mesh = tpu.mesh('v5e:2x2', fsdp=4)
    lowered = lowering.lower_step(config, mesh)
    sizes.append(target_devices.compile(lowered).memory_analysis())
    params = abstract_state.state_shapes(config).model
  num = sum(a.size for a in jax.tree.leaves(params)) // 4
  without, offloaded = sizes
  left = without.argument_size_in_bytes - offloaded.argument_size_in_bytes
  moments = 2 * 4 * num
  np.testing.assert_allclose(left, moments, rtol=0.01)
  np.testing.assert_allclose(
    offloaded.host_argument_size_in_bytes, moments, rtol=0.01
  )
  more = offloaded.temp_size_in_bytes - without.temp_size_in_bytes
  assert more < moments / 2


@pytest.mark.slow
def test_activations_lie_in_a_hosts_memory(directory):
  config = tiny.experiment_of(
    directory,
    train__remat='offload:mlp_up',
    model__num_layers='8',
    model__embed_dim='256',
    model__mlp__hidden='1024',
    model__dtype='bfloat16',
    data__length='64',
    data__batch_size='512',
  )
  lowered = lowering.lower_step(config, tpu.mesh('v5e:2x2', fsdp=4))
  memory = target_devices.compile(lowered).memory_analysis()
  layers, rows, tokens, hidden = 8, 512 // 4, 64, 1024
  kept = 2 * layers * rows * tokens * hidden
  assert memory.host_temp_size_in_bytes == kept
  assert memory.temp_size_in_bytes < kept / 4  # 134.8 MiB with save:mlp_up.

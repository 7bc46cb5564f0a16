"""Exchanges in what stages do not run alike are refused before they run."""

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import pytest
import tiny

from t2x.compilation import program
from t2x.hlo import divergence
from t2x.layers import mlp
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding
from t2x.pipeline import executor

_PAIRS = [(0, 1), (1, 0)]

_TEXT = """
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4] get-tuple-element(%p), index=1
  %y = f32[4] OPERATION, metadata={op_name="jit(f)/LABEL/ppermute"}
  ROOT %t = (s32[], f32[4]) tuple(%i, %y)
}

%condition (q: (s32[], f32[4])) -> pred[] {
  %q = (s32[], f32[4]) parameter(0)
  ROOT %more = pred[] custom-call(%q)
}

ENTRY %main (a: (s32[], f32[4])) -> (s32[], f32[4]) {
  %a = (s32[], f32[4]) parameter(0)
  ROOT %w = (s32[], f32[4]) while(%a), condition=%condition, body=%body, ATTRS
}
"""
_PERMUTE = 'collective-permute(%x), source_target_pairs={{0,1},{1,0}}'
_IN_STAGE = 'metadata={op_name="jit(f)/pipeline_loop_forward_tower/while"}'
_KNOWN = 'backend_config={"known_trip_count":{"n":"3"}}'


def text_of(attributes, operation=_PERMUTE, label='layer'):
  text = _TEXT.replace('ATTRS', attributes).replace('OPERATION', operation)
  return text.replace('LABEL', label)


@pytest.mark.parametrize(
  'text',
  [
    text_of(_IN_STAGE),
    text_of(f'{_IN_STAGE}, {_KNOWN}'),
    text_of('metadata={op_name="jit(f)/while"}'),
    text_of(_IN_STAGE, _PERMUTE.replace('permute', 'permute-start')),
  ],
  ids=['of a stage', 'of a stage, known', 'unknown', 'asynchronous'],
)
def test_a_permute_in_a_loop_is_refused(text):
  message = r'permute y \(jit\(f\)/layer/ppermute\) lies in the while w \(jit'
  with pytest.raises(divergence.DivergenceError, match=message) as error:
    divergence.check(text)
  for way_out in ('context_attention=all_to_all', 'pipeline.uniform=true'):
    assert way_out in str(error.value)


@pytest.mark.parametrize(
  'text',
  [
    text_of(_KNOWN),
    text_of(_IN_STAGE, 'all-reduce(%x), replica_groups={{0,1},{2,3}}'),
    text_of(_IN_STAGE, label=executor.EXCHANGE),
  ],
  ids=['run alike', 'with groups', 'between ticks'],
)
def test_what_all_devices_run_alike_may_stay(text):
  divergence.check(text)


def test_a_function_is_checked_before_it_runs():
  """Devices run the loop unlike often; were it started, it would hang."""
  mesh = mesh_lib.make(mesh_lib.MeshConfig(data=1, pipe=2), jax.devices()[:2])

  def looped(x, permutes):
    def body(_, x):
      return lax.ppermute(x, 'pipe', _PAIRS) if permutes else 2 * x

    trips = 1 + lax.axis_index('pipe')
    return lax.ppermute(lax.fori_loop(0, trips, body, x), 'pipe', _PAIRS)

  def function(permutes):
    fn = lambda x: looped(x, permutes)
    fn = jax.shard_map(
      fn, mesh=mesh, in_specs=P('pipe'), out_specs=P('pipe'), check_vma=False
    )
    return program.Checked(jax.jit(fn, donate_argnums=0), divergence.check)

  split = NamedSharding(mesh, P('pipe'))
  array = lambda size: jax.device_put(jnp.ones(size), split)
  with pytest.raises(divergence.DivergenceError, match='lies in the while'):
    function(True)(array(4))
  fn, given = function(False), array(4)
  assert fn(given).tolist() == [4, 4, 2, 2]
  assert given.is_deleted()
  assert fn(array(2)).tolist() == [4, 2]
  assert fn(array(4)).tolist() == [4, 4, 2, 2]


@pytest.fixture
def staged(tmp_path):
  """A program of two stages whose rows are split over two devices."""
  config = tiny.experiment_of(
    tmp_path,
    mesh__pipe=2,
    mesh__context=2,
    mesh__data=1,
    mesh__fsdp=1,
    mesh__tensor=1,
    pipeline__microbatches=2,
    rules__context_attention='all_to_all',
  )
  mesh = mesh_lib.make(config.mesh, jax.devices()[:4])
  made = program.Program(config, mesh, num_steps=4)
  names = ('inputs', 'targets', 'segments', 'positions')
  rows = jnp.ones((8, 32), jnp.int32)
  with sharding.use(mesh, config.rules):
    batch = dict.fromkeys(names, rows) | {'weights': rows.astype(jnp.float32)}
    yield made, made.init_state(), made.place(batch)


def test_a_layer_that_rolls_a_split_row_is_refused(staged, monkeypatch):
  made, state, batch = staged
  call = mlp.Mlp.__call__
  roll = lambda *args, **kw: jnp.roll(call(*args, **kw), 1, axis=1)
  monkeypatch.setattr(mlp.Mlp, '__call__', roll)
  for run in (made.step, made.gradients):
    with pytest.raises(divergence.DivergenceError, match='forward_tower'):
      run(state, batch)
  with pytest.raises(divergence.DivergenceError, match='forward_tower'):
    made.evaluate(state.model, batch)


def test_a_layer_that_sends_nothing_runs(staged):
  made, state, batch = staged
  state, metrics = made.step(state, batch)
  assert metrics['loss'] > 0
  assert made.step(state, batch)[1]['loss'] < metrics['loss']

"""Gradients of pipelines against those of one device, in one piece."""

import dataclasses
import functools

from flax import nnx
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from t2x.hardware import machines
from t2x.layers import attention_config
from t2x.layers import mlp
from t2x.layers import moe
from t2x.layers import norm
from t2x.layers import param
from t2x.layers import position
from t2x.layers import routing
from t2x.layers import stack
from t2x.losses import cross_entropy
from t2x.models import decoder
from t2x.models import encoder
from t2x.models import encoder_decoder
from t2x.models import model as model_lib
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding
from t2x.pipeline import config as config_lib
from t2x.pipeline import instructions
from t2x.pipeline import plan as plan_lib
from t2x.pipeline import schedules
from t2x.pipeline import simulation
from t2x.pipeline import table_search
from t2x.pipeline import weights
from t2x.training import train_state
from t2x.training import train_step
from t2x.verification import deviation

ROWS, LENGTH, SOURCE, VOCAB = 16, 8, 12, 61
# The certificate of layouts asks for 1e-4.
TOLERANCE = 1e-5
RULES = sharding.Rules(context_attention='all_to_all')
OPTIONS = machines.compiler_options('cpu') | {
  'xla_backend_optimization_level': 0
}
SHARED = {
  'vocab_size': VOCAB,
  'vocab_multiple': 8,
  'num_layers': 4,
  'embed_dim': 16,
  'dropout': 0.1,
  # Large weights, so that a mistake shows.
  'init': param.Init(std=0.2),
  'attention': attention_config.Dense(num_heads=4, head_dim=4, dropout=0.1),
  'mlp': mlp.MlpConfig(hidden=32),
}
MODELS = {
  'decoder': decoder.DecoderConfig(
    **SHARED, position=position.Learned(max_length=LENGTH)
  ),
  'encoder': encoder.EncoderConfig(
    **SHARED, residual='post_norm', num_token_types=2, embed_norm=True
  ),
  'encoder_decoder': encoder_decoder.EncoderDecoderConfig(
    **SHARED,
    norm=norm.RMSNorm(),
    position=position.RelativeBuckets(num_buckets=8, max_distance=16),
    tied_head='untied',
  ),
}


def without_dropout(config):
  """Returns a model without dropout, which is half of a pipeline's program."""
  attention = dataclasses.replace(config.attention, dropout=0.0)
  return dataclasses.replace(config, dropout=0.0, attention=attention)


PLAIN = {name: without_dropout(config) for name, config in MODELS.items()}
# Two kinds of layers, and a third group that has only one.
MODELS['experts'] = dataclasses.replace(
  PLAIN['decoder'],
  position=position.Rotary(),
  num_layers=5,
  mlp_pattern=(
    mlp.MlpConfig(hidden=32),
    moe.MoeConfig(num_experts=4, hidden=16),
  ),
)
# Towers of unlike depth; experts that a bias of their own balances.
MODELS['deep_encoder'] = dataclasses.replace(
  PLAIN['encoder_decoder'], num_encoder_layers=3, num_layers=2
)
MODELS['balanced'] = dataclasses.replace(
  PLAIN['decoder'],
  mlp=moe.MoeConfig(
    num_experts=4, hidden=16, router=routing.TokenChoice(bias_rate=0.01)
  ),
)
# A loss of several terms.
MODELS['ahead'] = dataclasses.replace(PLAIN['decoder'], ahead=(0.5,))
MODELS['sentences'] = dataclasses.replace(
  PLAIN['encoder'], pooler=True, next_sentence=True
)
# Windows, caps, and norms of heads and of what branches add, as in Gemma.
_CAPPED = {'num_heads': 4, 'head_dim': 4, 'soft_cap': 2.0, 'qk_norm': True}
MODELS['gemma'] = dataclasses.replace(
  PLAIN['decoder'],
  attention_pattern=(
    attention_config.Local(**_CAPPED, window=3),
    attention_config.Dense(**_CAPPED, bias=True, out_bias=False, rotary=False),
  ),
  norm=norm.RMSNorm(unit_offset=True),
  residual='sandwich',
  position=position.Rotary(),
  embed_scale=True,
  logit_soft_cap=3.0,
)
# Two stacks, of which the second asks for tokens that the first has not.
MODELS['dropped'] = dataclasses.replace(
  PLAIN['encoder'], num_token_types=0, query_layers=2
)
LOSS = cross_entropy.LossConfig(label_smoothing=0.1, z_loss=1e-3)


def batch_of(config, rows=ROWS):
  rng = np.random.default_rng(0)
  ids = lambda length: rng.integers(1, VOCAB, (rows, length))
  batch = {
    'inputs': ids(LENGTH),
    'targets': ids(LENGTH),
    'weights': rng.random((rows, LENGTH)).astype(np.float32),
    'segments': np.where(np.arange(LENGTH) < 6, 1, 2) * np.ones((rows, 1), int),
  }
  if config is MODELS['ahead']:
    batch['ahead2_targets'] = ids(LENGTH)
    batch['ahead2_weights'] = rng.random((rows, LENGTH)).astype(np.float32)
  if config is MODELS['dropped']:
    places = np.arange(LENGTH) * np.ones((rows, 1), int)
    batch |= {'places': places, 'query_places': places}
    for name in ('inputs', 'segments'):
      batch[f'query_{name}'] = batch[name]
    batch['query_positions'] = places
  if config is MODELS['sentences']:
    batch['sentence_targets'] = rng.integers(0, 2, (rows, 1))
    batch['sentence_weights'] = np.ones((rows, 1), np.float32)
  if isinstance(config, encoder_decoder.EncoderDecoderConfig):
    return {
      'inputs': batch['inputs'],
      'targets': batch['targets'],
      'weights': batch['weights'],
      'encoder_inputs': ids(SOURCE),
    }
  return batch


@functools.cache
def reference(name, trainable='.*', rows=ROWS):
  """Returns the model, and gradients and sums of one device."""
  config = MODELS[name]
  make = jax.jit(lambda: model_lib.make(config, rngs=nnx.Rngs(0)))
  model = make()
  step = train_state.StepConfig(loss=LOSS, trainable=trainable)
  trained, rest = train_state.partition(model, trainable)
  fn = jax.jit(
    functools.partial(train_step.gradients, config=step),
    compiler_options={'xla_backend_optimization_level': 0},
  )
  grads, sums = fn(trained, rest, batch_of(config, rows), jax.random.key(7))
  return model, grads, sums


def mesh_of(**sizes):
  num = int(np.prod([*sizes.values()]))
  config = mesh_lib.MeshConfig(**({'data': 1} | sizes))
  return mesh_lib.make(config, jax.devices()[:num])


def step_config(name, mesh, schedule, *, remat='none', **kwargs):
  settings = {'microbatches': 4, 'schedule': schedule} | kwargs
  own = ('trainable', 'accumulate', 'accumulate_whole')
  own = {key: settings.pop(key) for key in own if key in settings}
  config = config_lib.PipelineConfig(**settings)
  execution = stack.Execution(remat=remat)
  plan = plan_lib.make(MODELS[name], config, execution, mesh.shape['pipe'])
  return train_state.StepConfig(
    loss=LOSS, execution=execution, pipeline=plan, **own
  )


def placed(name, mesh, step, rows=ROWS):
  """Returns the model's two parts and a batch on the mesh."""
  model = reference(name)[0]
  rules = RULES
  if step.pipeline.placement.is_contiguous:
    rules = dataclasses.replace(rules, layers=sharding.PIPE)
  parts = train_state.partition(model, step.trainable)
  parts = [
    jax.device_put(part, sharding.shardings(part, mesh, rules))
    for part in parts
  ]
  spec = sharding.to_spec(('batch',), RULES)
  batch = jax.device_put(
    batch_of(MODELS[name], rows), NamedSharding(mesh, spec)
  )
  return *parts, batch


def run(name, mesh, step, rows=ROWS):
  """Returns gradients and sums of a pipeline."""
  with sharding.use(mesh, RULES):
    args = placed(name, mesh, step, rows)
    key = jax.device_put(jax.random.key(7), NamedSharding(mesh, P()))
    fn = jax.jit(
      functools.partial(train_step.gradients, config=step),
      compiler_options=OPTIONS,
    )
    return fn(*args, key)


def check(name, got, trainable='.*', rows=ROWS):
  grads, sums = got
  _, want, want_sums = reference(name, trainable, rows)
  far = deviation.of_tree(grads, jax.device_get(want))
  assert max(far.values()) < TOLERANCE, max(far.items(), key=lambda i: i[1])
  assert sums.keys() == want_sums.keys()
  flat = lambda sums: jax.tree.leaves(sums)
  for a, b in zip(flat(sums), flat(want_sums)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


CASES = [
  # Model, schedule, mesh, more. Chunks of two towers; uneven stages.
  ('encoder', 'zb_h1', {'pipe': 2, 'tensor': 2}, {}),
  ('encoder_decoder', 'interleaved', {'pipe': 2, 'fsdp': 2, 'data': 2}, {}),
  ('experts', 'gpipe', {'pipe': 2, 'expert': 2}, {'remat': 'full'}),
  ('decoder', 'zb_v', {'pipe': 2}, {'uniform': True}),
  ('sentences', 'one_f_one_b', {'pipe': 2}, {}),
  ('dropped', 'one_f_one_b', {'pipe': 3}, {}),
]
SLOW = [
  ('ahead', 'zb_h1', {'pipe': 2, 'data': 2}, {}),
  ('deep_encoder', 'zb_h1', {'pipe': 3}, {}),
  ('decoder', 'breadth_first', {'pipe': 2, 'context': 2, 'tensor': 2}, {}),
  ('decoder', 'zb_h2', {'pipe': 4, 'data': 2}, {'accumulate': 2}),
  ('experts', 'zb_h2', {'pipe': 2, 'fsdp': 2}, {'gather': 'tick'}),
  ('balanced', 'one_f_one_b', {'pipe': 2, 'expert': 2}, {}),
  ('decoder', 'zb_h1', {'pipe': 2, 'fsdp': 2}, {'accumulate_whole': True}),
]
EXHAUSTIVE = [
  ('gemma', 'zb_h1', {'pipe': 2, 'tensor': 2}, {}),
  ('decoder', 'one_f_one_b', {'pipe': 3}, {}),
  ('decoder', 'gpipe', {'pipe': 2, 'fsdp': 2}, {}),
  ('experts', 'zb_h1', {'pipe': 3}, {}),
  ('gemma', 'gpipe', {'pipe': 2, 'fsdp': 2}, {'remat': 'full'}),
  ('encoder_decoder', 'gpipe', {'pipe': 4}, {'remat': 'dots'}),
  ('encoder_decoder', 'zb_v', {'pipe': 2, 'tensor': 2}, {'uniform': True}),
  ('experts', 'one_f_one_b', {'pipe': 2}, {'uniform': True}),
]


def _id(case):
  name, schedule, sizes, more = case
  mesh = '_'.join(f'{k}{v}' for k, v in sizes.items())
  return '-'.join([name, schedule, mesh, *map(str, more.values())])


@pytest.mark.parametrize(
  'case',
  [
    *(pytest.param(c, id=_id(c)) for c in CASES),
    *(pytest.param(c, id=_id(c), marks=pytest.mark.slow) for c in SLOW),
    *(
      pytest.param(c, id=_id(c), marks=pytest.mark.exhaustive)
      for c in EXHAUSTIVE
    ),
  ],
)
def test_gradients_are_those_of_one_device(case):
  name, schedule, sizes, more = case
  mesh = mesh_of(**sizes)
  step = step_config(name, mesh, schedule, **more)
  rows = 2 * ROWS if more.get('accumulate') or sizes.get('data') else ROWS
  check(name, run(name, mesh, step, rows), rows=rows)


@pytest.mark.parametrize('column', ['until_weight', 'from_next', 'microbatch'])
def test_a_wrong_instruction_is_seen(column, monkeypatch):
  """Planted: the certificate fails if one column of the table is wrong."""
  make = instructions.make

  def broken(table, place):
    told = make(table, place)
    rows_TSC = told.rows_TSC.copy()
    rows_TSC[..., instructions.COLUMNS.index(column)] = 0
    return dataclasses.replace(told, rows_TSC=rows_TSC)

  mesh = mesh_of(pipe=2)
  monkeypatch.setattr(instructions, 'make', broken)
  step = step_config('decoder', mesh, 'one_f_one_b')
  with pytest.raises(AssertionError):
    check('decoder', run('decoder', mesh, step))


def test_a_part_of_the_model_is_trained():
  trainable = r'tower\.layers.*attention\.q_DNH'
  mesh = mesh_of(pipe=2)
  step = step_config('decoder', mesh, 'zb_h1', trainable=trainable)
  got = run('decoder', mesh, step)
  assert len(jax.tree.leaves(got[0])) == 1
  check('decoder', got, trainable)


def test_half_of_what_is_stacked_cannot_be_trained():
  """The last unit's layers travel with those before them."""
  mesh = mesh_of(pipe=2)
  step = step_config('experts', mesh, 'gpipe', trainable=r'.*\.remainder\..*')
  model = jax.eval_shape(
    lambda: model_lib.make(MODELS['experts'], rngs=nnx.Rngs(0))
  )
  trained, _ = train_state.partition(model, step.trainable)
  message = 'group.0 than of tower.layers.remainder.0'
  with sharding.use(mesh, RULES), pytest.raises(ValueError, match=message):
    weights.StageLayout.of(trained, step.pipeline)


@pytest.mark.parametrize('name', ['decoder', 'encoder_decoder'])
def test_evaluation_is_that_of_one_device(name):
  mesh = mesh_of(pipe=2, data=2)
  step = step_config(name, mesh, 'interleaved', microbatches=2)
  model = reference(name)[0]
  batch = batch_of(MODELS[name])
  plain = dataclasses.replace(step, pipeline=None)
  fn = lambda config: functools.partial(train_step.eval_step, config=config)
  want = jax.jit(fn(plain))(model, batch)
  with sharding.use(mesh, RULES):
    trained, rest, batch = placed(name, mesh, step)
    whole = train_state.combine(trained, rest)
    got = jax.jit(fn(step), compiler_options=OPTIONS)(whole, batch)
  for key, value in want.items():
    np.testing.assert_allclose(got[key], value, rtol=1e-5)


def lowered(mesh, schedule, micro, remat='none'):
  """Compiles a step of `micro` microbatches of two rows a device."""
  step = step_config('decoder', mesh, schedule, microbatches=micro, remat=remat)
  rows = 2 * micro
  with sharding.use(mesh, RULES):
    args = placed('decoder', mesh, step, rows)
    fn = functools.partial(train_step.gradients, config=step)
    key = jax.device_put(jax.random.key(7), NamedSharding(mesh, P()))
    return jax.jit(fn, compiler_options=OPTIONS).lower(*args, key).compile()


@pytest.mark.slow
def test_memory_is_flat_for_1f1b_and_linear_for_gpipe():
  """In the number of microbatches, of the compiler's temporaries."""
  mesh = mesh_of(pipe=2)
  temp = lambda *args: lowered(mesh, *args).memory_analysis().temp_size_in_bytes
  one = [temp('one_f_one_b', micro) for micro in (4, 16)]
  gpipe = [temp('gpipe', micro) for micro in (4, 16)]
  # What grows is the batch itself, its tokens and weights.
  assert one[1] < 1.1 * one[0], one
  assert gpipe[1] > 2 * gpipe[0], gpipe


def test_a_table_of_ones_own(tmp_path):
  """One that was made for costs, kept in a file and changed there."""
  file = tmp_path / 'mine.csv'
  costs = simulation.Costs(backward=1.5, weight=0.5)
  lines = table_search.search(2, 4, limit=3, costs=costs).to_csv().splitlines()
  file.write_text('\n'.join([*lines, f'{len(lines) - 2},,']))  # An idle tick.
  mesh = mesh_of(pipe=2)
  step = step_config('decoder', mesh, str(file))
  assert step.pipeline.table.num_ticks == len(lines) - 1
  check('decoder', run('decoder', mesh, step))


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'schedule': 'zbh1'}, "pipeline.schedule: .*Did you mean 'zb_h1'"),
    ({'schedule': 'zb_v', 'chunks': 3}, 'pipeline.chunks=3'),
    ({'chunks': 4}, '8 parts of a pipeline for 4'),
    ({'layers': (1, 2)}, 'adds up to 3. The parts must make up 4 layers'),
    ({'schedule': 'mine.csv'}, 'there is no such file'),
  ],
)
def test_what_cannot_be_is_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    config = config_lib.PipelineConfig(**({'microbatches': 4} | settings))
    plan_lib.make(MODELS['decoder'], config, stack.Execution(), 2)


def test_a_table_of_other_numbers_is_refused(tmp_path):
  file = tmp_path / 'mine.csv'
  file.write_text(schedules.gpipe(2, 8).to_csv())
  config = config_lib.PipelineConfig(schedule=str(file), microbatches=4)
  with pytest.raises(ValueError, match='Set pipeline.microbatches=8'):
    plan_lib.make(MODELS['decoder'], config, stack.Execution(), 2)

"""Segment memory: rows that go on see what a whole row would."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from t2x.compilation import program as program_lib
from t2x.config import consistency
from t2x.data import batches as batches_lib
from t2x.data import corpus as corpus_lib
from t2x.data import input_pipeline
from t2x.layers import attention_config
from t2x.layers import linear
from t2x.layers import mlp
from t2x.layers import moe
from t2x.layers import position
from t2x.layers import stack
from t2x.layers import transformer_xl
from t2x.models import decoder
from t2x.models import forward
from t2x.models import segment_memory
from t2x.objectives import causal_lm
from t2x.objectives import mixture
from t2x.objectives import rows as rows_lib
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding
from t2x.training import evaluate
from t2x.training import train_state
from t2x.training import train_step

VOCAB, ROWS, LENGTH = 50, 3, 12
HEADS = {'num_heads': 4, 'head_dim': 8}
CONFIG = decoder.DecoderConfig(
  vocab_size=VOCAB,
  vocab_multiple=8,
  num_layers=3,
  embed_dim=32,
  attention=attention_config.Dense(**HEADS),
  mlp=mlp.MlpConfig(hidden=64),
  position=position.Rotary(),
  memory=LENGTH,
)
KINDS = {
  'rotary': {},
  'transformer_xl': {
    'attention': transformer_xl.TransformerXL(**HEADS),
    'position': None,
  },
  'buckets': {'position': position.RelativeBuckets(num_buckets=8)},
  'window': {'attention': attention_config.Local(**HEADS, window=7)},
  'long_window': {'attention': attention_config.Local(**HEADS, window=99)},
  # Two layers that repeat, one that is left, and experts.
  'groups': {
    'attention_pattern': (
      attention_config.Dense(**HEADS, num_kv_heads=2),
      attention_config.Local(**HEADS, num_kv_heads=1, window=9),
    ),
    'mlp': moe.MoeConfig(hidden=16, num_experts=4),
  },
}
EXECUTIONS = {
  'groups': stack.Execution(scan=False, remat='full'),
  'buckets': stack.Execution(remat='full'),
}
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


@functools.cache
def make(config):
  return jit(lambda: decoder.Decoder(config, rngs=nnx.Rngs(0)))()


def texts(num=3):
  """A few documents, by row, over so many rows' lengths."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, VOCAB, (ROWS, num * LENGTH))
  segments = np.ones_like(tokens)
  segments[0, 5:] += 1
  segments[0, 30:] += 1
  segments[1, 12:] += 1  # Ends with a row.
  return tokens, segments


def pieces(num=3):
  """The same, cut into rows, with numbers of their own."""
  tokens, segments = texts(num)
  for i in range(num):
    part = slice(i * LENGTH, (i + 1) * LENGTH)
    own = segments[:, part] - segments[:, part][:, :1] + 1
    before = segments[:, part.start - 1] if i else np.zeros(ROWS)
    yield {
      'inputs': tokens[:, part],
      'segments': own,
      'positions': rows_lib.positions(own),
      'continues': (segments[:, part.start] == before)[:, None].astype(int),
    }


def run(config, num=3, execution=stack.Execution()):
  """Features row by row, each with the memory of those before."""
  model = make(config)
  fn = jit(functools.partial(forward.recall, execution=execution))
  memory, found = segment_memory.empty(model, ROWS, config.memory), []
  for batch in pieces(num):
    x, _, memory = fn(model, batch, memory)
    found.append(model.leave(x, batch))
  return np.concatenate(found, axis=1)


@pytest.mark.parametrize('kind', KINDS)
def test_rows_that_go_on_are_one_row(kind):
  """With a memory that holds all of it, in every layer."""
  config = dataclasses.replace(CONFIG, memory=2 * LENGTH, **KINDS[kind])
  tokens, segments = texts()
  positions = rows_lib.positions(segments)
  whole = jit(
    lambda m: m.hidden(tokens, segments=segments, positions=positions)
  )(make(config))
  execution = EXECUTIONS.get(kind, stack.Execution())
  got = run(config, execution=execution)
  np.testing.assert_allclose(got, whole, rtol=1e-4, atol=2e-5)
  without = run(dataclasses.replace(config, memory=1))
  assert np.abs(without - whole)[2, LENGTH:].max() > 1e-2


def test_a_short_memory_is_a_short_look_back():
  """Of one layer: the window of a row and so many tokens before it."""
  config = dataclasses.replace(CONFIG, num_layers=1, memory=5)
  tokens, segments = texts(2)
  got = run(config, 2)[:, LENGTH:]
  part = slice(LENGTH - 5, None)
  positions = rows_lib.positions(segments[:, part])
  want = jit(
    lambda m: m.hidden(
      tokens[:, part], segments=segments[:, part], positions=positions
    )
  )(make(config))
  np.testing.assert_allclose(got, want[:, 5:], rtol=1e-4, atol=2e-5)


def test_nothing_of_another_document_is_seen():
  model, fn = make(CONFIG), jit(forward.recall)
  first, second = [*pieces(2)]
  empty = segment_memory.empty(model, ROWS, LENGTH)
  _, _, memory = fn(model, first, empty)
  changed = first | {'inputs': (first['inputs'] + 7) % VOCAB}
  _, _, other = fn(model, changed, empty)
  want, _, _ = fn(model, second, memory)
  got, _, _ = fn(model, second, other)
  same = np.asarray(got == want).all((1, 2))
  # Row 1 begins a document; the others go on with theirs.
  assert same.tolist() == [False, True, False]
  # Row 0 sees of the row before what its document has there, from place 5.
  early = first | {'inputs': first['inputs'].copy()}
  early['inputs'][0, :5] = 1
  _, _, other = fn(model, early, empty)
  got, _, _ = fn(model, second, other)
  assert np.asarray(got == want)[0].all()


def test_memory_has_no_gradient():
  model, (first, second) = make(CONFIG), [*pieces(2)]
  empty = segment_memory.empty(model, ROWS, LENGTH)

  def loss(model, memory):
    return (forward.recall(model, second, memory)[0] ** 2).sum()

  def both(model):
    _, _, memory = forward.recall(model, first, empty)
    return loss(model, memory)

  _, _, memory = forward.recall(model, first, empty)
  want = jit(jax.grad(loss))(model, memory)
  got = jit(jax.grad(both))(model)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


# --- In a run. ---


def experiment_of(directory, **settings):
  return tiny.experiment_of(
    directory,
    model__memory=24,
    model__position='rotary',
    data__batching='stream',
    **settings,
  )


ONE = {'mesh__data': 1, 'mesh__fsdp': 1, 'mesh__tensor': 1}


def test_rows_follow_each_other(tmp_path):
  config = experiment_of(tmp_path)
  corpus = corpus_lib.prepare(config.data)
  (stream,) = corpus.streams('train')
  training = batches_lib.TrainBatches(corpus, config.data, seed=0)
  num = training.steps_per_epoch
  starts = {*stream.offsets[:-1].tolist()}
  evaluated = [*input_pipeline.eval_batches(corpus, config.data, 'train')]
  assert len(evaluated) == num and (num - 1) * 8 * 32 < stream.num_tokens
  for batches in ([training[step] for step in range(num)], evaluated):
    # The parts of the batch, one after the other, are the text.
    joined = np.stack([b['inputs'] for b in batches], axis=1).ravel()
    np.testing.assert_array_equal(
      joined[: stream.num_tokens], stream.tokens[: stream.num_tokens]
    )
    assert not joined[stream.num_tokens :].any()
    for step, lane in np.ndindex(num, 8):
      at = (lane * num + step) * 32
      goes_on = step > 0 and at not in starts and at < stream.num_tokens
      assert batches[step]['continues'][lane, 0] == goes_on
    weight = sum(b['weights'].sum() for b in batches)
    assert weight == stream.num_tokens - len(starts)
  np.testing.assert_array_equal(training[num]['inputs'], training[0]['inputs'])
  assert not training[num]['continues'].any()
  short = dataclasses.replace(
    config.data, batch_size=training._make.layout.group_sizes()[0]
  )
  with pytest.raises(ValueError, match='none would ever go on'):
    batches_lib.TrainBatches(corpus, short, seed=0)


def trained(directory, num_steps=3, state=None, program=None, **settings):
  config = experiment_of(directory, **settings)
  sizes = config.mesh
  num = sizes.data * sizes.fsdp * sizes.tensor
  mesh = mesh_lib.make(sizes, jax.devices()[:num])
  corpus = corpus_lib.prepare(config.data)
  batches = batches_lib.TrainBatches(corpus, config.data, seed=0)
  losses = []
  with sharding.use(mesh, config.rules):
    program = program or program_lib.Program(config, mesh, num_steps=9)
    state = program.init_state() if state is None else state
    for step in range(int(state.step), int(state.step) + num_steps):
      state, metrics = program.step(state, program.place(batches[step]))
      losses.append(float(metrics['loss']))
    sets = input_pipeline.eval_batches(
      corpus, config.data, 'train', max_batches=3
    )
    found = evaluate.evaluate(
      program.evaluate, state.model, map(program.place, sets)
    )
  return state, losses, found, program


def test_layouts_continuation_and_evaluation(tmp_path):
  state, losses, found, program = trained(tmp_path, **ONE)
  other, split, again, _ = trained(tmp_path)
  np.testing.assert_allclose(split, losses, rtol=1e-5)
  np.testing.assert_allclose(again['loss'], found['loss'], rtol=1e-5)
  mine, theirs = (s.carried[segment_memory.NAME] for s in (state, other))
  for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
  parts = jax.tree.leaves(theirs['layers'])[0].sharding
  assert len(parts.device_set) == 8 and not parts.is_fully_replicated

  same = ONE | {'program': program}
  before, _, _, _ = trained(tmp_path, num_steps=2, **same)
  restored = tiny.saved_and_restored(tmp_path / 'run', before, program.shapes)
  last, end, _, _ = trained(tmp_path, num_steps=1, state=restored, **same)
  assert end == losses[2:]
  for a, b in zip(jax.tree.leaves(last), jax.tree.leaves(state), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_skipped_step_hides_what_was_before(tmp_path):
  """Else the next rows would take it for the end of the skipped ones."""
  state, _, _, program = trained(tmp_path, num_steps=2, **ONE)
  corpus = corpus_lib.prepare(program.config.data)
  batches = batches_lib.TrainBatches(corpus, program.config.data, seed=0)
  grads, sums = program.gradients(state, batches[2])
  for loss, is_shown in ((sums['loss'], True), (np.float32('nan'), False)):
    after, _ = program.apply(state, grads, {**sums, 'loss': loss})
    memory = jax.device_get(after.carried[segment_memory.NAME])
    assert (memory['segments'] > 0).any() == is_shown
    before = jax.device_get(state.carried[segment_memory.NAME]['layers'])
    same = [
      np.array_equal(a, b)
      for a, b in zip(
        jax.tree.leaves(memory['layers']), jax.tree.leaves(before), strict=True
      )
    ]
    assert all(same) != is_shown


def test_compiled_programs_hand_a_memory_on(tmp_path):
  """What an evaluation gives lies where the next one looks for it."""
  state, _, found, program = trained(tmp_path, num_steps=1)
  config = program.config
  corpus = corpus_lib.prepare(config.data)
  mesh = mesh_lib.make(config.mesh)
  with sharding.use(mesh, config.rules):
    lowered = program.lowered()['evaluate']
    program.replace({'evaluate': lowered.compile()})
    sets = input_pipeline.eval_batches(
      corpus, config.data, 'train', max_batches=3
    )
    again = evaluate.evaluate(
      program.evaluate, state.model, map(program.place, sets)
    )
  assert again == found


def test_an_evaluation_goes_on_from_batch_to_batch(tmp_path):
  """Its loss is that of the model's own passes, one after the other."""
  state, _, found, program = trained(tmp_path, num_steps=1, **ONE)
  config = program.config
  corpus = corpus_lib.prepare(config.data)
  memory, total, num = segment_memory.empty(state.model, 8, 24), 0.0, 0.0
  step = dataclasses.replace(train_state.StepConfig(), memory=(8, 24))
  fn = jit(functools.partial(train_step.eval_step, config=step))
  for batch in input_pipeline.eval_batches(
    corpus, config.data, 'train', max_batches=3
  ):
    sums = fn(state.model, batch, memory)
    memory = sums['memory']
    total, num = total + sums['nll'], num + sums['weight']
  np.testing.assert_allclose(found['loss'], total / num, rtol=1e-5)
  shown = jnp.mean(memory['segments'] > 0)
  assert 0.3 < shown


def test_messages(tmp_path):
  consistency.check(experiment_of(tmp_path), 8)
  for settings, message in (
    ({'data__batching': 'pack'}, r'Set data\.batching=stream'),
    ({'train__accumulate': 2}, 'of whole rows of a whole batch'),
    ({'mesh__context': 2, 'mesh__data': 1}, 'of whole rows of a whole batch'),
    ({'data__objective': 'prefix_lm'}, 'is for data.objective=causal_lm'),
    (
      {'model__ahead': (0.3,), 'data__objective__ahead': 1},
      'for further tokens have no memory',
    ),
  ):
    with pytest.raises(ValueError, match=message):
      consistency.check(
        tiny.experiment_of(
          tmp_path,
          **{
            'model__memory': 24,
            'model__position': 'rotary',
            'data__batching': 'stream',
            **settings,
          },
        ),
        8,
      )
  # A window may reach further than row and memory, which are 56 tokens: that
  # of a checkpoint stays what it is. Kinds that none has may not.
  local = {'model__attention': 'local', 'model__attention__window': 60}
  consistency.check(experiment_of(tmp_path, **local), 8)
  dilated = {'model__attention': 'dilated', 'model__attention__window': 60}
  with pytest.raises(ValueError, match='more than the 56 of a sequence'):
    consistency.check(experiment_of(tmp_path, **dilated), 8)
  pairs = tiny.experiment_of(
    tmp_path, data__batching='stream', data__objective='next_sentence'
  )
  with pytest.raises(ValueError, match='next_sentence has other rows'):
    input_pipeline.check(pairs.data)
  tasks = [mixture.Task(name=n, objective=causal_lm.CausalLM()) for n in 'ab']
  mixed = dataclasses.replace(
    pairs.data, objective=mixture.Mixture(tasks=tuple(tasks))
  )
  with pytest.raises(ValueError, match='=mixture are of several'):
    input_pipeline.check(mixed)
  with pytest.raises(ValueError, match='before the first position'):
    dataclasses.replace(CONFIG, position=position.Learned())
  with pytest.raises(ValueError, match='goes by whole rows'):
    dataclasses.replace(CONFIG, attention=linear.Linear(**HEADS))

"""What traced models cost, held to the formulas of `flops`."""

import dataclasses
import functools
import math

import extras
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shrunk

from t2x.attention import mask as mask_lib
from t2x.hlo import jaxpr_costs
from t2x.hlo import matmul_flops
from t2x.layers import moe
from t2x.layers import position
from t2x.layers import routing
from t2x.layers import stack
from t2x.losses import cross_entropy
from t2x.models import encoder
from t2x.models import encoder_decoder
from t2x.models import flops
from t2x.models import model as model_lib
from t2x.training import optim
from t2x.training import train_state
from t2x.training import train_step

_TX = optim.make(optim.Sgd(clip_norm=None), 10)
_REMATS = {
  remat: train_state.StepConfig(execution=stack.Execution(remat=remat))
  for remat in ('none', 'full', 'dots')
}
_NONE = _REMATS['none']


@functools.cache
def _model(config):
  return jax.eval_shape(lambda: model_lib.make(config, rngs=nnx.Rngs(0)))


def _batch(config):
  tokens = lambda T: jax.ShapeDtypeStruct((shrunk.ROWS, T), jnp.int32)
  source = shrunk.source_length(config)
  batch = {'inputs': tokens(shrunk.LENGTH)}
  return batch | ({} if source is None else {'encoder_inputs': tokens(source)})


@functools.cache
def _forward(config) -> jaxpr_costs.Counted:
  fn = lambda model, batch: model(**batch)
  return jaxpr_costs.count(jax.make_jaxpr(fn)(_model(config), _batch(config)))


def _step_arguments(config):
  batch = _batch(config)
  targets = batch['inputs']
  weights = jax.ShapeDtypeStruct(targets.shape, jnp.float32)
  batch |= {'targets': targets, 'weights': weights}
  init = functools.partial(train_state.init_state, tx=_TX, config=_NONE)
  key = jax.eval_shape(jax.random.key, 0)
  return jax.eval_shape(init, _model(config)), batch, key


@functools.cache
def _train(config, step=_NONE) -> jaxpr_costs.Counted:
  fn = functools.partial(train_step.train_step, tx=_TX, config=step)
  return jaxpr_costs.count(jax.make_jaxpr(fn)(*_step_arguments(config)))


# The parts of `flops.forward_parts` by the named scopes that make them.
_SCOPES = {
  'projections': ('attention',),
  'scores and values': ('attention/scores',),
  'cross-attention': ('cross', 'cross/scores'),
  'mlp': ('mlp',),
  'router': ('mlp/router',),
  'head': ('head',),
  'balance': ('balance',),
}


def _parts(counted: jaxpr_costs.Counted) -> dict[str, int]:
  """Returns FLOPs by the parts of the formula."""
  parts = {}
  for source, cost in counted.sources.items():
    tower, _, scope = source.partition('/')
    scope = scope if tower in ('tower', 'encoder', 'decoder') else source
    named = [part for part, scopes in _SCOPES.items() if scope in scopes]
    assert named or not cost.flops, source
    if cost.flops:
      parts[named[0]] = parts.get(named[0], 0) + cost.flops
  return parts


def _computed(config) -> dict[str, int]:
  """Returns the formula's parts, and what a program computes beyond them."""
  length, source = shrunk.LENGTH, shrunk.source_length(config)
  parts = flops.forward_parts(
    config, flops.BatchShape(shrunk.ROWS, length, source), skip_masked=False
  )
  # Logits of the rows that pad the vocabulary.
  padded = math.ceil(config.vocab_size / 128) * 128 - config.vocab_size
  parts['head'] += 2 * shrunk.ROWS * length * config.embed_dim * padded
  for i in range(config.num_layers):
    _, mlp = config.group[i % len(config.group)]
    if isinstance(mlp, moe.MoeConfig):
      parts['mlp'] += _empty_slots(mlp, length, config.embed_dim)
  return parts


def _empty_slots(mlp: moe.MoeConfig, length: int, D: int) -> int:
  """FLOPs of an expert's slots beyond those that tokens can take.

  An expert computes all its slots, taken or not. The formula counts experts of
  a token: no more than it chose.
  """
  router = mlp.router
  if router.capacity is None:
    return 0
  share = router.capacity * getattr(router, 'top_k', 1) / mlp.num_experts
  slots = mlp.num_experts * min(length, math.ceil(share * length))
  empty = slots - length * mlp.experts_of_token
  products = 3 if mlp.gated else 2
  return round(shrunk.ROWS * empty * products * 2 * D * mlp.hidden)


_slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize('name', shrunk.CONFIGS)
def test_a_forward_pass_has_the_products_of_the_formula(name):
  config = shrunk.CONFIGS[name]
  counted = _forward(config)
  assert _parts(counted) == _computed(config)
  assert counted.total.flops > 1e6


@pytest.mark.parametrize('name', shrunk.CONFIGS)
@pytest.mark.parametrize('remat', [_slow('none'), 'full', _slow('dots')])
def test_a_step_has_three_forward_passes_and_what_remat_adds(name, remat):
  config = shrunk.CONFIGS[name]
  forward = _parts(_forward(config))
  again = dict.fromkeys(forward, 0)
  if remat == 'full':  # All of each layer, but for its dead last products.
    again = forward | {'head': 0}
    for part, dead in _dead(config).items():
      again[part] -= dead
  elif remat == 'dots':  # All products that are not with weights.
    again |= {'scores and values': forward['scores and values']}
    if 'cross-attention' in again:
      again['cross-attention'] = _cross_scores(config)
  expected = {part: 3 * n + again[part] for part, n in forward.items()}
  if 'router' in forward:
    # Two losses of each router meet the weights of the rows, which have no
    # gradient; where experts choose, there is no balance to learn.
    gradients = 1 if name == 'expert choice' else 2
    layers = sum(
      isinstance(config.group[i % len(config.group)][1], moe.MoeConfig)
      for i in range(config.num_layers)
    )
    expected['balance'] = (2 + gradients) * layers * 2 * shrunk.ROWS
  assert _parts(_train(config, _REMATS[remat])) == expected


def _dead(config) -> dict[str, int]:
  """FLOPs of results that no gradient needs, in all layers of a forward pass.

  What a layer adds last: down, beside which the parallel form adds the output
  of attention. In post-norm order a norm reads their sum, in sandwich order the
  output itself, and the outputs of experts meet weights that have gradients:
  there nothing is dead.
  """
  if config.residual in ('post_norm', 'sandwich'):
    return {}
  D, rows, length = config.embed_dim, shrunk.ROWS, shrunk.LENGTH
  dead = {'mlp': 0, 'projections': 0}
  positions = [length] * config.num_layers
  if isinstance(config, encoder_decoder.EncoderDecoderConfig):
    num = config.num_encoder_layers or config.num_layers
    positions += [shrunk.SOURCE] * num
  for i, length in enumerate(positions):
    kind, mlp = config.group[i % len(config.group)]
    if not isinstance(mlp, moe.MoeConfig):
      dead['mlp'] += 2 * rows * length * mlp.hidden * D
    if config.residual == 'parallel':
      N, H = kind.num_heads, kind.head_dim
      dead['projections'] += 2 * rows * length * N * H * D
  return dead


def _cross_scores(config) -> int:
  kind = config.attention
  pairs = shrunk.LENGTH * shrunk.SOURCE
  heads = kind.num_heads * kind.head_dim
  return 4 * config.num_layers * shrunk.ROWS * heads * pairs


@pytest.mark.parametrize('capacity, empty', [(0.5, 0), (1.0, 0), (1.25, 12)])
def test_slots_are_computed_whether_or_not_they_are_taken(capacity, empty):
  """24 tokens choose 2 of 4 experts; 1.25 leaves 15 slots an expert, not 12."""
  router = routing.TokenChoice(capacity=capacity)
  config = dataclasses.replace(
    shrunk.CONFIGS['dropless'], mlp=shrunk.experts(router)
  )
  counted = _parts(_forward(config))
  formula = flops.forward_parts(
    config, flops.BatchShape(shrunk.ROWS, shrunk.LENGTH), skip_masked=False
  )
  of_slot = 2 * 2 * 32 * 24  # Up and down.
  more = 3 * shrunk.ROWS * empty * of_slot
  assert counted['mlp'] - formula['mlp'] == more
  assert counted == _computed(config)


@pytest.mark.parametrize('name', ['pattern', 'bare encoder', 'gpt2_small'])
def test_blocks_of_queries_meet_the_keys_in_their_reach(name):
  config = shrunk.CONFIGS[name]
  kinds = [dataclasses.replace(kind, block=8) for kind in config.kinds]
  config = dataclasses.replace(
    config,
    attention=kinds[0],
    attention_pattern=tuple(kinds) if config.attention_pattern else (),
  )
  causal = not isinstance(config, encoder.EncoderConfig)
  expected = 0
  for i in range(config.num_layers):
    kind = kinds[i % len(kinds)]
    heads = kind.num_heads * kind.head_dim
    pairs = _pairs_of_blocks(causal, kind)
    expected += 4 * shrunk.ROWS * heads * pairs
  found = _parts(_forward(config))['scores and values']
  assert found == expected
  whole = _parts(_forward(shrunk.CONFIGS[name]))['scores and values']
  assert found < whole


def _pairs_of_blocks(causal, kind) -> int:
  """Queries and keys of blocks that the whole mask leaves anything of."""
  T = shrunk.LENGTH
  mask = mask_lib.make(causal=causal) & kind.pattern(T, causal=causal)
  seen = mask_lib.visible(mask, slice(0, T), slice(0, T))
  pairs = 0
  for rows in np.split(np.asarray(seen), T // 8):
    keys = np.flatnonzero(rows.any(0))
    pairs += 8 * (keys[-1] - keys[0] + 1)
  return pairs


@pytest.mark.parametrize(
  'changes',
  [
    {'accumulate': 2},
    {'loss': cross_entropy.LossConfig(token_chunks=4)},
    {'execution': stack.Execution(scan=False)},
    {'execution': stack.Execution(scan=False, remat='full')},
    {'execution': stack.Execution(scan=False, remat='dots')},
  ],
)
def test_a_step_costs_the_same_however_it_is_cut(changes):
  config = shrunk.CONFIGS['pattern']
  step = dataclasses.replace(_NONE, **changes)
  like = _REMATS[step.execution.remat]
  assert _parts(_train(config, step)) == _parts(_train(config, like))


def test_chunks_of_the_vocabulary_make_their_logits_twice():
  config = shrunk.CONFIGS['pattern']
  chunked = dataclasses.replace(
    _NONE, loss=cross_entropy.LossConfig(vocab_chunks=4)
  )
  forward = _parts(_forward(config))
  more = {'head': 4 * forward['head']}
  assert _parts(_train(config, chunked)) == _parts(_train(config)) | more


@pytest.mark.slow
@pytest.mark.parametrize(
  'name',
  [pytest.param('gpt3_175b', marks=pytest.mark.exhaustive), 't5_v1_1_base'],
)
def test_the_compiled_step_has_the_products_of_its_jaxpr(name):
  config = shrunk.CONFIGS[name]
  step = _REMATS['full']
  fn = functools.partial(train_step.train_step, tx=_TX, config=step)
  compiled = jax.jit(fn).lower(*_step_arguments(config)).compile()
  counted = _train(config, step).total.flops
  assert counted == matmul_flops.matrix_flops(compiled.as_text())


@pytest.mark.slow
def test_gpt2_has_the_products_that_torch_counts():
  transformers = extras.need('transformers', extra='reference')
  torch = extras.need('torch', extra='reference')
  from torch.utils import flop_counter  # Where torch is.

  config = dataclasses.replace(
    shrunk.CONFIGS['gpt2_small'], vocab_size=256, position=position.Learned()
  )
  theirs = transformers.GPT2Config(
    vocab_size=256,
    n_embd=32,
    n_layer=3,
    n_head=4,
    n_inner=48,
    attn_implementation='eager',
  )
  model = transformers.GPT2LMHeadModel(theirs).train()
  tokens = torch.zeros((shrunk.ROWS, shrunk.LENGTH), dtype=torch.long)
  counter = flop_counter.FlopCounterMode(display=False)
  with counter:
    model(tokens, labels=tokens).loss.backward()
  assert counter.get_total_flops() == _train(config).total.flops

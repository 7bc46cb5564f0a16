"""Attention of split rows against the oracle that sees whole ones."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from t2x.attention import all_to_all
from t2x.attention import context
from t2x.attention import dense
from t2x.attention import mask as mask_lib
from t2x.attention import patterns
from t2x.attention import reference
from t2x.attention import ring_plan
from t2x.layers import dropout
from t2x.layers import position
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding
from t2x.parallel import zigzag

B, T, H = 2, 32, 4
Mask = mask_lib.Mask
make_mask = mask_lib.make
RULES = sharding.Rules()
EXCHANGE = sharding.Rules(context_attention='all_to_all')
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """Shapes and mask, in the order of the sequence."""

  mask: mask_lib.Mask = Mask()
  S: int = T
  N: int = 4
  K: int = 4
  options: dense.AttentionOptions = dense.AttentionOptions()
  bias: str = ''
  drop: float = 0.0


def segments(length, seed=0):
  rng = np.random.default_rng(seed)
  cuts = np.sort(rng.choice(np.arange(1, length), (B, 3)), axis=1)
  places = np.arange(length)[None, :, None]
  return jnp.asarray((places >= cuts[:, None]).sum(-1))


def seen_by_segment(**kwargs):
  own = segments(T)
  return make_mask(q_segments_BT=own, k_segments_BS=own, **kwargs)


CASES = {
  'everything': Case(),
  'causal': Case(mask=make_mask(causal=True)),
  'causal, segments': Case(mask=seen_by_segment(causal=True)),
  'window': Case(mask=make_mask(causal=True, window=5)),
  'long window': Case(mask=seen_by_segment(causal=True, window=19)),
  'two-sided window': Case(mask=make_mask(window=6)),
  'prefix': Case(mask=make_mask(causal=True, prefix_B=jnp.asarray([3, 21]))),
  'a prefix for each key': Case(
    mask=make_mask(causal=True)
    | mask_lib.with_prefix(
      jnp.asarray([[5] * 9 + [17] * 23, [0] * 4 + [30] * 28])
    )
  ),
  'grouped-query': Case(mask=make_mask(causal=True), N=8, K=4),
  'multi-query': Case(mask=seen_by_segment(causal=True), N=8, K=2),
  'cross': Case(
    mask=Mask(q_segments_BT=segments(T), k_segments_BS=segments(48, 1)), S=48
  ),
  'relative bias': Case(mask=make_mask(causal=True), bias='relative'),
  'relative, both sides': Case(mask=seen_by_segment(), bias='relative'),
  # Scanned on whole rows, see `blocks.are_scanned`.
  'relative, with gaps': Case(
    mask=Mask(
      pattern=patterns.Causal() & (patterns.Window(3) | patterns.Global(2))
    ),
    options=dense.AttentionOptions(block=2),
    bias='relative',
  ),
  'alibi': Case(mask=make_mask(causal=True), bias='alibi'),
  'soft cap and scale': Case(
    mask=make_mask(causal=True),
    options=dense.AttentionOptions(soft_cap=2.0, scale=1.0),
  ),
  'blocks': Case(
    mask=make_mask(causal=True), options=dense.AttentionOptions(block=3)
  ),
  # Several to a run, and several runs to a piece.
  'small blocks': Case(
    mask=seen_by_segment(causal=True),
    N=8,
    K=4,
    options=dense.AttentionOptions(block=1),
    bias='relative',
  ),
  'dropout': Case(mask=make_mask(causal=True), drop=0.3),
  'dropout, small blocks': Case(
    mask=make_mask(causal=True),
    options=dense.AttentionOptions(block=1),
    drop=0.3,
  ),
  'dropout, cross': Case(S=48, drop=0.3),
}


def make_bias(case):
  if case.bias == 'relative':
    config = position.RelativeBuckets(num_buckets=8, max_distance=16)
    return position.RelativeBias(
      config,
      case.N,
      bidirectional=not patterns.has(case.mask.pattern, patterns.Causal),
      std=1.0,
      rngs=nnx.Rngs(0),
    )
  return position.AlibiBias(case.N) if case.bias == 'alibi' else None


def arguments(case):
  keys = jax.random.split(jax.random.key(0), 4)
  draw = lambda key, *shape: jax.random.normal(key, (B, *shape, H))
  q = draw(keys[0], T, case.N)
  k, v = draw(keys[1], case.S, case.K), draw(keys[2], case.S, case.K)
  return (q, k, v, make_bias(case)), draw(keys[3], T, case.N)


def drop_of(case):
  keys_B = dropout.row_keys(jax.random.key(5), jnp.arange(B))
  return dropout.OfScores(keys_B=keys_B, rate=case.drop) if case.drop else None


def both(fn, weights):
  """Returns fn's output, and gradients of a weighted sum of it."""

  def loss(args):
    out = fn(*args)
    return (out * weights).sum(), out

  def run(args):
    (_, out), grads = jax.value_and_grad(loss, has_aux=True)(args)
    return out, grads

  return run


def options_of(case, bias):
  return dataclasses.replace(case.options, bias=bias, dropout=drop_of(case))


@functools.cache
def whole(name):
  """What one device computes; the oracle, where nothing is dropped."""
  case = CASES[name]
  args, weights = arguments(case)
  attend = dense.attend if case.drop else reference.attend

  def fn(q, k, v, bias):
    return attend(q, k, v, case.mask, options_of(case, bias))

  return jax.device_get(jit(both(fn, weights))(args))


def prefix_in(prefix_BS, k_order):
  """The order of keys, where each key has its own."""
  if prefix_BS is None or prefix_BS.shape[1] == 1:
    return prefix_BS
  return prefix_BS[:, k_order]


def split(case, rules, devices, sizes):
  """The same where `devices` share each row."""
  (q, k, v, bias), weights = arguments(case)
  mask = case.mask
  if rules.context_attention == 'ring' and rules.balance_context:
    # Causal rows, and targets that look at a source.
    causal = patterns.has(mask.pattern, patterns.Causal)
    own = devices if causal or case.S != T else 1
    source = own if case.S == T else 1
    mask = dataclasses.replace(mask, q_zigzag=own, k_zigzag=source)
  q_order = zigzag.index(T, mask.q_zigzag)
  k_order = zigzag.index(case.S, mask.k_zigzag)
  at = lambda x, order: None if x is None else x[:, order]
  mask = dataclasses.replace(
    mask,
    q_segments_BT=at(mask.q_segments_BT, q_order),
    k_segments_BS=at(mask.k_segments_BS, k_order),
    prefix_BS=prefix_in(mask.prefix_BS, k_order),
  )
  mesh = mesh_lib.make(
    mesh_lib.MeshConfig(context=devices, **{'data': 1, **sizes}),
    jax.devices()[: devices * int(np.prod([*sizes.values()], dtype=int))],
  )

  def fn(q, k, v, bias):
    return context.attend(q, k, v, mask, options_of(case, bias))

  where = NamedSharding(mesh, P('data', 'context', 'tensor'))
  put = lambda x, order: jax.device_put(x[:, order], where)
  args = put(q, q_order), put(k, k_order), put(v, k_order), bias
  with sharding.use(mesh, rules):
    run = jit(both(fn, put(weights, q_order)))
    out, (d_q, d_k, d_v, d_bias) = jax.device_get(run(args))
  back = lambda x, order: x[:, np.argsort(order)]
  d_kv = back(d_k, k_order), back(d_v, k_order)
  return back(out, q_order), (back(d_q, q_order), *d_kv, d_bias)


def assert_same(got, want):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b).max()))


exhaustive = functools.partial(pytest.param, marks=pytest.mark.exhaustive)
# Masks, grouped heads, biases, dropout and blocks.
_BALANCED = (
  'prefix',
  'causal',
  'causal, segments',
  'long window',
  'two-sided window',
  'a prefix for each key',
  'multi-query',
  'cross',
  'relative bias',
  'relative, with gaps',
  'alibi',
  'soft cap and scale',
  'small blocks',
  'dropout, small blocks',
)
_UNBALANCED = (
  'causal, segments',
  'long window',
  'two-sided window',
  'a prefix for each key',
  'cross',
  'small blocks',
  'dropout, small blocks',
)
_EXCHANGED = (
  'prefix',
  'everything',
  'causal, segments',
  'window',
  'a prefix for each key',
  'multi-query',
  'cross',
  'relative, both sides',
  'relative, with gaps',
  'alibi',
  'soft cap and scale',
  'small blocks',
  'dropout',
  'dropout, cross',
)


def _chosen(names):
  """All cases, of which those that are not among `names` are exhaustive."""
  return [name if name in names else exhaustive(name) for name in CASES]


@pytest.mark.parametrize(
  'balance, name',
  [
    *((True, name) for name in _BALANCED),
    *(exhaustive(True, name) for name in CASES if name not in _BALANCED),
    *((False, name) for name in _UNBALANCED),
    *(exhaustive(False, name) for name in CASES if name not in _UNBALANCED),
  ],
)
def test_a_ring_is_attention(name, balance):
  rules = dataclasses.replace(RULES, balance_context=balance)
  case = CASES[name]
  assert_same(split(case, rules, 4, {'tensor': 2}), whole(name))


@pytest.mark.parametrize('name', _chosen(_EXCHANGED))
def test_an_exchange_is_attention(name):
  case = CASES[name]
  assert_same(split(case, EXCHANGE, 2, {'data': 2, 'tensor': 2}), whole(name))


def test_two_and_eight_devices():
  for devices in (2, 8):
    case = CASES['causal, segments']
    assert_same(split(case, RULES, devices, {}), whole('causal, segments'))


def test_the_comparison_sees_a_mistake(monkeypatch):
  case = CASES['causal']
  pieces = ring_plan.stretches
  monkeypatch.setattr(
    ring_plan, 'stretches', lambda *a: (pieces(*a)[0][::-1], pieces(*a)[1])
  )
  with pytest.raises(AssertionError):
    assert_same(split(case, RULES, 4, {}), whole('causal'))


# --- The plan of a ring. ---


def work(steps):
  """Returns the pairs of pieces of each device: whole ones, and cut ones."""
  slots = [slot for step in steps for slot in step.slots]
  count = lambda kind: sum((s.seen_C == kind).astype(int) for s in slots)
  return count(ring_plan.ALL), count(ring_plan.SOME)


def test_zigzag_gives_all_devices_the_same_work():
  mask = make_mask(causal=True, q_zigzag=4, k_zigzag=4)
  everything, something = work(ring_plan.plan(mask, 64, 64, 4))
  assert set(everything) == {7} and set(something) == {2}
  plain, cut = work(ring_plan.plan(make_mask(causal=True), 64, 64, 4))
  assert list(plain) == [0, 1, 2, 3] and set(cut) == {1}


def test_a_window_ends_the_ring():
  shifts = lambda mask: [s.shift for s in ring_plan.plan(mask, 64, 64, 8)]
  assert shifts(make_mask(causal=True, window=9)) == [0, 1]
  assert shifts(make_mask(causal=True, window=10)) == [0, 1, 2]
  assert shifts(make_mask(window=2)) == [0, 1, 7]
  balanced = make_mask(causal=True, window=5, q_zigzag=8, k_zigzag=8)
  assert shifts(balanced) == [0, 1, 7]


def test_every_pair_is_planned_once():
  """By counting which (query, key) pairs the plan reaches."""
  for mask in (
    Mask(),
    make_mask(causal=True),
    make_mask(causal=True, window=7),
    make_mask(window=7),
    make_mask(causal=True, q_zigzag=4, k_zigzag=4),
    make_mask(causal=True, window=7, q_zigzag=4, k_zigzag=4),
  ):
    T, C = 32, 4
    reached = np.zeros((T, T), int)
    q_starts, q_size = ring_plan.stretches(T, C, mask.q_zigzag)
    k_starts, k_size = ring_plan.stretches(T, C, mask.k_zigzag)
    for step in ring_plan.plan(mask, T, T, C):
      for slot in step.slots:
        for device in np.flatnonzero(slot.seen_C):
          q = q_starts[device, slot.q_C[device]]
          k = k_starts[(device - step.shift) % C, slot.k_C[device]]
          reached[q : q + q_size, k : k + k_size] += 1
    seen = np.asarray(
      mask_lib.visible(
        dataclasses.replace(mask, q_zigzag=1, k_zigzag=1),
        slice(0, T),
        slice(0, T),
      )
      if mask.is_ordered
      else np.ones((T, T), bool)
    )
    assert reached.max() == 1 and (reached[seen] == 1).all()


# --- What all-to-all needs of heads. ---


def test_key_heads_are_copied_only_as_needed():
  assert all_to_all.repeats(8, 8, 4, 2) == 1
  assert all_to_all.repeats(8, 2, 4, 2) == 4
  assert all_to_all.repeats(8, 1, 2, 1) == 2


def test_heads_that_cannot_be_exchanged():
  with pytest.raises(
    sharding.ShardingError,
    match=r'num_heads=6 \(num_kv_heads=6\) cannot be dealt to 4 devices.*'
    r'Choose rules\.context_attention=ring',
  ):
    all_to_all.repeats(6, 6, 4, 1)


def test_one_axis_splits_a_sequence():
  mesh = mesh_lib.make(mesh_lib.MeshConfig(context=2, tensor=2, data=2))
  rules = dataclasses.replace(RULES, length=('context', 'tensor'))
  q = jnp.ones((B, T, 2, H))
  with sharding.use(mesh, rules):
    with pytest.raises(sharding.ShardingError, match='one mesh axis'):
      context.attend(q, q, q, Mask())


def test_a_ring_has_no_kernel_to_insist_on():
  q = jnp.ones((8, 64, 2, 8))
  sizes = mesh_lib.MeshConfig(data=1, context=8)
  flash = dense.AttentionOptions(kernel='flash')
  with sharding.use(mesh_lib.make(sizes), sharding.Rules()):
    with pytest.raises(
      ValueError, match='flash: a ring of devices runs blocks'
    ):
      context.attend(q, q, q, mask_lib.make(causal=True), options=flash)

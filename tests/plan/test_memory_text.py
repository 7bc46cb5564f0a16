"""Memory traffic, live buffers and waiting, of programs written by hand."""

import jax
import jax.numpy as jnp
import pytest
import tpu

from t2x import absent
from t2x.attention import splash
from t2x.plan import collectives
from t2x.plan import hlo
from t2x.plan import kernels
from t2x.plan import live
from t2x.plan import loops
from t2x.plan import traffic

HEADER = (
  'HloModule m, is_scheduled=true, num_partitions=8'
  ', input_output_alias={ {0}: (0, {}, may-alias) }\n'
)

# --- Traffic. ---


def test_a_product_reads_its_factors_and_writes_its_result():
  text = """ENTRY %main (a: bf16[32,8], b: bf16[8,16]) -> f32[32,16] {
  %a = bf16[32,8] parameter(0)
  %b = bf16[8,16]{1,0:T(8,128)S(1)} parameter(1)
  ROOT %c = f32[32,16] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""  # noqa: E501
  # The second factor lies in vector memory.
  assert traffic.memory_bytes(text) == 2 * 32 * 8 + 4 * 32 * 16


SCAN = (
  HEADER
  + """
%update (p: f32[7,64], q: f32[64], i: s32[]) -> f32[7,64] {
  %p = f32[7,64] parameter(0)
  %q = f32[64] parameter(1)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  %r = f32[1,64] bitcast(%q)
  ROOT %u = f32[7,64] dynamic-update-slice(%p, %r, %i, %z)
}

%body (p: (s32[], f32[64], f32[7,64])) -> (s32[], f32[64], f32[7,64]) {
  %p = (s32[], f32[64], f32[7,64]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[64] get-tuple-element(%p), index=1
  %s = f32[7,64] get-tuple-element(%p), index=2
  %y = f32[64] tanh(%x)
  %w = f32[7,64] fusion(%s, %y, %i), kind=kLoop, calls=%update
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %t = (s32[], f32[64], f32[7,64]) tuple(%next, %y, %w)
}

%condition (p: (s32[], f32[64], f32[7,64])) -> pred[] {
  %p = (s32[], f32[64], f32[7,64]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %bound = s32[] constant(7)
  ROOT %more = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (x: f32[64]) -> (f32[64], f32[7,64]) {
  %x = f32[64] parameter(0)
  %i = s32[] constant(0)
  %z = f32[] constant(0)
  %s = f32[7,64] broadcast(%z), dimensions={}
  %c = f32[64] copy(%x)
  %t = (s32[], f32[64], f32[7,64]) tuple(%i, %c, %s)
  %w = (s32[], f32[64], f32[7,64]) while(%t), condition=%condition, body=%body
  %y = f32[64] get-tuple-element(%w), index=1
  %v = f32[7,64] get-tuple-element(%w), index=2
  ROOT %o = (f32[64], f32[7,64]) tuple(%y, %v)
}
"""
)


def test_a_loop_that_fills_a_stack_touches_a_row_each_time():
  row, number, flag = 4 * 64, 4, 1
  # A fusion's other operands are read: a row, and where it goes.
  update = 2 * row + row + number
  trip = 2 * row + update + 3 * number  # tanh, and the next number.
  condition = 2 * number + flag
  start = number + 7 * row + 2 * row
  want = start + 7 * trip + 8 * condition
  assert traffic.memory_bytes(SCAN) == want


def test_a_loop_whose_last_trip_was_taken_out():
  """What the counter will be is compared: one trip fewer."""

  def trips(text):
    module = hlo.parse(text)
    scope = loops.Scope(module, module.computations[module.entry])
    return loops.trip_count(scope, scope.computation.instructions['w'])

  assert trips(SCAN) == 7
  compare = '  ROOT %more = pred[] compare(%i, %bound), direction=LT'
  ahead = '  %one = s32[] constant(1)\n  %next = s32[] add(%i, %one)\n'
  peeled = SCAN.replace(compare, ahead + compare.replace('%i,', '%next,'))
  assert peeled != SCAN and trips(peeled) == 6


def test_of_a_fusions_results_some_are_updates():
  """A stack's row, in place, and what is new: as of a loop that keeps both."""
  text = (
    'HloModule m, is_scheduled=true'
    + """
%both (p: f32[7,64], q: f32[1,64], i: s32[]) -> (f32[7,64], f32[1,64]) {
  %p = f32[7,64] parameter(0)
  %q = f32[1,64] parameter(1)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  %y = f32[1,64] tanh(%q)
  %u = f32[7,64] dynamic-update-slice(%p, %y, %i, %z)
  ROOT %t = (f32[7,64], f32[1,64]) tuple(%u, %y)
}

ENTRY %main (p: f32[7,64], q: f32[1,64], i: s32[]) -> (f32[7,64], f32[1,64]) {
  %p = f32[7,64] parameter(0)
  %q = f32[1,64] parameter(1)
  %i = s32[] parameter(2)
  %s = f32[7,64] negate(%p)
  ROOT %f = (f32[7,64], f32[1,64]) fusion(%s, %q, %i), kind=kLoop, calls=%both
}
"""
  )
  stack, row = 7 * 4 * 64, 4 * 64
  # The negation; a row read, the update, the new row, the place.
  assert traffic.memory_bytes(text) == 2 * stack + row + 2 * row + row + 4
  assert sorted(b.bytes for b in live.at_peak(text)) == [row, stack]


def test_what_a_fusion_within_a_fusion_slices_is_read_as_a_slice():
  """As a product whose operand is a row of a stack; the other is read whole."""
  text = (
    'HloModule m, is_scheduled=true'
    + """
%row (p: f32[7,64], i: s32[]) -> f32[64] {
  %p = f32[7,64] parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %s = f32[1,64] dynamic-slice(%p, %i, %z), dynamic_slice_sizes={1,64}
  ROOT %b = f32[64] bitcast(%s)
}

%both (p: f32[7,64], q: f32[3,64], i: s32[]) -> f32[64] {
  %p = f32[7,64] parameter(0)
  %q = f32[3,64] parameter(1)
  %i = s32[] parameter(2)
  %x = f32[64] fusion(%p, %i), kind=kLoop, calls=%row
  %y = f32[64] fusion(%q, %i), kind=kLoop, calls=%row
  %w = f32[192] bitcast(%q)
  %v = f32[64] reduce-precision(%w), exponent_bits=8, mantissa_bits=7
  ROOT %o = f32[64] add(%x, %y)
}

ENTRY %main (p: f32[7,64], q: f32[3,64], i: s32[]) -> f32[64] {
  %p = f32[7,64] parameter(0)
  %q = f32[3,64] parameter(1)
  %i = s32[] parameter(2)
  ROOT %f = f32[64] fusion(%p, %q, %i), kind=kOutput, calls=%both
}
"""
  )
  row = 4 * 64
  # A row of the first, the second, which row, and the result.
  assert traffic.memory_bytes(text) == row + 3 * row + 4 + row


# --- Live buffers. ---


def test_a_stack_lives_once_and_a_donated_result_takes_nothing():
  found = live.at_peak(SCAN)
  sizes = sorted((b.bytes for b in found), reverse=True)
  # The stack, the row that a trip makes, and numbers; the first result is
  # where the argument was.
  assert sizes[:2] == [7 * 4 * 64, 4 * 64] and sum(sizes[2:]) <= 16


def test_zeros_are_named_by_what_loops_write_over_them():
  """Two loops, one in the other: both write, and one element stays."""
  text = """HloModule m, is_scheduled=true
%inner (q: (s32[], f32[7,64], f32[8])) -> (s32[], f32[7,64], f32[8]) {
  %q = (s32[], f32[7,64], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%q), index=0
  %v = f32[7,64] get-tuple-element(%q), index=1
  %w = f32[8] get-tuple-element(%q), index=2
  %s = f32[1,64] slice(%v), slice={[0:1], [0:64]}
  %u = f32[7,64] dynamic-update-slice(%v, %s, %i, %i), metadata={op_name="a/in"}
  ROOT %r = (s32[], f32[7,64], f32[8]) tuple(%i, %u, %w)
}
%more (q: (s32[], f32[7,64], f32[8])) -> pred[] {
  %q = (s32[], f32[7,64], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%q), index=0
  %n = s32[] constant(7)
  ROOT %c = pred[] compare(%i, %n), direction=LT
}
%out (p: (s32[], f32[7,64], f32[8], f32[9])) -> (s32[], f32[7,64], f32[8],
  f32[9]) {
  %p = (s32[], f32[7,64], f32[8], f32[9]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %v = f32[7,64] get-tuple-element(%p), index=1
  %w = f32[8] get-tuple-element(%p), index=2
  %k = f32[9] get-tuple-element(%p), index=3
  %h = f32[8] tanh(%w), metadata={op_name="a/out"}
  %t = (s32[], f32[7,64], f32[8]) tuple(%i, %v, %h)
  %l = (s32[], f32[7,64], f32[8]) while(%t), condition=%more, body=%inner
  %x = f32[7,64] get-tuple-element(%l), index=1
  %y = f32[8] get-tuple-element(%l), index=2
  ROOT %r = (s32[], f32[7,64], f32[8], f32[9]) tuple(%i, %x, %y, %k)
}
ENTRY %main (i: s32[]) -> f32[7,64] {
  %i = s32[] parameter(0)
  %z = f32[] constant(0)
  %a = f32[7,64] broadcast(%z), dimensions={}, metadata={op_name="a/zeros"}
  %b = f32[8] broadcast(%z), dimensions={}, metadata={op_name="a/zeros"}
  %c = f32[9] broadcast(%z), dimensions={}, metadata={op_name="a/zeros"}
  %t = (s32[], f32[7,64], f32[8], f32[9]) tuple(%i, %a, %b, %c)
  %l = (s32[], f32[7,64], f32[8], f32[9]) while(%t), condition=%more, body=%out
  ROOT %o = f32[7,64] get-tuple-element(%l), index=1
}
"""
  text = text.replace('f32[8],\n  f32[9]) {', 'f32[8], f32[9]) {')
  found = {b.type: b.op_name for b in live.at_peak(text)}
  assert found['f32[7,64]'] == 'a/in'
  assert found['f32[8]'] == 'a/out' and found['f32[9]'] == 'a/zeros'


def test_a_copy_takes_its_target_alone():
  text = """HloModule m, is_scheduled=true
ENTRY %main (x: f32[64]) -> f32[64] {
  %x = f32[64] parameter(0)
  %y = f32[64] negate(%x), metadata={op_name="made"}
  %a = (f32[64]{0:S(1)}, f32[64]{0}, u32[]{:S(2)}) copy-start(%y)
  %b = f32[64]{0:S(1)} copy-done(%a)
  %c = (f32[64]{0}, f32[64]{0:S(1)}, u32[]{:S(2)}) copy-start(%b)
  %d = f32[64]{0} copy-done(%c)
  ROOT %e = f32[64] add(%d, %d)
}
"""
  assert [b.bytes for b in live.at_peak(text)] == [256, 256]


def test_a_gather_keeps_what_it_is_given_until_it_ends():
  text = """HloModule m, is_scheduled=true
ENTRY %main (x: f32[8]) -> f32[64] {
  %x = f32[8] parameter(0)
  %y = f32[8] negate(%x)
  %g = (f32[8], f32[64]) all-gather-start(%y), replica_groups=[1,8]<=[8]
  %z = f32[16] broadcast(%x), dimensions={}
  %h = f32[64] all-gather-done(%g)
  ROOT %e = f32[64] negate(%h)
}
"""
  # Where the broadcast is made: both ends of the exchange, and itself.
  peak = sorted(b.bytes for b in live.at_peak(text))
  assert peak == [256, 256] or peak == [32, 64, 256]
  assert sum(peak) == 512


@pytest.mark.parametrize(
  'target', ['cpu', pytest.param('tpu', marks=pytest.mark.slow)]
)
def test_the_sum_is_near_the_compilers_own(target):
  """Of a program whose buffers do not fit a TPU's vector memory."""

  def loss(w, x):
    body = lambda x, w: (jnp.tanh(x @ w), None)
    return jax.lax.scan(body, x, w)[0].sum()

  devices = tpu.devices('v5e:2x4')[:1] if target == 'tpu' else jax.devices()[:1]
  place = jax.sharding.SingleDeviceSharding(devices[0])
  shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32, sharding=place)
  fn = jax.jit(jax.grad(loss), out_shardings=place)
  lowered = fn.lower(shape(6, 512, 512), shape(65536, 512))
  compiled = absent.compile(lowered)
  memory, text = compiled.memory_analysis(), compiled.as_text()
  assert memory is not None and text is not None
  # Results are memory of their own, which `at_peak` counts.
  want = memory.temp_size_in_bytes + memory.output_size_in_bytes
  assert sum(b.bytes for b in live.at_peak(text)) == pytest.approx(
    want, rel=0.15
  )
  largest = max(live.at_peak(text), key=lambda b: b.bytes)
  assert largest.bytes == 6 * 4 * 65536 * 512


# --- What is hidden behind products. ---

MESH = jax.sharding.AbstractMesh((8,), ('data',))
_DOT = (
  'f32[4,4] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}'
)


def hidden(body, head=''):
  text = f"""{HEADER}{head}
ENTRY %main (x: f32[4,4]) -> f32[4,4] {{
  %x = f32[4,4] parameter(0)
{body}
}}
"""
  return [c.hidden for c in collectives.collectives(text, MESH)]


def pair(between='', after=''):
  return f"""  %r = f32[4,4] all-reduce-start(%x), replica_groups={{}}
{between}
  %d = f32[4,4] all-reduce-done(%r)
{after}
  ROOT %o = f32[4,4] add(%d, %x)"""


def test_an_exchange_is_hidden_by_a_product_before_it_ends():
  assert hidden(pair(between=f'  %y = {_DOT}')) == [True]
  assert hidden(pair(after=f'  %y = {_DOT}')) == [False]
  assert hidden(pair(between='  %y = f32[4,4] add(%x, %x)')) == [False]


def test_a_synchronous_exchange_is_waited_for():
  body = f"""  %r = f32[4,4] all-reduce(%x), replica_groups={{}}
  ROOT %y = {_DOT}"""
  assert hidden(body) == [False]


FUSIONS = """
%begins (p: f32[4,4]) -> (f32[4,4], u32[]) {
  %p = f32[4,4] parameter(0)
  %g = f32[4,4] all-reduce(%p), replica_groups={}
  %s = u32[] custom-call(), custom_call_target="AsyncCollectiveStart"
  ROOT %t = (f32[4,4], u32[]) tuple(%g, %s)
}

%goes_on (p: f32[4,4], x: f32[4,4]) -> f32[4,4] {
  %p = f32[4,4] parameter(0)
  %x = f32[4,4] parameter(1)
  ROOT %y = f32[4,4] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%ends (p: f32[4,4]) -> f32[4,4] {
  %p = f32[4,4] parameter(0)
  ROOT %e = f32[4,4] custom-call(%p), custom_call_target="AsyncCollectiveDone"
}
"""  # noqa: E501


@pytest.mark.parametrize('computes', [True, False])
def test_a_tpus_exchange_in_fusions(computes):
  part = '%goes_on' if computes else '%ends'
  operands = '%g, %x' if computes else '%g'
  body = f"""  %b = (f32[4,4], u32[]) fusion(%x), kind=kCustom, calls=%begins
  %g = f32[4,4] get-tuple-element(%b), index=0
  %m = f32[4,4] fusion({operands}), kind=kCustom, calls={part}
  %e = f32[4,4] fusion(%m), kind=kCustom, calls=%ends
  ROOT %after = {_DOT}"""
  assert hidden(body, FUSIONS) == [computes]


# --- Kernels. ---


@pytest.mark.parametrize(
  ('name', 'factor'), [('fwd_residuals', 1), ('dkv_no', 2), ('dq_no', 1.5)]
)
def test_a_kernels_flops_are_in_its_name(name, factor):
  scope = f'jit(f)/{splash.FLOPS}1000/jit(g)/splash_mha_{name}/pallas_call'
  target = 'custom_call_target="tpu_custom_call"'
  text = f"""ENTRY %main (x: f32[4,4]) -> f32[4,4] {{
  %x = f32[4,4] parameter(0)
  ROOT %k = f32[4,4] custom-call(%x), {target}, metadata={{op_name="{scope}"}}
}}
"""
  assert kernels.kernel_flops(text) == 1000 * factor

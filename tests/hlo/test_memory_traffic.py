"""Memory traffic and waiting, of programs written by hand."""

import hlo_programs
import jax
import pytest

from t2x.attention import splash
from t2x.hlo import collectives
from t2x.hlo import execution
from t2x.hlo import kernel_flops
from t2x.hlo import liveness
from t2x.hlo import memory_traffic
from t2x.hlo import module as module_lib

# --- Traffic. ---


def test_a_product_reads_its_factors_and_writes_its_result():
  text = """ENTRY %main (a: bf16[32,8], b: bf16[8,16]) -> f32[32,16] {
  %a = bf16[32,8] parameter(0)
  %b = bf16[8,16]{1,0:T(8,128)S(1)} parameter(1)
  ROOT %c = f32[32,16] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""  # noqa: E501
  # The second factor lies in vector memory.
  assert memory_traffic.memory_bytes(text) == 2 * 32 * 8 + 4 * 32 * 16


def test_a_loop_that_fills_a_stack_touches_a_row_each_time():
  row, number, flag = 4 * 64, 4, 1
  # A fusion's other operands are read: a row, and where it goes.
  update = 2 * row + row + number
  trip = 2 * row + update + 3 * number  # tanh, and the next number.
  condition = 2 * number + flag
  start = number + 7 * row + 2 * row
  want = start + 7 * trip + 8 * condition
  assert memory_traffic.memory_bytes(hlo_programs.SCAN) == want


def test_a_loop_whose_last_trip_was_taken_out():
  """What the counter will be is compared: one trip fewer."""

  def trips(text):
    module = module_lib.parse(text)
    scope = execution.Scope(module, module.computations[module.entry])
    return execution.trip_count(scope, scope.computation.instructions['w'])

  assert trips(hlo_programs.SCAN) == 7
  compare = '  ROOT %more = pred[] compare(%i, %bound), direction=LT'
  ahead = '  %one = s32[] constant(1)\n  %next = s32[] add(%i, %one)\n'
  peeled = hlo_programs.SCAN.replace(
    compare, ahead + compare.replace('%i,', '%next,')
  )
  assert peeled != hlo_programs.SCAN and trips(peeled) == 6


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
  assert (
    memory_traffic.memory_bytes(text) == 2 * stack + row + 2 * row + row + 4
  )
  assert sorted(b.bytes for b in liveness.at_peak(text)) == [row, stack]


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
  assert memory_traffic.memory_bytes(text) == row + 3 * row + 4 + row


# --- What is hidden behind products. ---

MESH = jax.sharding.AbstractMesh((8,), ('data',))
_DOT = (
  'f32[4,4] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}'
)


def hidden(body, head=''):
  text = f"""{hlo_programs.HEADER}{head}
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
  assert kernel_flops.kernel_flops(text) == 1000 * factor

"""Which buffers live at a time, of programs written by hand and compiled."""

import hlo_programs
import jax
import jax.numpy as jnp
import pytest
import tpu

from t2x.hardware import target_devices
from t2x.hlo import liveness


def test_a_stack_lives_once_and_a_donated_result_takes_nothing():
  found = liveness.at_peak(hlo_programs.SCAN)
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
  found = {b.type: b.op_name for b in liveness.at_peak(text)}
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
  assert [b.bytes for b in liveness.at_peak(text)] == [256, 256]


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
  peak = sorted(b.bytes for b in liveness.at_peak(text))
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
  compiled = target_devices.compile(lowered)
  memory, text = compiled.memory_analysis(), compiled.as_text()
  assert memory is not None and text is not None
  # Results are memory of their own, which `at_peak` counts.
  want = memory.temp_size_in_bytes + memory.output_size_in_bytes
  assert sum(b.bytes for b in liveness.at_peak(text)) == pytest.approx(
    want, rel=0.15
  )
  largest = max(liveness.at_peak(text), key=lambda b: b.bytes)
  assert largest.bytes == 6 * 4 * 65536 * 512

"""Text that no compiler here writes, or not of programs this small."""

import pathlib

import jax
import pytest

from t2x.hlo import collectives
from t2x.hlo import matmul_flops
from t2x.hlo import module
from t2x.hlo import replica_groups


@pytest.mark.parametrize(
  ('text', 'want'),
  [
    ('replica_groups={{0,3},{1,2}}', [[0, 3], [1, 2]]),
    ('replica_groups={}', [[0, 1, 2, 3]]),
    ('source_target_pairs={{0,1},{1,0}}', [[0, 1], [1, 0]]),
    ('replica_groups=[2,2]<=[4]', [[0, 1], [2, 3]]),
    ('replica_groups=[2,2]<=[2,2]T(1,0)', [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
    (
      "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}",
      [[0, 2], [1, 3]],
    ),
    ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
  ],
)
def test_groups_in_all_forms(text, want):
  found = replica_groups.device_groups(
    f', {text}, dimensions={{0}}, channel_id=3', 4
  )
  assert found == want


HEADER = 'HloModule test, num_partitions=8\n\n'


def counted(body, header=HEADER):
  mesh = jax.sharding.AbstractMesh((2, 4), ('data', 'tensor'))
  return [
    (c.kind, c.axes, c.bytes, c.times, c.dtype)
    for c in collectives.collectives(header + body, mesh)
  ]


def test_what_another_core_does_is_counted():
  """Of a TPU7x: its SparseCores gather beside the products."""
  body = """
%there (p: f32[2,4], t: token[]) -> f32[4,4] {
  %p = f32[2,4]{1,0} parameter(0)
  %t = token[] parameter(1)
  ROOT %g = f32[4,4]{1,0} all-gather(%p), replica_groups=[4,2]<=[2,4]T(1,0)
}, execution_thread="sparsecore"

ENTRY %main (x: f32[2,4], t: token[]) -> f32[4,4] {
  %x = f32[2,4]{1,0} parameter(0)
  %t = token[] parameter(1)
  %s = ((f32[2,4], token[]), f32[4,4]) call-start(%x, %t), to_apply=%there
  ROOT %d = f32[4,4]{1,0} call-done(%s)
}
"""
  assert counted(body) == [('all-gather', ('data',), 64, 1, 'f32')]


def test_asynchronous_pairs_count_once():
  """As a GPU's programs have them: pairs, or a computation that starts."""
  text = """
%wrapped (p: f32[8,4]) -> f32[2,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %rs = f32[2,4]{1,0} reduce-scatter(%p), replica_groups=[2,4]<=[8]
}

ENTRY %main (x: f32[8,4], y: bf16[3]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %y = bf16[3]{0} parameter(1)
  %g = ((f32[8,4], bf16[3]), (f32[16,4], bf16[6])) all-gather-start(%x, %y), replica_groups={{0,4},{1,5},{2,6},{3,7}}
  %gd = (f32[16,4], bf16[6]) all-gather-done(%g)
  %r = f32[8,4]{1,0} all-reduce-start(%x), replica_groups={}, to_apply=%add
  %rd = f32[8,4]{1,0} all-reduce-done(%r)
  %p = (f32[8,4], f32[8,4], u32[]{:S(2)}) collective-permute-start(%x), source_target_pairs={{0,1},{1,2}}
  %pd = f32[8,4]{1,0} collective-permute-done(%p)
  %s = ((f32[8,4]), f32[2,4], u32[]) async-start(%x), calls=%wrapped
  %u = ((f32[8,4]), f32[2,4], u32[]) async-update(%s), calls=%wrapped
  ROOT %d = f32[2,4] async-done(%u), calls=%wrapped
}
"""  # noqa: E501
  assert counted(text) == [
    ('all-gather', ('data',), 16 * 4 * 4, 1, 'f32'),
    ('all-gather', ('data',), 6 * 2, 1, 'bf16'),
    ('all-reduce', ('data', 'tensor'), 128, 1, 'f32'),
    ('collective-permute', ('tensor',), 128, 1, 'f32'),
    ('reduce-scatter', ('tensor',), 128, 1, 'f32'),
  ]


LOOP = """
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %p = (s32[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4] get-tuple-element(%p), index=1
  %step = s32[] constant({step})
  %next = s32[] {op}(%i, %step)
  %y = f32[4] all-reduce(%x), replica_groups={{}}, to_apply=%add
  ROOT %t = (s32[], f32[4]) tuple(%next, %y)
}}

%condition (p: (s32[], f32[4])) -> pred[] {{
  %p = (s32[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %bound = s32[] constant({bound})
  ROOT %more = pred[] compare({compared}), direction={direction}
}}

ENTRY %main (x: f32[4]) -> f32[4] {{
  %x = f32[4] parameter(0)
  %start = s32[] constant({start})
  %t = (s32[], f32[4]) tuple(%start, %x)
  %w = (s32[], f32[4]) while(%t), condition=%condition, body=%body
  ROOT %y = f32[4] get-tuple-element(%w), index=1
}}
"""


@pytest.mark.parametrize(
  ('start', 'direction', 'bound', 'step', 'trips'),
  [
    (0, 'LT', 7, 1, 7),
    (3, 'LT', 7, 2, 2),
    (0, 'LT', 7, 2, 4),
    (0, 'LE', 7, 2, 4),
    (0, 'LE', 8, 2, 5),
    (9, 'GT', 0, -3, 3),
    (9, 'GE', 0, -3, 4),
    (0, 'NE', 8, 2, 4),
    (5, 'LT', 5, 1, 0),
  ],
)
def test_trips_from_a_condition(start, direction, bound, step, trips):
  forms = [('%i, %bound', direction, 'add', step)]
  mirrored = direction.translate(str.maketrans('LG', 'GL'))
  mirrored = 'NE' if direction == 'NE' else mirrored
  forms.append(('%bound, %i', mirrored, 'subtract', -step))
  for compared, way, op, by in forms:
    text = LOOP.format(
      start=start, bound=bound, step=by, op=op, compared=compared, direction=way
    )
    assert [times for *_, times, _ in counted(text)] == [trips]


@pytest.mark.parametrize(
  ('start', 'bound', 'step', 'direction'),
  [(0, 7, -1, 'LT'), (0, 7, 2, 'NE'), (0, 7, 0, 'LT'), (0, 7, 1, 'EQ')],
)
def test_a_loop_that_never_reaches_its_bound(start, bound, step, direction):
  text = LOOP.format(
    start=start, bound=bound, step=step, op='add', compared='%i, %bound',
    direction=direction,
  )  # fmt: skip
  with pytest.raises(ValueError, match=r'The loop w in main \(no op_name\)'):
    counted(text)


def test_products_that_a_gpu_hands_to_its_library():
  config = (
    'backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
    '{"lhs_contracting_dimensions":["0"],"rhs_contracting_dimensions":["0"]}}}'
  )
  text = f"""{HEADER}
ENTRY %main (a: bf16[32,8], b: bf16[32,16]) -> bf16[8,16] {{
  %a = bf16[32,8] parameter(0)
  %b = bf16[32,16] parameter(1)
  %c = (bf16[8,16], s8[64]) custom-call(%a, %b), custom_call_target="__cublas$gemm", {config}
  ROOT %d = bf16[8,16] get-tuple-element(%c), index=0
}}
"""  # noqa: E501
  assert matmul_flops.matrix_flops(text) == 2 * 8 * 16 * 32


def test_bytes_of_narrow_types():
  sizes = [
    module.num_bytes(*s)
    for s in module.shapes('(f8e4m3fn[3,5], s4[3], pred[2])')
  ]
  assert sizes == [15, 2, 2]
  assert module.shapes('f32[<=8,4]{1,0:T(8,128)S(1)}') == [('f32', (8, 4))]
  assert module.num_bytes('token', ()) == 0


def test_totals_and_the_table():
  one = lambda *args: collectives.Collective(*args, 1, 'f32')
  found = [
    one('all-gather', ('fsdp',), 100, 3),
    one('all-gather', ('fsdp',), 50, 2),
    one('all-reduce', ('data', 'fsdp'), 7, 1),
  ]
  assert collectives.total(found) == 407
  assert collectives.total(found, 'all-gather') == 400
  assert collectives.total(found, axis='data') == 7
  assert collectives.total(found, 'all-reduce', 'tensor') == 0
  assert list(collectives.summary(found).values()) == [(5, 400), (1, 7)]
  lines = collectives.table(found).splitlines()
  assert [line.split() for line in lines] == [
    ['collective', 'axes', 'times', 'MB'],
    ['all-gather', 'fsdp', '5', '0.000'],
    ['all-reduce', 'data,fsdp', '1', '0.000'],
  ]
  with pytest.raises(
    ValueError, match="kind='gather'; it is one of all-gather"
  ):
    collectives.total(found, 'gather')


def test_what_is_not_the_program_of_a_mesh():
  mesh = jax.sharding.AbstractMesh((2, 2), ('data', 'tensor'))
  text = LOOP.format(
    start=0, bound=1, step=1, op='add', compared='%i, %bound', direction='LT'
  )
  with pytest.raises(ValueError, match='for 8 devices and the mesh has 4'):
    collectives.collectives(HEADER + text, mesh)
  with pytest.raises(ValueError, match='no ENTRY computation'):
    matmul_flops.matrix_flops('module @jit_fn {')


def test_a_program_for_gpus():
  """Six layers `x + relu(x @ up) @ down` and their gradients, fsdp=4, tensor=2.

  Compiled for h100:8 by jax 0.10.2 with the options of `machines`, and cut to
  what is counted: gathers are pipelined out of the loops, which are unrolled
  by two. Six layers are 1 + 2 x 2 + 1 of each.
  """
  layers, width, hidden, rows = 6, 64, 256, 32
  path = pathlib.Path(__file__).parent / 'h100_layers.hlo'
  text = path.read_text()
  # Two products forward and four backward, split eight ways.
  want = layers * 6 * 2 * rows * width * hidden // 8
  assert matmul_flops.matrix_flops(text) == want
  mesh = jax.sharding.AbstractMesh((4, 2), ('fsdp', 'tensor'))
  weights = 2 * 2 * width * hidden // 2  # bf16, two matrices, half of each.
  activations = 2 * (rows // 4) * width
  assert collectives.summary(collectives.collectives(text, mesh)) == {
    ('all-gather', ('fsdp',)): (layers, layers * weights),
    ('reduce-scatter', ('fsdp',)): (layers, layers * weights),
    ('all-reduce', ('tensor',)): (2 * layers, 2 * layers * activations),
  }

"""Programs written by hand, as a compiler prints them."""

HEADER = (
  'HloModule m, is_scheduled=true, num_partitions=8'
  ', input_output_alias={ {0}: (0, {}, may-alias) }\n'
)

# A loop of seven trips fills a stack with rows.
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

"""Plans of several slices of TPUs, each with a program of its own."""

import dataclasses

import pytest
import tpu

from t2x.cost_model import estimate
from t2x.cost_model import links
from t2x.hardware import machines
from t2x.hlo import collectives
from t2x.hlo import cross_slice
from t2x.hlo import module
from t2x.parallel import mesh
from t2x.planning import plan as plan_lib


def config_of(*settings):
  return tpu.config_of(*tpu.TINY, 'data.batch_size=16', *settings)


@pytest.mark.slow
def test_two_slices_send_to_each_other():
  """Each has a program of its own; between them go gradients alone."""
  tpu.devices('v5e:2x2', 2)
  sizes = 'mesh.data=2', 'mesh.fsdp=4'
  config = config_of(*sizes)
  plan = plan_lib.make(config, 'v5e:2x2', 2)
  found = estimate.step(config)
  sent = lambda axis: sum(
    r.bytes for r in plan.collectives if r.axes == (axis,)
  )
  assert {row.along for row in plan.collectives} == {
    'data between slices',
    'fsdp',
  }
  (between,) = (row for row in plan.collectives if row.axes == ('data',))
  assert between.kind == 'all-reduce' and 0 < between.hidden < between.bytes
  both = found.sent_bytes(axis='data')
  assert between.bytes == pytest.approx(both, rel=0.15)
  gathers = found.sent_bytes('all-gather', 'fsdp')
  assert gathers < sent('fsdp') < 2 * found.sent_bytes(axis='fsdp')
  # Over the data centre's network, and not over links of a torus.
  seconds = between.bytes / machines.CHIPS['v5e'].network
  assert plan.roofline.network > seconds
  text = 'HloModule x, num_partitions=2\nENTRY %m () -> f32[] {\n}'
  two = mesh.make(mesh.MeshConfig(**plan.sizes), tpu.devices('v5e:2x2', 2))
  with pytest.raises(ValueError, match='is for 2 devices and the mesh has 8'):
    collectives.collectives(text, two)


@pytest.mark.slow
def test_weights_are_gathered_between_slices():
  """A device's share of them between slices, the rest over links."""
  absent_ = tpu.devices('v5e:2x2', 4)
  sizes = 'mesh.data=2', 'mesh.fsdp=8', 'mesh.dcn.data=2', 'mesh.dcn.fsdp=2'
  config = config_of(*sizes)
  plan = plan_lib.make(config, 'v5e:2x2', 4)
  sent = {(row.kind, row.along): row for row in plan.collectives}
  within, between = (
    sent['all-gather', f'fsdp{where}'] for where in ('', ' between slices')
  )
  whole_bytes = estimate.step(config).sent_bytes('all-gather', 'fsdp')
  assert between.bytes == pytest.approx(whole_bytes / 4, rel=0.15)
  assert between.bytes < within.bytes / 4 and between.times < within.times
  assert sent['all-reduce', 'data between slices'].bytes < between.bytes
  whole = mesh.make(config.mesh, absent_)
  axis = links.axes_of(whole)['fsdp']
  assert (axis.size, axis.slices) == (8, 2)
  assert links.reached(axis, True) == links.Axis(size=2, slices=2)
  assert links.reached(axis, False) == dataclasses.replace(
    axis, size=4, slices=1
  )
  assert links.reached(axis, None) == axis


def test_sends_name_the_slices_that_they_join():
  devices = tpu.devices('v5e:2x2', 4)
  dcn = mesh.Dcn(data=2, fsdp=2)
  whole = mesh.make(mesh.MeshConfig(data=2, fsdp=8, dcn=dcn), devices)
  send = lambda target: module.Instruction(
    name='send', type='', op='send', operands=(), literal='', attributes=target
  )
  key = '_xla_megascale_target='
  found = [
    cross_slice.axes_and_slices(send(key + target), whole)
    for target in (
      '{{100000,200000},{100001,200001}},_xla',
      '{{100000,300000},{100001,300001}},_xla',
      '"{1,2,3,4}x{0:3}",_xla',
    )
  ]
  assert found == [(('fsdp',), 2), (('data',), 2), (('data', 'fsdp'), 4)]

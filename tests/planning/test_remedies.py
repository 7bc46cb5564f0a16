"""What to change of a run that does not fit."""

import pytest
import tpu

from t2x.config import catalog
from t2x.config import layout_flag
from t2x.config import overrides
from t2x.planning import remedies
from t2x.planning import search


def config_of(*settings):
  return tpu.config_of(*tpu.TINY, *settings)


def site_of(limit=None):
  """Returns eight chips of v5e, with another memory."""
  tpu.devices('v5e:2x4')
  site = search.Site('v5e:2x4', 1, 'bfloat16')
  site.limit = site.limit if limit is None else limit
  return site


def test_changes_leave_out_what_follows():
  site = site_of()
  config = config_of('mesh.data=1', 'mesh.fsdp=-1')
  ways = [*search.ways(config, site)]
  assert [] in [remedies.changes(way, config) for way in ways]
  way = next(w for w in ways if {'mesh.fsdp=4', 'mesh.tensor=2'} <= {*w})
  said = {*remedies.changes(way, config)}
  assert 'mesh.tensor=2' in said and not {'mesh.fsdp=4', 'mesh.data=1'} & said


def test_the_fewest_changes_and_of_those_the_fastest():
  config = config_of('mesh.data=1', 'mesh.fsdp=8', 'train.remat=none')
  site = site_of()
  all_ = [site.candidate(config, way) for way in search.ways(config, site)]
  found = [c for c in all_ if c is not None]
  num = lambda c: len(remedies.changes(c.settings, config))
  (planned,) = (c for c in found if not num(c))
  # No more than what the run needs, which is told not to fit.
  near = remedies.nearest_fit(config, site_of(planned.peak * 1.1))
  assert near is not None and num(near) == 1
  fitting = [c for c in found if c.peak <= planned.peak and num(c) == 1]
  assert near.seconds == min(c.seconds for c in fitting)
  assert remedies.nearest_fit(config, site_of(1e4)) is None


def test_the_run_itself_is_no_remedy():
  """The compiler refused the only way that should fit."""
  lean = search.leanest(config_of(), site_of())
  first = min(lean, key=lambda c: c.peak)
  limit = 1.1001 * first.peak
  other = remedies.nearest_fit(config_of(), site_of(limit))
  assert other is not None and other.settings == first.settings
  assert remedies.nearest_fit(first.config, site_of(limit)) is None


def test_data_parallelism_where_fsdp_does_not_divide():
  sizes = lambda c: (c.config.mesh.data, c.config.mesh.fsdp)
  lean = search.leanest(config_of('model.embed_dim=36'), site_of())
  assert {(2, 4), (1, 4), (1, 2)} <= {*map(sizes, lean)}
  assert (4, 2) not in {*map(sizes, lean)}  # As (2, 4), with more state.
  even = search.leanest(config_of(), site_of())
  assert {data for data, _ in map(sizes, even)} == {1}


@pytest.mark.parametrize(
  ('layout', 'changed', 'expected'),
  [
    ('fsdp=8', ['train.remat=full'], '--layout=fsdp=8 --set train.remat=full'),
    (
      'fsdp=8,train.remat=none,rules.vocab=none',
      ['train.remat=full', 'mesh.fsdp=4', 'mesh.tensor=2'],
      '--layout=fsdp=4,tensor=2,train.remat=full,rules.vocab=none',
    ),
    (
      'data=2,fsdp=4',
      ['mesh.dcn.data=1', 'mesh.dcn.fsdp=2'],
      '--layout=data=2,fsdp=4,mesh.dcn.data=1,mesh.dcn.fsdp=2',
    ),
  ],
)
def test_a_layout_is_written_with_what_changes(layout, changed, expected):
  parsed = layout_flag.parse(layout)
  own = overrides.override(
    parsed.applied(config_of()), overrides.parse_settings(changed)
  )
  assert parsed.changed(changed, own.mesh) == expected


def test_how_many_are_needed_is_told_in_slices_that_exist(monkeypatch):
  tpu.devices('v5e:2x4')
  settings = overrides.parse_settings(['data.batch_size=512'])
  config = overrides.override(catalog.load('llama2_7b'), settings)
  said = remedies.too_large(config, 'v5e:16x16', 256, 15e9)
  assert '512 of them (--topology=v5e:16x16 --num_slices=2)' in said
  monkeypatch.setattr(remedies.topologies, 'largest', lambda _: (16, 'x'))
  said = remedies.too_large(config, '7x:2x2x2', 16, 15e9)
  assert 'it needs 32 of them or larger' in said  # Two are a chip.
  said = remedies.too_large(config, '7x:2x2x2', 32, 15e9)
  assert 'it needs 64 of them (--topology=x --num_slices=2) or larger' in said

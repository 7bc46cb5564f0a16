"""Runs on stages: the same losses, checkpoints that know nothing of them."""

import logging
import re

import jax
import numpy as np
import pytest
import tiny

from t2x.config import consistency
from t2x.config import overrides
from t2x.config import partitioning
from t2x.inference import loading
from t2x.parallel import mesh as mesh_lib
from t2x.pipeline import schedules
from t2x.tracking import metrics
from t2x.trainer import train

STAGES = {
  'mesh__pipe': 2,
  'mesh__data': 2,
  'mesh__fsdp': 2,
  'mesh__tensor': 1,
  'pipeline__microbatches': 2,
}
RUN = {
  'model__num_layers': 4,
  'model__dropout': 0.1,
  'data__batching': 'pad',
  'data__batching__buckets': '16,32',
  'train__ema_decay': 0.5,
  'train__eval_every': 2,
}


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  return tmp_path_factory.mktemp('pipeline')


@pytest.fixture(scope='module')
def plain(directory):
  """The directory of a run without stages."""
  workdir = directory / 'plain'
  train.train(tiny.experiment_of(directory, **RUN), workdir)
  return workdir


def _train(directory, workdir, **settings):
  train.train(tiny.experiment_of(directory, **RUN, **settings), workdir)


@pytest.mark.slow
@pytest.mark.parametrize(
  'first, second',
  [
    pytest.param(
      STAGES | {'pipeline__schedule': 'interleaved'},
      {},
      marks=pytest.mark.exhaustive,
    ),
    (
      STAGES,
      STAGES
      | {'mesh__pipe': 4, 'mesh__data': 1, 'pipeline__schedule': 'zb_h1'},
    ),
  ],
  ids=['none', 'others'],
)
def test_a_run_goes_on_with_other_stages(
  directory, plain, tmp_path, first, second
):
  """Saved on one mesh, restored on another; its figures are a plain run's."""
  _train(directory, tmp_path, **first, train__num_steps=2)
  _train(directory, tmp_path, **second)
  got, want = (metrics.read_rows(workdir) for workdir in (tmp_path, plain))
  assert len(got) == 4 and 'eval/train/loss' in got[-1]
  for mine, row in zip(got, want):
    names = {n for n in row if n.endswith(('loss', 'accuracy'))}
    assert names <= {*mine}
    for name in names:
      np.testing.assert_allclose(mine[name], row[name], rtol=2e-5)
  # What stages have trained is read without them.
  models = [loading.load(w).model for w in (tmp_path, plain)]
  got, want = (jax.tree.leaves(jax.device_get(m)) for m in models)
  for a, b in zip(got, want):
    np.testing.assert_allclose(a, b, atol=1e-4)


def test_pipeline_settings_do_nothing_without_stages(directory, tmp_path):
  config = tiny.experiment_of(
    directory,
    pipeline__schedule='zb_v',
    pipeline__microbatches=64,
    train__num_steps=1,
    train__eval_every=0,
  )
  train.train(config, tmp_path)
  assert len(tiny.losses(tmp_path)) == 1


def test_a_run_keeps_a_table_of_ones_own(directory, tmp_path, caplog):
  file, workdir = tmp_path / 'own.csv', tmp_path / 'run'
  file.write_text(schedules.zb_h1(2, 2).to_csv())
  settings = STAGES | {'pipeline__schedule': str(file)}
  config = tiny.experiment_of(directory, **settings, train__num_steps=1)
  with caplog.at_level(logging.INFO):
    train.train(config, workdir)
  said = 'own.csv, 2 stages x 2 microbatches, 14% idle if F, B and W last as'
  assert said in caplog.text
  kept = workdir / 'schedule.csv'
  assert kept.read_text() == file.read_text()
  # A change of the file is a change of the run, said and kept.
  file.write_text(schedules.gpipe(2, 2).to_csv())
  more = overrides.override(config, {'train.num_steps': '2'})
  train.train(more, workdir)
  name = 'pipeline.schedule, line 1 of the table'
  old, new = tiny.history(workdir)[-1][name]
  assert 'name=zb_h1' in old and 'name=gpipe' in new
  assert kept.read_text() == file.read_text()
  # Without the file the copy does; a run without stages leaves it.
  file.unlink()
  with pytest.raises(ValueError, match='keeps a copy .* WORKDIR/schedule.csv'):
    train.train(more, workdir)
  consistency.check(
    overrides.override(more, {'pipeline.schedule': str(kept)}), 8
  )
  train.train(
    overrides.override(more, {'mesh.pipe': '1', 'mesh.data': '4'}), workdir
  )
  assert kept.exists()


@pytest.mark.parametrize(
  'settings, said',
  [
    ({}, 'one_f_one_b, 2 stages x 2 microbatches, 25% idle .* more pipeline'),
    ({'pipeline__uniform': True}, r'microbatches, uniform: 1.8 x the work$'),
    ({'pipeline__schedule': 'zb_v'}, 'zb_v, 2 stages of 2 chunks x 2 micro'),
  ],
)
def test_a_pipeline_in_a_line(directory, settings, said):
  config = tiny.experiment_of(directory, **RUN, **(STAGES | settings))
  plan = partitioning.of(config, mesh_lib.sizes(config.mesh, 8)).pipeline
  assert plan is not None and re.search(said, plan.summary()), plan.summary()

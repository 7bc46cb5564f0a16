"""Runs on stages: the same losses, checkpoints that know nothing of them."""

import jax
import numpy as np
import pytest
import tiny

from t2x import inference
from t2x import train

STAGES = {
  'mesh__pipe': 2,
  'mesh__data': 2,
  'mesh__fsdp': 2,
  'mesh__tensor': 1,
  'pipeline__microbatches': 2,
}


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  return tmp_path_factory.mktemp('pipeline')


@pytest.fixture(scope='module')
def reference(directory):
  """The losses of a run without stages."""
  workdir = directory / 'plain'
  train.train(tiny.experiment_of(directory, model__dropout=0.1), workdir)
  return tiny.losses(workdir)


def config(directory, **settings):
  return tiny.experiment_of(directory, model__dropout=0.1, **settings)


@pytest.mark.slow
@pytest.mark.parametrize(
  'first, second',
  [
    (STAGES, {}),
    ({}, STAGES | {'pipeline__schedule': 'zb_h1'}),
    (
      STAGES | {'pipeline__schedule': 'interleaved', 'model__num_layers': 4},
      STAGES | {'mesh__pipe': 4, 'mesh__data': 1, 'model__num_layers': 4},
    ),
  ],
  ids=['to_one', 'from_one', 'other_stages'],
)
def test_a_run_goes_on_with_other_stages(directory, reference, first, second):
  """Saved on one mesh, restored on another; its losses are a plain run's."""
  name = f'{len(first)}_{len(second)}'
  workdir = directory / name
  train.train(config(directory, **first, train__num_steps=2), workdir)
  train.train(config(directory, **second), workdir)
  got = tiny.losses(workdir)
  if 'model__num_layers' in first:
    plain = directory / 'four'
    train.train(config(directory, model__num_layers=4), plain)
    reference = tiny.losses(plain)
  np.testing.assert_allclose(got, reference, rtol=2e-5)


@pytest.mark.slow
def test_a_checkpoint_of_stages_generates(directory):
  """What was trained on stages is read without them."""
  workdir = directory / 'generates'
  train.train(config(directory, **STAGES, train__num_steps=2), workdir)
  plain = directory / 'plain_generates'
  train.train(config(directory, train__num_steps=2), plain)
  models = [inference.load(w).model for w in (workdir, plain)]
  got, want = (jax.tree.leaves(jax.device_get(m)) for m in models)
  for a, b in zip(got, want):
    np.testing.assert_allclose(a, b, atol=2e-5)

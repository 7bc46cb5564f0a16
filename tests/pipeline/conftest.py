"""Programs of pipelines are large and run a few times: compiled in a hurry."""

import jax
import pytest


@pytest.fixture(scope='module', autouse=True)
def _hurried():
  before = jax.config.read('jax_disable_most_optimizations')
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', before)

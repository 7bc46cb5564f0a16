"""Looking up rows of a table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2x.layers import param


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_row_used_often_gets_its_whole_gradient(dtype):
  ids = np.zeros((32, 128), np.int32)
  ids[:, ::4] = 2
  table = jnp.ones((3, 8))

  def total(table):
    return param.look_up(table.astype(dtype), ids).astype(jnp.float32).sum()

  grad = jax.grad(total)(table)
  want = np.bincount(ids.ravel(), minlength=3)[:, None].repeat(8, 1)
  np.testing.assert_array_equal(grad, want)


def test_rows_are_the_tables():
  table = jax.random.normal(jax.random.key(0), (5, 4))
  ids = jnp.asarray([[4, 0], [2, 2]])
  np.testing.assert_array_equal(param.look_up(table, ids), table[ids])

"""Weights in the dtype of the activations before they are differentiated."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2x.layers import attention_config
from t2x.layers import mlp
from t2x.layers import param
from t2x.models import decoder
from t2x.training import train_state
from t2x.training import train_step

CONFIG = decoder.DecoderConfig(
  vocab_size=32,
  num_layers=2,
  embed_dim=16,
  attention=attention_config.Dense(num_heads=2, head_dim=8),
  mlp=mlp.MlpConfig(hidden=24, gated=True),
  dtype='bfloat16',
)


def test_matrices_are_cast_and_nothing_else():
  model = jax.eval_shape(lambda: decoder.Decoder(CONFIG, rngs=nnx.Rngs(0)))
  cast = jax.eval_shape(lambda m: param.weights_in(m, 'bfloat16'), model)
  leaves = jax.tree_util.tree_leaves_with_path(cast)
  names = lambda path: jax.tree_util.keystr(path)
  found = {names(path) for path, x in leaves if x.dtype == jnp.bfloat16}
  ends = ('q_DNH', 'k_DKH', 'v_DKH', 'o_NHD', 'gate_DF', 'up_DF', 'down_FD')
  want = {names(p) for p, _ in leaves if any(f'.{e}' in names(p) for e in ends)}
  assert found == want and len(found) == len(ends)


@pytest.mark.slow
def test_gradients_are_the_same_numbers(monkeypatch):
  model = decoder.Decoder(CONFIG, rngs=nnx.Rngs(0))
  config = train_state.StepConfig()
  trained, rest = train_state.partition(model, config.trainable)
  tokens = jax.random.randint(jax.random.key(1), (4, 8), 0, 32)
  batch = {'inputs': tokens, 'targets': tokens[:, ::-1]}
  batch['weights'] = jnp.ones((4, 8))

  def gradients():
    step = lambda t: train_step.gradients(
      t, rest, batch, jax.random.key(0), config
    )
    return jax.jit(step)(trained)[0]

  got = gradients()
  monkeypatch.setattr(param, 'weights_in', lambda tree, dtype: tree)
  want = gradients()
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype == jnp.float32
    assert np.abs(b).max() > 0
    np.testing.assert_array_equal(a, b)

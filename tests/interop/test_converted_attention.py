"""Kinds of attention against the other library's layers, weight by weight."""

import extras
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from t2x.attention import mask as mask_lib
from t2x.layers import attention_layer
from t2x.layers import low_rank
from t2x.layers import param
from t2x.layers import sparse

torch = extras.need('torch', extra='reference')
transformers = extras.need('transformers', extra='reference')
B, T, D, H = 2, 32, 24, 6


def make(config):
  init, rngs = param.Init(std=0.3), nnx.Rngs(0)
  return attention_layer.make(config, D, init=init, out_factor=1.0, rngs=rngs)


def inputs(length=T):
  return jax.random.normal(jax.random.key(1), (B, length, D))


def tensor(a):
  return torch.tensor(np.array(a))


def give(theirs, **weights):
  """Copies our weights (D, N, H) and biases (N, H) to products of theirs."""
  with torch.no_grad():
    for name, (weight, bias) in weights.items():
      product = getattr(theirs, name)
      product.weight.copy_(tensor(weight[...].reshape(D, -1).T))
      if bias is not None:
        product.bias.copy_(tensor(bias[...].reshape(-1)))
      elif product.bias is not None:
        product.bias.zero_()


def ours(layer, x, mask=mask_lib.Mask()):
  """Returns what the heads give, (B, T, N H), before the last product."""
  width = layer.o_NHD.shape[0] * H
  layer.o_NHD = nnx.Param(jnp.eye(width).reshape(-1, H, width))
  return np.asarray(jax.jit(lambda layer, x: layer(x, mask))(layer, x))


def test_nystromformer():
  from transformers.models.nystromformer import modeling_nystromformer as other

  class Config(transformers.NystromformerConfig):
    def __getitem__(self, name):  # Their layer reads one field so.
      return getattr(self, name)

  config = Config(
    hidden_size=D,
    num_attention_heads=4,
    num_landmarks=4,
    segment_means_seq_len=T,
    conv_kernel_size=3,
    inv_coeff_init_option=True,
    inv_init_coeff_option='exact',
    attention_probs_dropout_prob=0.0,
  )
  theirs = other.NystromformerSelfAttention(config).eval()
  layer = make(
    low_rank.Nystromformer(num_heads=4, head_dim=H, landmarks=4, conv_width=3)
  )
  give(
    theirs,
    query=(layer.q_DNH, None),
    key=(layer.k_DKH, None),
    value=(layer.v_DKH, None),
  )
  x = inputs()
  with torch.no_grad():
    taps = layer.mixer.conv_KW[...]
    theirs.conv.weight.copy_(tensor(taps[:, None, :, None]))
    want = theirs(tensor(x))[0].numpy()
  np.testing.assert_allclose(ours(layer, x), want, atol=2e-4)


def test_longformer():
  from transformers.models.longformer import modeling_longformer as other

  config = transformers.LongformerConfig(
    hidden_size=D,
    num_attention_heads=4,
    attention_window=[8],
    attention_probs_dropout_prob=0.0,
  )
  theirs = other.LongformerSelfAttention(config, layer_id=0).eval()
  # Four keys on each side.
  layer = make(
    sparse.Longformer(
      num_heads=4,
      head_dim=H,
      bias=True,
      window=5,
      num_global=2,
      global_projections=True,
    )
  )
  own = layer.global_tokens
  give(
    theirs,
    query=(layer.q_DNH, layer.q_bias_NH),
    key=(layer.k_DKH, layer.k_bias_KH),
    value=(layer.v_DKH, layer.v_bias_KH),
    query_global=(own.q_DNH, own.q_bias_NH),
    key_global=(own.k_DNH, own.k_bias_NH),
    value_global=(own.v_DNH, own.v_bias_NH),
  )
  x = inputs()
  is_global = torch.zeros(B, T, dtype=torch.bool)
  is_global[:, :2] = True
  with torch.no_grad():
    want = theirs(
      tensor(x),
      attention_mask=is_global.float() * 10000.0,
      is_index_masked=torch.zeros(B, T, dtype=torch.bool),
      is_index_global_attn=is_global,
      is_global_attn=True,
    )[0].numpy()
  layer.o_bias_D = None
  np.testing.assert_allclose(ours(layer, x), want, atol=2e-5)


def test_bigbird():
  from transformers.models.big_bird import modeling_big_bird as other

  length, block = 64, 4
  config = transformers.BigBirdConfig(
    hidden_size=D,
    num_attention_heads=1,
    block_size=block,
    num_random_blocks=2,
    max_position_embeddings=length,
    use_bias=False,
  )
  # It draws blocks in training alone; nothing else is random here.
  theirs = other.BigBirdBlockSparseAttention(config, seed=3).train()
  drawn = []
  draw = theirs._bigbird_block_rand_mask_with_head

  def recorded(*args, **kwargs):
    drawn.append(draw(*args, **kwargs))
    return drawn[-1]

  theirs._bigbird_block_rand_mask_with_head = recorded
  plain = theirs._bigbird_block_rand_mask

  def recorded_plain(*args, **kwargs):
    drawn.append([plain(*args, **kwargs)])
    return drawn[-1][0]

  theirs._bigbird_block_rand_mask = recorded_plain
  x = inputs(length)
  blocked, band, rows, keys = (
    other.BigBirdModel.create_masks_for_block_sparse_attn(
      torch.ones(B, length), block
    )
  )
  layer_of = lambda rows: make(
    sparse.BlockSparse(num_heads=1, head_dim=D, sparse_block=block, rows=rows)
  )
  layer = layer_of(('1' * 16,) * 16)
  give(
    theirs,
    query=(layer.q_DNH, None),
    key=(layer.k_DKH, None),
    value=(layer.v_DKH, None),
  )
  with torch.no_grad():
    want = theirs(tensor(x), band, rows, keys, blocked, blocked)[0].numpy()
  num = length // block
  matrix = np.eye(num, dtype=bool)
  matrix |= np.eye(num, k=1, dtype=bool) | np.eye(num, k=-1, dtype=bool)
  matrix[[0, -1]] = matrix[:, [0, -1]] = True
  (random,) = drawn[0]  # Of the one head: rows 1 to the last but one.
  for row, columns in enumerate(np.asarray(random), start=1):
    matrix[row, columns] = True
  assert matrix.sum() > 0 and not matrix.all()
  rows = tuple(''.join('01'[int(c)] for c in row) for row in matrix)
  layer = layer_of(rows)
  layer.o_NHD = nnx.Param(jnp.eye(D).reshape(1, D, D))
  got = jax.jit(lambda layer, x: layer(x, mask_lib.Mask()))(layer, x)
  np.testing.assert_allclose(got, want, atol=2e-5)

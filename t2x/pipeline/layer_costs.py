"""Costs of a model's layers in FLOPs and bytes, estimated from its config.

A step of a layer costs a forward pass, and twice as much for its gradients (B
and W). With full recomputation it costs one more forward pass. The head costs 3
forward passes, in the B of the last part. Recomputation by other policies of
remat is not counted.

The bytes of a device are those that are kept from one tick to the next:

  where parameters are kept: 12 bytes for each, float32 with two moments (Adam),
  split evenly over all stages, and 4 for the gradient of a layer that moves;
  where parameters are used: a copy in the dtype of activations (in float32 for
  the embeddings and the head, which all stages have), and 4 for the gradient;
  for each layer and microbatch in flight: the inputs of its products, and their
  outputs where the next operation is not linear; between B and W, the gradients
  of the outputs;
  messages between stages, and the logits and their gradient in float32.

Values that are used within one tick alone are not counted. Norms and lookups
count no FLOPs, as in `flops`.

Letters: T query positions, S key positions, D embed, N heads, K key/value
heads, H head dim, F feed-forward, E experts, k experts of a token.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Any
from typing import Literal

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from t2x.attention import blocks
from t2x.attention import splash
from t2x.layers import attention_config
from t2x.layers import attention_kinds
from t2x.layers import embed
from t2x.layers import moe
from t2x.layers import position
from t2x.layers import transformer_xl
from t2x.models import encoder
from t2x.models import flops
from t2x.models import model as model_lib
from t2x.parallel import sharding
from t2x.pipeline import instructions
from t2x.pipeline import placement as placement_lib
from t2x.pipeline import placement_cost
from t2x.pipeline import schedule as schedule_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
  """A device's share of a microbatch.

  Attributes:
    rows: number of sequences.
    length: tokens of a sequence, before a mesh axis splits them.
    num_targets: tokens of a sequence that reach the head.
    encoder_length: tokens of a source sequence, or None without an encoder.
    head_chunks: number of pieces in which the logits are computed.
    kernels: whether attention runs in TPU kernels, where they support it.
  """

  rows: float
  length: int
  num_targets: int
  encoder_length: int | None = None
  head_chunks: int = 1
  kernels: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSplit:
  """How a mesh splits parameters and activations.

  Attributes:
    sizes: number of devices along each mesh axis.
    rules: mesh axes of each logical axis.
    gather: time at which split weights are gathered; see `PipelineConfig`.
  """

  sizes: Mapping[str, int]
  rules: sharding.Rules
  gather: Literal['once', 'tick'] = 'once'

  def elements(self, x: nnx.Variable, used: bool = False) -> float:
    """Returns the number of elements of a parameter that a device has.

    The split over stages is not counted.

    Args:
      x: parameter, or its shape.
      used: whether the parameter is where layers use it, after `gather`, or
        where it is kept.
    """
    names = [str(name) for name in sharding.axes_of(x, len(x.shape)) if name]
    names = [name for name in names if name != 'layers']
    if used and self.gather == 'once':
      names = ['act_embed' if name == 'embed' else name for name in names]
    return math.prod(x.shape) / self.over(*names)

  def over(self, *names: str) -> int:
    """Returns the number of parts into which logical axes are split."""
    axes = [getattr(self.rules, name) for name in names]
    each = [a for axis in axes for a in sharding.mesh_axes(axis)]
    return math.prod(self.sizes.get(a, 1) for a in each)


def stacks(
  model: model_lib.ModelConfig,
  towers: Sequence[placement_lib.TowerLayers],
  batch: Batch,
  recompute: bool,
) -> list[placement_cost.TowerCosts]:
  """Returns the FLOPs of each tower's units, for a step of one row.

  The bytes of the stacks are zero; `with_bytes` adds them.

  Args:
    model: config of the model.
    towers: towers, in order of depth.
    batch: lengths of the sequences.
    recompute: whether the backward pass computes all forwards again.
  """
  lengths = batch.length, batch.encoder_length, batch.num_targets
  layers = flops.layer_flops(model, *lengths)
  head = 3 * sum(
    flops.top_flops(model, batch.length, batch.num_targets).values()
  )
  times = 4 if recompute else 3
  result = []
  for tower in towers:
    each = np.array(layers[tower.name], float)
    costs = times * np.add.reduceat(each, np.arange(0, len(each), tower.group))
    last = float(head if tower is towers[-1] else 0)
    costs = tuple(costs.tolist())
    result.append(
      placement_cost.TowerCosts(tower=tower, costs=costs, last=last)
    )
  return result


@functools.lru_cache(maxsize=8)
def _shapes(model: model_lib.ModelConfig) -> model_lib.Transformer:
  """Returns the model's shapes, which no schedule and no layout changes."""
  make = lambda key: model_lib.make(model, rngs=nnx.Rngs(key))
  return jax.eval_shape(make, jax.eval_shape(lambda: jax.random.key(0)))


def with_bytes(
  stacks: Sequence[placement_cost.TowerCosts],
  table: schedule_lib.Schedule,
  model: model_lib.ModelConfig,
  batch: Batch,
  layout: MeshSplit,
) -> tuple[list[placement_cost.TowerCosts], int, int]:
  """Returns stacks with the bytes of their units, and the other bytes.

  Args:
    stacks: costs of all towers, in order of depth.
    table: schedule.
    model: config of the model.
    batch: a device's share of a microbatch.
    layout: layout of parameters and activations.

  Returns:
    The stacks; the bytes that a device needs whatever the placement is; and the
    bytes that it needs in addition where layers move.
  """
  shapes = _shapes(model)
  itemsize = jnp.dtype(model.dtype).itemsize
  num_stages = table.num_stages
  result, of_layers, moved = [], set(), 0
  for stack in stacks:
    tower = getattr(shapes, stack.tower.name)
    variables = _variables([*tower.layers.group] or [*tower.layers.remainder])
    of_layers |= {id(x) for x in _variables(tower.layers)}
    copied = sum(layout.elements(x, used=True) for x in variables)
    split = sum(layout.elements(x) for x in variables)
    if not len(tower.layers.group):
      units = 1
    else:
      units = stack.tower.num_layers // stack.tower.group
      copied, split = copied / units, split / units
    moved += 4 * split * stack.tower.num_units / num_stages
    kept, left = _activations(model, stack.tower, batch, layout)
    result.append(
      dataclasses.replace(
        stack,
        unit_bytes=math.ceil(itemsize * copied + 4 * split),
        kept_bytes=math.ceil(kept),
        left_bytes=math.ceil(left),
      )
    )
  everything = _variables(shapes)
  fixed = 12 * sum(map(layout.elements, everything)) / num_stages
  shared = [x for x in everything if id(x) not in of_layers]
  fixed += 8 * sum(map(layout.elements, shared))
  fixed += _logits(model, batch, layout)
  fixed += messages(stacks, table, model, batch, layout)
  return result, math.ceil(fixed), math.ceil(moved)


def _variables(tree: Any) -> list[nnx.Variable]:
  leaves = jax.tree.leaves(tree, is_leaf=sharding.is_variable)
  return [x for x in leaves if sharding.is_variable(x)]


def _logits(
  model: model_lib.ModelConfig, batch: Batch, layout: MeshSplit
) -> float:
  """Returns the bytes of one chunk of logits and their gradient, in float32."""
  rows = embed.padded(model.vocab_size, model.vocab_multiple)
  num = batch.rows * batch.num_targets * rows / layout.over('length', 'vocab')
  return 2 * 4 * num / batch.head_chunks


def messages(
  stacks: Sequence[placement_cost.TowerCosts],
  table: schedule_lib.Schedule,
  model: model_lib.ModelConfig,
  batch: Batch,
  layout: MeshSplit,
) -> float:
  """Returns the bytes of the inbox, in which messages wait.

  Args:
    stacks: costs of all towers, in order of depth.
    table: schedule.
    model: config of the model.
    batch: a device's share of a microbatch.
    layout: layout of activations.
  """
  towers = [stack.tower for stack in stacks]
  even = placement_lib.even(towers, table.num_parts)
  place = placement_lib.place(towers, even, table)
  slots = instructions.make(table, place).inbox + 1
  tokens = batch.rows * sum(_tokens(model, tower, batch) for tower in towers)
  itemsize = jnp.dtype(model.dtype).itemsize
  return slots * itemsize * tokens * model.embed_dim / layout.over('length')


def _tokens(
  model: model_lib.ModelConfig, tower: placement_lib.TowerLayers, batch: Batch
) -> int:
  """Returns the number of tokens in a row of a tower."""
  lengths = {'encoder': batch.encoder_length or 0, 'queries': batch.num_targets}
  both = batch.num_targets if model.is_two_stream else 0
  return lengths.get(tower.name, batch.length + both)


def _activations(
  model: model_lib.ModelConfig,
  tower: placement_lib.TowerLayers,
  batch: Batch,
  layout: MeshSplit,
) -> tuple[float, float]:
  """Returns the bytes that a unit keeps, and those that its B leaves for W."""
  encodes = tower.name == 'encoder'
  causal = not encodes and not isinstance(model, encoder.EncoderConfig)
  T = _tokens(model, tower, batch)
  cross_lengths = {'decoder': batch.encoder_length, 'queries': batch.length}
  S = cross_lengths.get(tower.name)
  itemsize, kept, left = jnp.dtype(model.dtype).itemsize, 0.0, 0.0
  for attention, mlp in model.group[: tower.group]:
    by_kernel = batch.kernels and takes_kernel(model, attention, T, T)
    # Blocks of 64 queries reach half a block further than each query.
    pattern = attention_kinds.pattern_of(attention, T, causal)
    reach = flops.pairs(T, T, pattern) + 32 * T * causal
    # What other kinds of attention keep grows with the length alone.
    by_kernel |= not isinstance(attention, attention_config.Softmax)
    read, made, in_float32 = _attention(
      model, attention, T, T, None if by_kernel else reach, layout
    )
    hidden_read, hidden_made = _feed_forward(model, mlp, T, layout)
    kept += itemsize * (read + hidden_read) + 4 * in_float32
    left += itemsize * (made + hidden_made)
    if S is not None:
      by_kernel = batch.kernels and takes_kernel(
        model, attention, T, S, cross=True
      )
      read, made, in_float32 = _attention(
        model, attention, T, S, None if by_kernel else T * S, layout
      )
      kept += itemsize * read + 4 * in_float32
      left += itemsize * made
    # The last norm reads the output of the feed-forward layer, or a sum of it.
    if model.residual in ('post_norm', 'sandwich'):
      kept += itemsize * T * model.embed_dim
  split = layout.over('length')
  return batch.rows * kept / split, batch.rows * left / split


def takes_kernel(
  model: model_lib.ModelConfig,
  attention: attention_kinds.AttentionConfig,
  T: int,
  S: int,
  cross: bool = False,
) -> bool:
  """Whether a TPU kernel supports an attention; see `attention/kernels`.

  Args:
    model: config of the model.
    attention: config of the attention.
    T: number of query positions.
    S: number of key positions.
    cross: whether it is cross-attention.
  """
  attention = attention_kinds.for_cross(attention) if cross else attention
  if isinstance(attention, transformer_xl.TransformerXL):
    return False  # Its keys are wider than its values.
  if not isinstance(attention, attention_config.Softmax):
    return False
  places = model.position
  biased = places is not None and position.is_bias(places)
  refused = (
    attention.kernel == 'blocks' or attention.dropout or biased and not cross
  )
  refused = refused or model.memory  # Its keys have positions of their own.
  block = attention.block or splash.LANES
  divides = not (block % splash.LANES or T % block or S % block)
  return divides and not refused


def _attention(
  model: model_lib.ModelConfig,
  attention: attention_kinds.AttentionConfig,
  T: int,
  S: int,
  pairs: float | None,
  layout: MeshSplit,
) -> tuple[float, float, float]:
  """Returns how many numbers of a row's attention are stored.

  Args:
    model: config of the model.
    attention: config of the attention.
    T: number of query positions.
    S: number of key positions.
    pairs: number of pairs of query and key whose scores are computed in blocks;
      None where a kernel computes them.
    layout: layout of activations.

  Returns:
    Numbers kept in the dtype of activations; numbers left for W; numbers kept
    in float32.
  """
  D, H = model.embed_dim, attention.head_dim
  N = attention.num_heads / layout.over('heads')
  K = attention.kv_heads / layout.over('kv_heads')
  wide = isinstance(attention, transformer_xl.TransformerXL) * D
  projected = T * N * (H + wide) + S * K * (2 * H + wide)
  in_float32 = T * N
  if pairs is not None:
    # The output before its normalisation is kept, too.
    in_float32 = T * N * H
    if S <= blocks.KEEP_KEYS:
      in_float32 += N * min(pairs, T * S)
  return projected + T * D + T * N * H, projected + T * D, in_float32


def _feed_forward(
  model: model_lib.ModelConfig,
  mlp: moe.FeedForwardConfig,
  T: int,
  layout: MeshSplit,
) -> tuple[float, float]:
  """Returns how many numbers of a row are kept, and how many left for W."""
  D, F = model.embed_dim, mlp.hidden / layout.over('mlp')
  products = 2 if mlp.gated else 1
  if not isinstance(mlp, moe.MoeConfig):
    return T * (D + products * F), T * (D + products * F)
  E, k = mlp.num_experts, mlp.experts_of_token
  # Tokens that are sent to experts, and the outputs that come back.
  made = k * (D + products * F) + E
  return T * (made + D + E), T * made

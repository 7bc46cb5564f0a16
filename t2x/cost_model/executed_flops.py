"""Estimates the FLOPs that one device executes in a step, from shapes alone.

The backward pass computes two products for each product of the forward pass,
and recomputes those that the gradients of a layer need and `train.remat` does
not keep.

Letters: T queries, S keys, D embed, N heads, K key/value heads, H head dim, F
feed-forward, E experts, C slots of an expert.
"""

import dataclasses
import math

from t2x.attention import blocks
from t2x.attention import mask as mask_lib
from t2x.attention import ring
from t2x.attention import ring_plan
from t2x.attention import splash
from t2x.cost_model import device_share
from t2x.layers import attention_config
from t2x.layers import attention_kinds
from t2x.layers import moe
from t2x.layers import routing
from t2x.models import encoder
from t2x.pipeline import layer_costs

# FLOPs of attention's backward pass over those of its forward pass, which
# computes two products. Kernels recompute the scores twice, for queries and for
# keys; attention in blocks keeps them, or recomputes them once.
KERNEL_BACKWARD, BLOCKS_BACKWARD, AGAIN_BACKWARD = 3.5, 2.0, 2.5


def flops(local: device_share.DeviceShare) -> dict[str, float]:
  """Returns the FLOPs of a step: those of each pass of layers, and the head."""
  model = local.config.model
  parts: dict[str, float] = {}
  for layer in local.layers:
    once = of_layer(local, layer)
    for name, num in passes(local, layer).items():
      parts[name] = parts.get(name, 0.0) + num * once[name]
  head = 2 * local.targets * model.embed_dim * local.vocab
  if isinstance(model, encoder.EncoderConfig) and model.masked_head:
    head += 2 * local.targets * model.embed_dim**2
  # The logits of chunks of the vocabulary are recomputed.
  head *= 3 + (local.config.train.loss.vocab_chunks > 1)
  return parts | {'head': local.heads * head}


def of_layer(
  local: device_share.DeviceShare, layer: device_share.Layer
) -> dict[str, float]:
  """Returns the FLOPs of each pass of one layer, for one microbatch.

  The passes are 'forward', 'made again' (recomputation) and 'backward'.
  """
  num = products(local, layer)
  scores = {name: n for name, n in num.items() if name.endswith('scores')}
  again = recomputed_products(local, layer)
  return {
    'forward': sum(num.values()),
    'made again': sum(num[name] for name in again),
    'backward': 2 * (sum(num.values()) - sum(scores.values()))
    + sum(
      backward_of_scores(local, layer, name.startswith('cross')) * n
      for name, n in scores.items()
    ),
  }


def passes(
  local: device_share.DeviceShare, layer: device_share.Layer
) -> dict[str, float]:
  """Returns the number of runs of each pass, of layers that are alike.

  The passes are those of `of_layer`; the runs are those of one step.
  """
  if local.plan is None:
    num = layer.num * local.num_microbatches
    return dict.fromkeys(('forward', 'made again', 'backward'), num)
  runs = lambda loop: local.runs(loop, layer.tower, layer.member)
  again = 'recompute' if local.plan.table.recompute else 'backward'
  return {
    'forward': runs('forward'),
    'made again': runs(again),
    'backward': runs('backward'),
  }


def products(
  local: device_share.DeviceShare, layer: device_share.Layer
) -> dict[str, float]:
  """Returns the FLOPs of a layer's products by name, forward."""
  kind, D = layer.kind, local.config.model.embed_dim
  tokens = local.rows * layer.queries / local.over('length')
  N = kind.num_heads / local.over('heads')
  K = kind.kv_heads / local.over('kv_heads')
  of_heads = lambda tokens, heads: 2 * tokens * D * heads * kind.head_dim
  num = {
    'query': of_heads(tokens, N),
    'key': of_heads(tokens, K),
    'value': of_heads(tokens, K),
    'scores': scores(local, layer),
    'output': of_heads(tokens, N),
  }
  if layer.encoded is not None:
    source = local.rows * layer.encoded / local.over('length')
    num |= {
      'cross_query': of_heads(tokens, N),
      'cross_key': of_heads(source, K),
      'cross_value': of_heads(source, K),
      'cross_scores': scores(local, layer, cross=True),
      'cross_output': of_heads(tokens, N),
    }
  return num | feed_forward(local, layer)


def feed_forward(
  local: device_share.DeviceShare, layer: device_share.Layer
) -> dict[str, float]:
  """Returns the FLOPs of a feed-forward layer's products by name, forward."""
  mlp, D = layer.mlp, local.config.model.embed_dim
  tokens = local.rows * layer.queries / local.over('length')
  used = tokens
  num = {}
  if isinstance(mlp, moe.MoeConfig):
    used = (
      slots(local, layer) if mlp.router.capacity else routed_rows(local, layer)
    )
    num['router'] = 2 * tokens * D * mlp.num_experts
  one = 2 * used * D * mlp.hidden / local.over('mlp')
  num |= {'mlp_gate': one} if mlp.gated else {}
  return num | {'mlp_up': one, 'mlp_down': one}


def slots(local: device_share.DeviceShare, layer: device_share.Layer) -> float:
  """Returns the slots of experts that a device computes, filled or not."""
  mlp = layer.mlp
  assert isinstance(mlp, moe.MoeConfig)
  num = mlp.num_experts * slots_of_expert(layer)
  # Axes of experts that split the rows too do not change the number of slots.
  axes = [a for a in local.axes('experts') if a not in local.axes('batch')]
  return local.rows * num / local.size(tuple(axes)) / local.over('length')


def slots_of_expert(layer: device_share.Layer) -> int:
  """Returns C, the slots of one expert for one row."""
  mlp = layer.mlp
  assert isinstance(mlp, moe.MoeConfig)
  router, E = mlp.router, mlp.num_experts
  assert router.capacity is not None
  share = router.capacity / E
  if isinstance(router, routing.TokenChoice):
    share *= router.top_k
  return min(layer.queries, math.ceil(share * layer.queries * (1 - 1e-9)))


def routed_rows(
  local: device_share.DeviceShare, layer: device_share.Layer
) -> float:
  """Returns the rows of ragged products, of routers without a capacity."""
  mlp = layer.mlp
  assert isinstance(mlp, moe.MoeConfig)
  num_experts = mlp.num_experts / local.over('experts')
  moved = [a for a in local.axes('experts') if a in local.axes('batch')]
  tokens = local.rows * layer.queries / local.over('length')
  of_token = min(mlp.experts_of_token, num_experts)
  return tokens * local.size(tuple(moved)) * of_token


# --- Attention. ---


def implementation(
  local: device_share.DeviceShare,
  layer: device_share.Layer,
  cross: bool = False,
) -> str:
  """Returns the implementation of attention.

  Args:
    local: the share of the device.
    layer: the layer.
    cross: True for the cross-attention, False for the self-attention.

  Returns:
    'kernel', 'blocks' or 'ring'; 'mixer' for a layer without softmax attention.
  """
  kind = layer.softmax_of(cross)
  if kind is None:
    return 'mixer'
  if local.over('length') > 1 and (
    local.config.rules.context_attention == 'ring'
  ):
    return 'ring'
  keys = layer.encoded if cross else layer.queries
  assert keys is not None
  served = layer_costs.takes_kernel(
    local.config.model, kind, layer.queries, keys, cross
  )
  return 'kernel' if served else 'blocks'


def scores(
  local: device_share.DeviceShare,
  layer: device_share.Layer,
  cross: bool = False,
) -> float:
  """Returns the FLOPs of the scores and their product with values, forward.

  For a layer without softmax attention, the FLOPs of its mixing of positions.
  The arguments are those of `implementation`.
  """
  kind = layer.kind
  if not (cross or isinstance(kind, attention_config.Softmax)):
    D = local.config.model.embed_dim
    flops = attention_kinds.mixing_flops(kind, layer.queries, D, layer.causal)
    return local.rows * flops / local.over('heads') / local.over('length')
  N = kind.num_heads / local.over('heads')
  return 4 * local.rows * N * kind.head_dim * pairs(local, layer, cross)


def pairs(
  local: device_share.DeviceShare, layer: device_share.Layer, cross: bool
) -> float:
  """Returns the (query, key) pairs of a row that a device computes."""
  T, S = layer.queries, layer.encoded if cross else layer.queries
  assert S is not None
  mask = mask_lib.Mask() if cross else layer.mask
  C, kind = local.over('length'), layer.softmax_of(cross)
  if kind is None:
    return 0.0
  chosen = implementation(local, layer, cross)
  if chosen == 'ring':
    return _ring_pairs(local, layer, mask, T, S, kind.block)
  if chosen == 'kernel':
    sides = [kind.block or splash.block_size(n) or n for n in (T, S)]
    return splash.num_computed_pairs(mask, T, S, *sides) / C
  return blocks.num_pairs(mask, T, S, kind.block) / C


def _ring_pairs(
  local: device_share.DeviceShare,
  layer: device_share.Layer,
  mask: mask_lib.Mask,
  T: int,
  S: int,
  block: int | None,
) -> float:
  """Returns the pairs of the device that computes the most in a ring.

  Args:
    local: the share of the device.
    layer: the layer.
    mask: the mask of the whole row.
    T: queries of the whole row.
    S: keys of the whole row.
    block: size of the blocks on the diagonal; None for the ring's default.
  """
  C, block = local.over('length'), block or ring.BLOCK
  balanced = local.config.rules.balance_context and layer.causal
  zigzag = C if balanced and layer.encoded is None else 1
  mask = dataclasses.replace(mask, q_zigzag=zigzag, k_zigzag=zigzag)
  total = [0.0] * C
  on_diagonal = mask_lib.Mask(pattern=mask.pattern)
  for step in ring_plan.plan(mask, T, S, C):
    for slot in step.slots:
      q_size = ring_plan.stretches(T, C, zigzag)[1]
      k_size = ring_plan.stretches(S, C, zigzag)[1]
      num = q_size * k_size
      if slot.diagonal:
        num = blocks.num_pairs(on_diagonal, q_size, k_size, block, ring.RUNS)
      for device, seen in enumerate(slot.seen_C):
        total[device] += num * (seen != ring_plan.NONE)
  return max(total)


def backward_of_scores(
  local: device_share.DeviceShare, layer: device_share.Layer, cross: bool
) -> float:
  """Returns the FLOPs of attention's backward pass over its forward pass."""
  chosen = implementation(local, layer, cross)
  if chosen == 'kernel':
    return KERNEL_BACKWARD
  kept = chosen == 'blocks' and keeps_scores(layer, cross)
  return BLOCKS_BACKWARD if kept else AGAIN_BACKWARD


def keeps_scores(layer: device_share.Layer, cross: bool) -> bool:
  """Whether attention in blocks keeps its probabilities."""
  T, S = layer.queries, layer.encoded if cross else layer.queries
  assert S is not None
  mask, kind = mask_lib.Mask() if cross else layer.mask, layer.softmax_of(cross)
  if kind is None:
    return False
  scanned = blocks.are_scanned(mask, T, S, kind.block)
  return S <= blocks.KEEP_KEYS and not scanned


# --- Recomputation. ---


def recomputed_products(
  local: device_share.DeviceShare, layer: device_share.Layer
) -> tuple[str, ...]:
  """Returns the names of the products that the backward pass recomputes."""
  remat, names = local.config.train.remat, set(products(local, layer))
  if remat == 'none':
    return ()
  if remat == 'full' and local.plan is not None:
    return tuple(sorted(names))  # A stage runs the whole forward pass again.
  if remat == 'dots':
    return tuple(sorted(n for n in names if n.endswith('scores')))
  execution = local.config.train.execution
  kept = {*execution.saved['save'], *execution.saved['offload']}
  kept |= {f'cross_{name}' for name in kept}
  if 'attention' in kept:  # Blocks need more than their output.
    for name, cross in (('scores', False), ('cross_scores', True)):
      if name in names and implementation(local, layer, cross) == 'kernel':
        kept.add(name)
  return tuple(sorted(names - kept - _unneeded(local, layer)))


def _unneeded(
  local: device_share.DeviceShare, layer: device_share.Layer
) -> set[str]:
  """Returns the products whose results no gradient of the layer needs.

  Those are products that are added to the residual stream at the end of the
  layer, unless a norm follows them. Experts need theirs for the gradient of
  their routing weights.
  """
  residual = local.config.model.residual
  if residual in ('post_norm', 'sandwich'):
    return set()
  last = {'output'} if residual == 'parallel' else set()
  if not isinstance(layer.mlp, moe.MoeConfig):
    last.add('mlp_down')
  return last

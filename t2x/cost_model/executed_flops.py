"""FLOPs that one device executes in a step, from shapes alone.

Of every product a backward pass makes two. What `train.remat` makes again comes
on top: all that the gradients of a layer ask for and that is not kept.

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

# Products of attention's backward pass over those of its forward pass: kernels
# make the scores again twice, for queries and for keys; blocks keep them, or
# make one product of two again.
KERNEL_BACKWARD, BLOCKS_BACKWARD, AGAIN_BACKWARD = 3.5, 2.0, 2.5


def flops(local: device_share.Local) -> dict[str, float]:
  """Returns the FLOPs of a step by part."""
  model = local.config.model
  parts: dict[str, float] = {}
  for layer in local.layers:
    own = of_layer(local, layer)
    for name, num in passes(local, layer).items():
      parts[name] = parts.get(name, 0.0) + num * own[name]
  head = 2 * local.targets * model.embed_dim * local.vocab
  if isinstance(model, encoder.EncoderConfig) and model.masked_head:
    head += 2 * local.targets * model.embed_dim**2
  # Chunks of the vocabulary are made again.
  head *= 3 + (local.config.train.loss.vocab_chunks > 1)
  return parts | {'head': local.heads * head}


def of_layer(
  local: device_share.Local, layer: device_share.Layer
) -> dict[str, float]:
  """Returns forward, made again and backward of one layer and microbatch."""
  made = products(local, layer)
  scores = {name: n for name, n in made.items() if name.endswith('scores')}
  again = made_again(local, layer)
  return {
    'forward': sum(made.values()),
    'made again': sum(made[name] for name in again),
    'backward': 2 * (sum(made.values()) - sum(scores.values()))
    + sum(
      backward_of_scores(local, layer, name.startswith('cross')) * n
      for name, n in scores.items()
    ),
  }


def passes(
  local: device_share.Local, layer: device_share.Layer
) -> dict[str, float]:
  """Returns how often such layers run forward, again and backward."""
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
  local: device_share.Local, layer: device_share.Layer
) -> dict[str, float]:
  """Returns the FLOPs of a layer's products, forward, of a microbatch."""
  kind, D = layer.kind, local.config.model.embed_dim
  tokens = local.rows * layer.queries / local.over('length')
  N = kind.num_heads / local.over('heads')
  K = kind.kv_heads / local.over('kv_heads')
  of_heads = lambda tokens, heads: 2 * tokens * D * heads * kind.head_dim
  made = {
    'query': of_heads(tokens, N),
    'key': of_heads(tokens, K),
    'value': of_heads(tokens, K),
    'scores': scores(local, layer),
    'output': of_heads(tokens, N),
  }
  if layer.encoded is not None:
    source = local.rows * layer.encoded / local.over('length')
    made |= {
      'cross_query': of_heads(tokens, N),
      'cross_key': of_heads(source, K),
      'cross_value': of_heads(source, K),
      'cross_scores': scores(local, layer, cross=True),
      'cross_output': of_heads(tokens, N),
    }
  return made | feed_forward(local, layer)


def feed_forward(
  local: device_share.Local, layer: device_share.Layer
) -> dict[str, float]:
  """Returns the FLOPs of the feed-forward layer's products, forward."""
  mlp, D = layer.mlp, local.config.model.embed_dim
  tokens = local.rows * layer.queries / local.over('length')
  used = tokens
  made = {}
  if isinstance(mlp, moe.MoeConfig):
    used = (
      slots(local, layer) if mlp.router.capacity else used_choices(local, layer)
    )
    made['router'] = 2 * tokens * D * mlp.num_experts
  one = 2 * used * D * mlp.hidden / local.over('mlp')
  made |= {'mlp_gate': one} if mlp.gated else {}
  return made | {'mlp_up': one, 'mlp_down': one}


def slots(local: device_share.Local, layer: device_share.Layer) -> float:
  """Returns the slots that a device computes, filled or not."""
  mlp = layer.mlp
  assert isinstance(mlp, moe.MoeConfig)
  num = mlp.num_experts * slots_of_expert(layer)
  # Axes of experts that split the rows too change no number of slots.
  held = [a for a in local.axes('experts') if a not in local.axes('batch')]
  return local.rows * num / local.size(tuple(held)) / local.over('length')


def slots_of_expert(layer: device_share.Layer) -> int:
  """Returns C of a row."""
  mlp = layer.mlp
  assert isinstance(mlp, moe.MoeConfig)
  router, E = mlp.router, mlp.num_experts
  assert router.capacity is not None
  share = router.capacity / E
  if isinstance(router, routing.TokenChoice):
    share *= router.top_k
  return min(layer.queries, math.ceil(share * layer.queries * (1 - 1e-9)))


def used_choices(local: device_share.Local, layer: device_share.Layer) -> float:
  """Returns the rows of ragged products, of routers without a capacity."""
  mlp = layer.mlp
  assert isinstance(mlp, moe.MoeConfig)
  held = mlp.num_experts / local.over('experts')
  moved = [a for a in local.axes('experts') if a in local.axes('batch')]
  tokens = local.rows * layer.queries / local.over('length')
  return tokens * local.size(tuple(moved)) * min(mlp.experts_of_token, held)


# --- Attention. ---


def way(
  local: device_share.Local, layer: device_share.Layer, cross: bool = False
) -> str:
  """Returns who computes the scores: kernel, blocks, a ring, or a mixer."""
  kind = layer.looks_by(cross)
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
  local: device_share.Local, layer: device_share.Layer, cross: bool = False
) -> float:
  """Returns the FLOPs of scores and of their product with values, forward."""
  kind = layer.kind
  if not (cross or isinstance(kind, attention_config.Softmax)):
    D = local.config.model.embed_dim
    flops = attention_kinds.mixing_flops(kind, layer.queries, D, layer.causal)
    return local.rows * flops / local.over('heads') / local.over('length')
  N = kind.num_heads / local.over('heads')
  return 4 * local.rows * N * kind.head_dim * pairs(local, layer, cross)


def pairs(
  local: device_share.Local, layer: device_share.Layer, cross: bool
) -> float:
  """Returns the pairs of a row's queries and keys that a device computes."""
  T, S = layer.queries, layer.encoded if cross else layer.queries
  assert S is not None
  mask = mask_lib.Mask() if cross else layer.mask
  C, kind = local.over('length'), layer.looks_by(cross)
  if kind is None:
    return 0.0
  chosen = way(local, layer, cross)
  if chosen == 'ring':
    return _ring_pairs(local, layer, mask, T, S, kind.block)
  if chosen == 'kernel':
    sides = [kind.block or splash.block_size(n) or n for n in (T, S)]
    return splash.visited(mask, T, S, *sides) / C
  return blocks.num_pairs(mask, T, S, kind.block) / C


def _ring_pairs(local, layer, mask, T, S, block) -> float:
  """The pairs of the device that has the most, on the diagonal in blocks."""
  C, block = local.over('length'), block or ring.BLOCK
  balanced = local.config.rules.balance_context and layer.causal
  zigzag = C if balanced and layer.encoded is None else 1
  mask = dataclasses.replace(mask, q_zigzag=zigzag, k_zigzag=zigzag)
  total = [0.0] * C
  own = mask_lib.Mask(pattern=mask.pattern)
  for step in ring_plan.plan(mask, T, S, C):
    for slot in step.slots:
      q_size = ring_plan.stretches(T, C, zigzag)[1]
      k_size = ring_plan.stretches(S, C, zigzag)[1]
      num = q_size * k_size
      if slot.diagonal:
        num = blocks.num_pairs(own, q_size, k_size, block, ring.RUNS)
      for device, seen in enumerate(slot.seen_C):
        total[device] += num * (seen != ring_plan.NONE)
  return max(total)


def backward_of_scores(
  local: device_share.Local, layer: device_share.Layer, cross: bool
) -> float:
  """Returns the FLOPs of the backward pass over those of the forward pass."""
  chosen = way(local, layer, cross)
  if chosen == 'kernel':
    return KERNEL_BACKWARD
  kept = chosen == 'blocks' and keeps_scores(layer, cross)
  return BLOCKS_BACKWARD if kept else AGAIN_BACKWARD


def keeps_scores(layer: device_share.Layer, cross: bool) -> bool:
  """Whether a backward pass in blocks finds the probabilities kept."""
  T, S = layer.queries, layer.encoded if cross else layer.queries
  assert S is not None
  mask, kind = mask_lib.Mask() if cross else layer.mask, layer.looks_by(cross)
  if kind is None:
    return False
  scanned = blocks.are_scanned(mask, T, S, kind.block)
  return S <= blocks.KEEP_KEYS and not scanned


# --- What is made again. ---


def made_again(
  local: device_share.Local, layer: device_share.Layer
) -> tuple[str, ...]:
  """Returns the products that `train.remat` has a backward pass repeat."""
  remat, names = local.config.train.remat, set(products(local, layer))
  if remat == 'none':
    return ()
  if remat == 'full' and local.plan is not None:
    return tuple(sorted(names))  # A stage runs the whole forward pass again.
  if remat == 'dots':
    return tuple(sorted(n for n in names if n.endswith('scores')))
  execution = local.config.train.execution
  kept = {*execution.kept['save'], *execution.kept['offload']}
  kept |= {f'cross_{name}' for name in kept}
  if 'attention' in kept:  # Blocks need what they kept besides their output.
    for name, cross in (('scores', False), ('cross_scores', True)):
      if name in names and way(local, layer, cross) == 'kernel':
        kept.add(name)
  return tuple(sorted(names - kept - _unread(local, layer)))


def _unread(local: device_share.Local, layer: device_share.Layer) -> set[str]:
  """Returns products whose results no gradient of the layer asks for.

  Those that are added to the residual stream at its end; but a norm after it
  does, and so do the weights of experts.
  """
  residual = local.config.model.residual
  if residual in ('post_norm', 'sandwich'):
    return set()
  last = {'output'} if residual == 'parallel' else set()
  if not isinstance(layer.mlp, moe.MoeConfig):
    last.add('mlp_down')
  return last

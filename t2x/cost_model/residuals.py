"""Estimates the bytes that a layer keeps for its backward pass.

They depend on `train.remat`. The arrays that JAX keeps for each of its settings
were read from jaxprs.
"""

from collections.abc import Mapping

from t2x.cost_model import device_share
from t2x.cost_model import executed_flops
from t2x.cost_model import tpu_tiles
from t2x.layers import moe
from t2x.layers import stack


def of_layer(
  local: device_share.DeviceShare, layer: device_share.Layer
) -> float:
  """Returns the bytes that one layer keeps of one microbatch."""
  remat, c = local.config.train.remat, local.itemsize
  D = local.config.model.embed_dim
  whole = local.rows * layer.queries
  between = whole / local.over('norm_length')
  tokens = whole / local.over('length')
  if remat == 'none':
    return _all_residuals(local, layer, tokens, between)
  execution = local.config.train.execution
  kept = _choice(local, layer)
  if stack.INPUT not in execution.saved['offload']:
    kept += c * between * D
  names = [*execution.saved['save']]
  if remat == 'dots':
    names = ['query', 'key', 'value', 'output', 'mlp_up', 'mlp_gate', 'router']
    if isinstance(layer.mlp, moe.MoeConfig):
      names.append('mlp_down')
  sizes = _results(local, layer, tokens)
  for name in names:
    kept += sizes.get(name, 0.0) + sizes.get(f'cross_{name}', 0.0)
  return kept


def _results(
  local: device_share.DeviceShare, layer: device_share.Layer, tokens: float
) -> dict[str, float]:
  """Returns the bytes of the results of a layer's products, by name."""
  kind, c, D = layer.kind, local.itemsize, local.config.model.embed_dim
  H = kind.head_dim
  N = kind.num_heads / local.over('heads')
  K = kind.kv_heads / local.over('kv_heads')
  source = local.rows * (layer.encoded or 0) / local.over('length')
  sizes = {
    'query': c * tokens * N * H,
    'key': c * tokens * K * H,
    'value': c * tokens * K * H,
    'attention': c * tokens * N * H + 4 * tokens * N,
    'output': c * tokens * D,
  }
  if layer.encoded is not None:
    sizes |= {f'cross_{n}': sizes[n] for n in ('query', 'attention', 'output')}
    sizes |= {f'cross_{n}': c * source * K * H for n in ('key', 'value')}
  hidden = layer.mlp.hidden / local.over('mlp')
  used = tokens
  if isinstance(layer.mlp, moe.MoeConfig):
    used = used_rows(local, layer)
    sizes['router'] = 4 * tokens * layer.mlp.num_experts
    sizes['mlp_down'] = c * used * D
  sizes['mlp_up'] = c * used * hidden
  if layer.mlp.gated:
    sizes['mlp_gate'] = sizes['mlp_up']
  return sizes


def used_rows(
  local: device_share.DeviceShare, layer: device_share.Layer
) -> float:
  """Returns the rows of the experts' products."""
  assert isinstance(layer.mlp, moe.MoeConfig)
  if layer.mlp.router.capacity:
    return executed_flops.slots(local, layer)
  return executed_flops.routed_rows(local, layer)


def _choice(
  local: device_share.DeviceShare, layer: device_share.Layer
) -> float:
  """Returns the bytes of the router's choice, which is never recomputed."""
  if not isinstance(layer.mlp, moe.MoeConfig):
    return 0.0
  if layer.mlp.router.capacity:
    slots = executed_flops.slots_of_expert(layer) * layer.mlp.num_experts
    return 4 * local.rows * slots
  return 4 * local.rows * layer.queries * layer.mlp.experts_of_token


def _all_residuals(
  local: device_share.DeviceShare,
  layer: device_share.Layer,
  tokens: float,
  between: float,
) -> float:
  """Returns the bytes of everything that a gradient uses, without remat.

  Args:
    local: the share of the device.
    layer: the layer.
    tokens: tokens of a microbatch on the device, within a layer.
    between: tokens of a microbatch on the device, between layers.
  """
  c, D = local.itemsize, local.config.model.embed_dim
  residual = local.config.model.residual
  sizes = _results(local, layer, tokens)
  cross = layer.encoded is not None
  norms = 1 if residual == 'parallel' else 2 + cross
  # Of each norm three arrays in float32, the input among them, and its output.
  kept = norms * (12 * between * D + c * tokens * D)
  if residual == 'sandwich':  # Norms of the outputs of branches.
    kept += norms * 12 * between * D
  kept += _attention_residuals(local, layer, sizes, False)
  kept += _attention_residuals(local, layer, sizes, True) if cross else 0.0
  steps = _steps(layer.mlp)
  kept += steps * sizes['mlp_up']
  if isinstance(layer.mlp, moe.MoeConfig):
    # Dispatched rows, their results in float32, and gathered experts.
    used = used_rows(local, layer)
    kept += (c + 4) * used * D + 4 * tokens * D + _choice(local, layer)
    kept += _experts(local)
  return kept


def _steps(mlp: moe.FeedForwardConfig) -> int:
  """Returns the number of arrays of the hidden width that gradients use."""
  return {'relu': 2, 'silu': 4, 'gelu': 4, 'gelu_tanh': 6}[mlp.activation] + (
    2 * mlp.gated
  )


def _attention_residuals(
  local: device_share.DeviceShare,
  layer: device_share.Layer,
  sizes: Mapping[str, float],
  cross: bool,
) -> float:
  prefix = 'cross_' if cross else ''
  query, attention = sizes[f'{prefix}query'], sizes[f'{prefix}attention']
  kept = query + 2 * sizes[f'{prefix}key'] + attention
  chosen = executed_flops.implementation(local, layer, cross)
  if chosen == 'kernel':
    # In kernels the head dimension is the last, and is padded to whole lanes.
    H = layer.kind.head_dim
    kept *= -(-H // tpu_tiles.LANES) * tpu_tiles.LANES / H
  kept += query  # The output, in the layout of the product after it.
  if chosen == 'blocks' and executed_flops.keeps_scores(layer, cross):
    # Probabilities in float32 and in the dtype of the products, and the output
    # in float32.
    heads = layer.kind.num_heads / local.over('heads')
    pairs = executed_flops.pairs(local, layer, cross)
    kept += (4 + local.itemsize) * local.rows * heads * pairs
    kept += 4 / local.itemsize * query
  return kept


def _experts(local: device_share.DeviceShare) -> float:
  """Returns the bytes of one layer's experts, gathered over `fsdp`."""
  return local.itemsize * sum(
    w.used / local.num_layers for w in local.weights if 'experts' in w.axes
  )

"""Estimates the bytes of activations that devices exchange within a layer."""

from collections.abc import Iterator
from collections.abc import Mapping

from t2x.cost_model import device_share
from t2x.cost_model import executed_flops
from t2x.cost_model import message
from t2x.layers import moe
from t2x.layers import position


def of_layer(
  local: device_share.DeviceShare, layer: device_share.Layer
) -> Iterator[message.Message]:
  """Yields the messages of activations in a step, of layers that are alike.

  Args:
    local: the share of the device.
    layer: the layers.
  """
  D, c = local.config.model.embed_dim, local.itemsize
  num = executed_flops.passes(local, layer)
  tokens = local.rows * layer.queries / local.over('length')
  size = c * tokens * D
  yield from _of_tensor(local, layer, num, size)
  yield from _of_bias(local, layer, num)
  if local.over('length') > 1:
    yield from _of_context(local, layer, num, tokens)
  if isinstance(layer.mlp, moe.MoeConfig):
    yield from _of_experts(local, layer, num)


def _of_tensor(
  local: device_share.DeviceShare,
  layer: device_share.Layer,
  num: Mapping[str, float],
  size: float,
) -> Iterator[message.Message]:
  """Yields the sums of tensor parallelism: of outputs and of input gradients.

  Args:
    local: the share of the device.
    layer: the layers.
    num: runs of each pass, from `executed_flops.passes`.
    size: bytes of the activations between layers, of one microbatch.
  """
  again = executed_flops.recomputed_products(local, layer)
  parallel = local.config.model.residual == 'parallel'
  fine = tuple(
    a for a in local.axes('norm_length') if a not in local.axes('length')
  )
  branches = [('heads', 'output'), ('mlp', 'mlp_down')]
  if layer.encoded is not None:
    branches.append(('heads', 'cross_output'))
    # Gradients of the encoder's output, by keys and values. Where sequences are
    # split between layers, they are summed once for all layers.
    source = size * layer.encoded / layer.queries
    axes = () if fine else local.axes('kv_heads')
    yield _summed('all-reduce', axes, num['backward'] * source)
  for axis, name in branches:
    axes = local.axes(axis)
    if axis == 'mlp' and isinstance(layer.mlp, moe.MoeConfig):
      axes = tuple(a for a in axes if a not in local.axes('batch'))
    if not axes and not fine:
      continue
    repeats = num['made again'] if name in again else 0
    if name == 'mlp_down' and isinstance(layer.mlp, moe.MoeConfig):
      repeats = 0  # The output of experts is used before it is summed.
    if fine:
      into = num['forward'] + num['backward']
      into += num['made again'] if again else 0
      out = num['forward'] + repeats + num['backward']
      yield _summed('all-gather', fine, into * size)
      yield _summed('reduce-scatter', fine, out * size)
      continue
    if parallel and axis == 'mlp':
      continue  # Both branches are summed at once.
    times = num['forward'] + repeats + num['backward']
    yield _summed('all-reduce', axes, times * size)


def _summed(kind: str, axes: message.Axes, size: float) -> message.Message:
  return message.Message(
    part='sums of activations', kind=kind, axes=axes, bytes=size
  )


def _of_bias(
  local: device_share.DeviceShare,
  layer: device_share.Layer,
  num: Mapping[str, float],
) -> Iterator[message.Message]:
  """Yields the reduction of a position bias's gradient, (heads, T, S)."""
  config = local.config.model.position
  if config is None or not position.is_bias(config):
    return
  rows = tuple(a for a in local.axes('batch') if a not in local.by_hand)
  heads = layer.kind.num_heads / local.over('heads')
  size = 4 * heads * executed_flops.pairs(local, layer, False)
  yield message.Message(
    part='attention',
    kind='all-reduce',
    axes=rows,
    bytes=num['backward'] * size,
  )


def _of_context(
  local: device_share.DeviceShare,
  layer: device_share.Layer,
  num: Mapping[str, float],
  tokens: float,
) -> Iterator[message.Message]:
  """Yields the messages of ring attention, or of all-to-all attention."""
  kind, c = layer.kind, local.itemsize
  C, axes = local.over('length'), local.axes('length')
  heads = kind.num_heads / local.over('heads')
  kv_heads = kind.kv_heads / local.over('kv_heads')
  again = 'scores' in executed_flops.recomputed_products(local, layer)
  repeats = num['made again'] if again else 0
  if local.config.rules.context_attention == 'all_to_all':
    copied = max(kv_heads, C)
    size = c * tokens * kind.head_dim * 2 * (heads + copied)
    yield message.Message(
      part='attention',
      kind='all-to-all',
      axes=axes,
      bytes=(num['forward'] + repeats + num['backward']) * size,
    )
    return
  size = 2 * c * tokens * kind.head_dim * kv_heads
  # The recomputation uses the keys and values that the backward pass receives.
  hops = (C - 1) * num['forward'] + (2 * C - 1) * num['backward']
  yield message.Message(
    part='attention', kind='collective-permute', axes=axes, bytes=hops * size
  )


def _of_experts(
  local: device_share.DeviceShare,
  layer: device_share.Layer,
  num: Mapping[str, float],
) -> Iterator[message.Message]:
  """Yields the exchanges of tokens with experts, and of their gradients."""
  assert isinstance(layer.mlp, moe.MoeConfig)
  moved = tuple(a for a in local.axes('experts') if a in local.axes('batch'))
  D, c = local.config.model.embed_dim, local.itemsize
  again = 'mlp_down' in executed_flops.recomputed_products(local, layer)
  passes = num['forward'] + num['backward'] + again * num['made again']
  if layer.mlp.router.capacity:
    size = c * executed_flops.slots(local, layer) * D
    yield message.Message(
      part='experts', kind='all-to-all', axes=moved, bytes=2 * passes * size
    )
    return
  tokens = local.rows * layer.queries / local.over('length')
  size = c * tokens * D * local.size(moved)
  for kind in ('all-gather', 'reduce-scatter'):
    yield message.Message(
      part='experts', kind=kind, axes=moved, bytes=passes * size
    )

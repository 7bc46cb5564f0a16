"""FLOPs of a model's matrix products, and model FLOPs utilisation (MFU).

A product counts 2 x multiply-adds. Norms, activations, softmax, look-ups and
recomputation are left out, so the figure is that of the model and not of the
program, which `t2x.hlo` counts; tests compare the two. A backward pass costs
two forward passes, since each product has one product for the gradient of
either factor (Kaplan et al., 2020). MFU is the ratio to the peak of the devices
(Chowdhery et al., 2022).

Letters: B rows, T query positions, S key positions, D embed, N heads, K
key/value heads, H head dim, F feed-forward, V vocabulary, w window.
"""

from collections.abc import Mapping
import dataclasses
import functools

from t2x.attention import patterns
from t2x.layers import attention_config
from t2x.layers import attention_kinds
from t2x.layers import moe
from t2x.layers import transformer_xl
from t2x.models import common
from t2x.models import encoder
from t2x.models import model as model_lib


@dataclasses.dataclass(frozen=True)
class BatchShape:
  """The shape of a batch, as far as FLOPs depend on it.

  Attributes:
    rows: number of rows of the whole batch, B.
    length: number of positions of a row (of an encoder-decoder, of the
      decoder), T.
    encoder_length: number of source positions of a row, S; None without
      encoder-decoder.
    num_targets: number of positions of a row that reach the head; None for all.
  """

  rows: int
  length: int
  encoder_length: int | None = None
  num_targets: int | None = None


def forward_flops(
  config: model_lib.ModelConfig,
  shape: BatchShape,
  *,
  skip_masked: bool = True,
) -> int:
  """Returns the FLOPs of one forward pass, logits included.

  Each row counts as one sequence of full length: padding, and packing of
  documents, change nothing. BERT's pooler (one token per row) is left out. A
  mixture of experts counts the experts that its router may choose for a token,
  whether or not they had room for it.

  Args:
    config: settings of the model.
    shape: shape of the batch.
    skip_masked: whether masked scores are left out, so that a causal layer
      counts half of its scores and a window its width, see `pairs`; otherwise
      all T x S scores count.

  Raises:
    ValueError: if an encoder-decoder's `encoder_length` is missing.
  """
  return sum(forward_parts(config, shape, skip_masked=skip_masked).values())


def train_flops(config: model_lib.ModelConfig, shape: BatchShape) -> int:
  """Returns the model FLOPs of one training step: 3 x forward."""
  return 3 * forward_flops(config, shape)


def arguments(
  config: model_lib.ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[model_lib.ModelConfig, BatchShape]:
  """Returns the arguments of `train_flops`.

  Args:
    config: settings of the model.
    shapes: shape of each array of a batch, by name.
  """
  rows, length = shapes['inputs']
  _, source = shapes.get('encoder_inputs', (0, None))
  return config, BatchShape(rows, length, source, shapes['targets'][1])


def forward_parts(
  config: model_lib.ModelConfig,
  shape: BatchShape,
  *,
  skip_masked: bool = True,
) -> dict[str, int]:
  """Returns the terms of `forward_flops`, by name."""
  parts = {}
  length, num_targets = shape.length, shape.num_targets
  layers = _layers(
    config, length, shape.encoder_length, num_targets, skip_masked
  )
  for layer in sum(layers.values(), []):
    for name, n in layer.items():
      parts[name] = parts.get(name, 0) + n
  parts |= top_flops(config, length, num_targets, skip_masked=skip_masked)
  return {name: shape.rows * n for name, n in parts.items()}


def top_flops(
  config: model_lib.ModelConfig,
  length: int,
  num_targets: int | None = None,
  *,
  skip_masked: bool = True,
) -> dict[str, int]:
  """Returns the FLOPs after the last layer, by name: one row, forward pass.

  Args:
    config: settings of the model.
    length: number of positions of a row, T.
    num_targets: number of positions of a row that reach the head; None for all.
    skip_masked: whether masked scores are left out, see `forward_flops`.
  """
  parts = {'head': head_flops(config, num_targets or length)}
  for layer in _layers_ahead(config, length, skip_masked):
    parts['heads ahead'] = parts.get('heads ahead', 0) + parts['head']
    parts['heads ahead'] += sum(layer.values())
  return parts


def layer_flops(
  config: model_lib.ModelConfig,
  length: int,
  encoder_length: int | None = None,
  num_targets: int | None = None,
) -> dict[str, list[int]]:
  """Returns the FLOPs of each layer of each tower: one row, one forward pass.

  Args:
    config: settings of the model.
    length: number of positions of a row (of an encoder-decoder, of the
      decoder), T.
    encoder_length: number of source positions of a row, S; None without
      encoder-decoder.
    num_targets: number of positions of a row that reach the head; None for all.

  Raises:
    ValueError: if an encoder-decoder's `encoder_length` is missing.
  """
  towers = _layers(config, length, encoder_length, num_targets, True)
  return {
    tower: [sum(layer.values()) for layer in layers]
    for tower, layers in towers.items()
  }


def head_flops(config: model_lib.ModelConfig, num_targets: int) -> int:
  """Returns the FLOPs of the logits of one row, one forward pass."""
  D = config.embed_dim
  flops = 2 * num_targets * D * config.vocab_size
  if isinstance(config, encoder.EncoderConfig) and config.masked_head:
    flops += 2 * num_targets * D * D
  return flops


def _layers_ahead(
  config: model_lib.ModelConfig, T: int, skip_masked: bool
) -> list[dict[str, int]]:
  """Returns the FLOPs of the layer of each extra head, by name."""
  num = config.num_ahead
  last = len(config.group)
  tower = _tower(config, last, T, True, skip_masked) if num else [{}]
  return num * tower[-1:]


def _layers(
  config: model_lib.ModelConfig,
  T: int,
  S: int | None,
  num_targets: int | None,
  skip_masked: bool,
) -> dict[str, list[dict[str, int]]]:
  """Returns the FLOPs of each layer of each tower, by name, for one row."""
  depths, causal = config.depths, not isinstance(config, encoder.EncoderConfig)
  tower = functools.partial(_tower, config, skip_masked=skip_masked)
  if 'encoder' not in depths:
    M = num_targets or T
    if config.is_two_stream and num_targets:
      return {'tower': tower(depths['tower'], T + num_targets, causal, keys=T)}
    layers = {'tower': tower(depths['tower'], T, causal)}
    if 'queries' in depths:
      layers['queries'] = tower(depths['queries'], M, False, cross_length=T)
    return layers
  if S is None:
    raise ValueError(
      'encoder_length=None; an encoder-decoder needs the length of its source '
      'rows to count FLOPs.'
    )
  return {
    'encoder': tower(depths['encoder'], S, False),
    'decoder': tower(depths['decoder'], T, True, cross_length=S),
  }


def _tower(
  config: common.TransformerConfig,
  num_layers: int,
  length: int,
  causal: bool,
  skip_masked: bool,
  cross_length: int | None = None,
  keys: int | None = None,
) -> list[dict[str, int]]:
  """Returns the FLOPs of each layer of a tower, by name, for one row.

  Args:
    config: settings of the model.
    num_layers: number of layers of the tower.
    length: number of tokens of the row.
    causal: whether tokens attend to earlier tokens alone.
    skip_masked: whether masked scores are left out, see `forward_flops`.
    cross_length: number of tokens that cross-attention reads; None without
      cross-attention.
    keys: number of first tokens to which all attend; None for all tokens.
  """
  D, layers = config.embed_dim, []
  for i in range(num_layers):
    kind, mlp = config.group[i % len(config.group)]
    num_keys = keys or length
    if isinstance(kind, attention_config.Softmax):
      pattern = attention_kinds.pattern_of(kind, num_keys, causal)
      scores = _attention(kind, length, num_keys, pattern, skip_masked)
      if isinstance(kind, transformer_xl.TransformerXL):
        num = (
          pairs(length, num_keys, pattern) if skip_masked else length * num_keys
        )
        scores += transformer_xl.num_flops(kind, length, D, num)
    else:
      scores = attention_kinds.mixing_flops(kind, length, D, causal)
    width = kind.head_dim * attention_kinds.projected_heads(kind)
    layer = {
      'projections': 2 * length * D * width
      - _unseen(kind, length - num_keys, D),
      'scores and values': scores,
    }
    for name, per_token in _feed_forward(mlp, D).items():
      layer[name] = int(length * per_token)
    if cross_length is not None:
      cross = _cross(config, kind, length, cross_length, skip_masked)
      layer['cross-attention'] = cross
    layers.append(layer)
  return layers


def _unseen(kind: attention_kinds.AttentionConfig, num: int, D: int) -> int:
  """Returns the FLOPs of keys and values of `num` tokens without them."""
  return 4 * num * D * kind.kv_heads * kind.head_dim


def _feed_forward(mlp: moe.FeedForwardConfig, D: int) -> dict[str, float]:
  """Returns the FLOPs of a feed-forward layer for one token, by name."""
  # Up and down, and a gate.
  products = 3 if mlp.gated else 2
  dense = products * 2 * D * mlp.hidden
  if not isinstance(mlp, moe.MoeConfig):
    return {'mlp': dense}
  router = 2 * D * mlp.num_experts
  return {'mlp': mlp.experts_of_token * dense, 'router': router}


def _cross(
  config: common.TransformerConfig,
  kind: attention_kinds.AttentionConfig,
  T: int,
  S: int,
  skip_masked: bool,
) -> int:
  """Returns the FLOPs of cross-attention.

  Queries and output have T positions, keys and values S, scores T x S.
  """
  N, K, H = kind.num_heads, kind.kv_heads, kind.head_dim
  products = 2 * config.embed_dim * H * (2 * N * T + 2 * K * S)
  return products + _attention(kind, T, S, patterns.Everything(), skip_masked)


def _attention(
  kind: attention_kinds.AttentionConfig,
  T: int,
  S: int,
  pattern: patterns.Pattern,
  skip_masked: bool,
) -> int:
  """Returns the FLOPs of queries with keys, and of weights with values."""
  num = pairs(T, S, pattern) if skip_masked else T * S
  return int(4 * kind.num_heads * kind.head_dim * num)


def pairs(T: int, S: int, pattern: patterns.Pattern) -> float:
  """Returns the number of pairs of a query and a key that are not masked.

  Causal attention counts as T * T / 2, and as w * T - w * w / 2 with a window
  of w tokens: the areas of the triangle and of the band, which leave out w / 2
  of the pairs on their edges. Pairs of other patterns are counted.

  Args:
    T: number of queries.
    S: number of keys.
    pattern: attention pattern of the layer.
  """
  match pattern:
    case patterns.Causal():
      window = T
    case patterns.And(patterns.Causal(), patterns.Window(size)):
      window = min(size, T)
    case _:
      return patterns.count(pattern, T, S)
  return window * T - window * window / 2


# Dense bfloat16 and float32 FLOP/s of one JAX device, by the start of its
# `device_kind`; the first match counts. Float32 products run at JAX's default
# precision: one bfloat16 pass on a TPU, TF32 on a GPU.
# TPU: docs.cloud.google.com/tpu/docs, the page of each version, "Peak compute
#   per chip (BF16)". A TPU7x chip (2,307 TFLOP/s) is two devices, others one.
# GPU: NVIDIA's data sheets of the A100, H100 (SXM, PCIe, NVL), H200 and HGX
#   B200. Those after A100 print figures with sparsity; these are halves.
_PEAKS = (
  ('TPU v4 lite', None),  # An inference chip, not the v4.
  ('TPU v4', (275e12, 275e12)),
  ('TPU v5 lite', (197e12, 197e12)),
  ('TPU v5e', (197e12, 197e12)),
  ('TPU v5', (459e12, 459e12)),  # v5p calls itself 'TPU v5'.
  ('TPU v6 lite', (918e12, 918e12)),
  ('TPU v6e', (918e12, 918e12)),
  ('TPU7x', (1153.5e12, 1153.5e12)),
  ('NVIDIA A100', (312e12, 156e12)),
  ('NVIDIA H100 PCIe', (756e12, 378e12)),
  ('NVIDIA H100 NVL', (835.5e12, 417.5e12)),
  ('NVIDIA H100', (989.4e12, 494.7e12)),
  ('NVIDIA H200 NVL', (835.5e12, 417.5e12)),
  ('NVIDIA H200', (989.4e12, 494.7e12)),
  ('NVIDIA B200', (2250e12, 1125e12)),
)


def peak_flops(device_kind: str, dtype: str) -> float | None:
  """Returns the published peak FLOP/s of a device, or None if unknown.

  Args:
    device_kind: kind of the device, `jax.devices()[0].device_kind`.
    dtype: dtype of the activations, 'bfloat16' or 'float32'.
  """
  for start, figures in _PEAKS:
    if device_kind.startswith(start):
      index = {'bfloat16': 0, 'float32': 1}.get(dtype)
      return None if figures is None or index is None else figures[index]
  return None


def mfu(
  flops: float, seconds: float, num_devices: int, peak: float | None
) -> float | None:
  """Returns model FLOPs utilisation, 0 to 1, or None if `peak` is unknown.

  Args:
    flops: FLOPs of one step on all devices, from `train_flops`.
    seconds: duration of the step.
    num_devices: number of devices.
    peak: peak FLOP/s of one device, from `peak_flops`.
  """
  return None if peak is None else flops / (seconds * num_devices * peak)


def formula(
  config: model_lib.ModelConfig,
  shape: BatchShape,
  *,
  peak: float | None = None,
) -> str:
  """Returns lines with the formula of the MFU and a model's figures.

  Args:
    config: settings of the model.
    shape: shape of the batch.
    peak: peak FLOP/s of one device; None if unknown.
  """
  parts = forward_parts(config, shape)
  total = sum(parts.values())
  terms = ' + '.join(f'{name} {_giga(n)}' for name, n in parts.items())
  has_causal = not isinstance(config, encoder.EncoderConfig)
  attended = 'T x S'
  if has_causal:
    attended = 'T*T/2 (causal attention counted as half)'
  kinds = {kind.kind for kind in config.kinds} - {'dense'}
  if kinds == {'local'} and has_causal:
    attended += ', in a window w w*T - w*w/2'
  elif kinds:
    attended += f', of {", ".join(sorted(kinds))} attention those that it sees'
  known = 'unknown here, so mfu is null'
  return '\n'.join(
    [
      'MFU = 3 x forward FLOPs / (step seconds x devices x peak FLOP/s)',
      '  forward = 2 x tokens x weights of products + 4 x heads x head dim x '
      'pairs',
      f'  pairs of query and key to a row and layer: {attended}',
      f'  forward = {terms} = {_giga(total)} GFLOP',
      f'  a step = {_giga(3 * total)} GFLOP; peak FLOP/s of a device '
      + (known if peak is None else f'{peak:.4g}'),
    ]
  )


def _giga(flops: float) -> str:
  return f'{flops / 1e9:,.4g}' if flops < 1e12 else f'{flops / 1e9:,.0f}'

"""Encoder-decoders: the original Transformer and T5.

Shape suffixes: B batch, T decoder position, S encoder position, D embed, V
vocabulary.
"""

import dataclasses
from typing import ClassVar

from flax import nnx
import jax

from t2x import stack
from t2x.attention import mask as mask_lib
from t2x.layers import block
from t2x.layers import dropout
from t2x.layers import embed
from t2x.layers import moe
from t2x.models import common


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(common.TransformerConfig):
  """See `TransformerConfig`; one token table serves both sides.

  Attributes:
    num_encoder_layers: None means as many as the decoder has.
  """

  kind: ClassVar[str] = 'encoder_decoder'
  num_encoder_layers: int | None = None

  def __post_init__(self):
    super().__post_init__()
    common.check_causal(self)


class EncoderDecoder(nnx.Module):
  """An encoder, and a decoder that looks at its output.

  >>> model = EncoderDecoder(EncoderDecoderConfig(vocab_size=9),
  ...                        rngs=nnx.Rngs(0))
  >>> ids = jax.numpy.ones((2, 8), int)
  >>> model(ids, encoder_inputs=ids).shape
  (2, 8, 9)
  """

  inputs = (
    'inputs',
    'segments',
    'positions',
    'encoder_inputs',
    'encoder_segments',
    'encoder_positions',
  )

  def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.embeddings = common.Embeddings(config, rngs=rngs)
    self.encoder = common.Tower(
      config,
      config.num_encoder_layers or config.num_layers,
      bidirectional=True,
      rngs=rngs,
    )
    self.decoder = common.Tower(
      config, config.num_layers, bidirectional=False, cross=True, rngs=rngs
    )
    untied = config.tied_head == 'untied'
    self.output = common.OutputTable(config, rngs=rngs) if untied else None

  def __call__(self, inputs: jax.Array, **kwargs) -> jax.Array:
    """Returns float32 logits (B, T, V); arguments as for `features`."""
    return self.head(self.hidden(inputs, **kwargs))

  def hidden(self, inputs: jax.Array, **kwargs) -> jax.Array:
    """Returns the features alone; arguments as for `features`."""
    return self.features(inputs, **kwargs)[0]

  def features(
    self,
    inputs: jax.Array,
    *,
    encoder_inputs: jax.Array,
    encoder_segments: jax.Array | None = None,
    encoder_positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    positions: jax.Array | None = None,
    keys_B: jax.Array | None = None,
    execution: stack.Execution = stack.Execution(),
  ) -> tuple[jax.Array, dict[str, moe.Stats]]:
    """Returns the decoder's features (B, T, D), with teacher forcing.

    And what the routers of mixtures of experts did, by their paths.

    Args:
      inputs: the targets, shifted right (B, T).
      encoder_inputs: source tokens (B, S).
      encoder_segments: (B, S); 0 is padding.
      encoder_positions: (B, S); default 0, 1, 2, ...
      segments: (B, T); a target sees the source of its own segment.
      positions: (B, T); default 0, 1, 2, ...
      keys_B: dropout keys of the rows; None means no dropout.
      execution: scan or unroll, what to recompute, and in which order the
        tokens of a row come.

    Raises:
      ValueError: more tokens than the model has positions.
    """
    common.check_length(self.config, inputs.shape[1])
    zigzag = execution.zigzag
    encoded_BSD, encoder_stats = self._encode(
      encoder_inputs,
      segments=encoder_segments,
      positions=encoder_positions,
      keys_B=dropout.fold(keys_B, 0),
      execution=execution,
    )
    if positions is None:
      positions = common.positions_like(inputs, zigzag)
    cross_mask = mask_lib.Mask(
      q_segments_BT=segments, k_segments_BS=encoder_segments, q_zigzag=zigzag
    )
    context = block.Context(
      mask=mask_lib.self_attention(segments, causal=True, zigzag=zigzag),
      positions_BT=positions,
      keys_B=dropout.fold(keys_B, 1),
      encoded_BSD=encoded_BSD,
      cross_mask=cross_mask,
    )
    x_BTD = self.embeddings(inputs, positions)
    x_BTD, _, stats = self.decoder(x_BTD, context, execution=execution)
    return x_BTD, encoder_stats | common.under('decoder', stats)

  def encode(self, inputs: jax.Array, **kwargs) -> jax.Array:
    """Returns the encoder's output (B, S, D).

    Args:
      inputs: source tokens (B, S).
      **kwargs: segments, positions, keys_B and execution, as for `features`.
    """
    return self._encode(inputs, **kwargs)[0]

  def _encode(
    self,
    inputs: jax.Array,
    *,
    segments: jax.Array | None = None,
    positions: jax.Array | None = None,
    keys_B: jax.Array | None = None,
    execution: stack.Execution = stack.Execution(),
  ) -> tuple[jax.Array, dict[str, moe.Stats]]:
    """Returns the encoder's output (B, S, D) and what its routers did."""
    common.check_length(self.config, inputs.shape[1])
    if positions is None:
      positions = common.positions_like(inputs)
    context = block.Context(
      mask=mask_lib.self_attention(segments, causal=False),
      positions_BT=positions,
      keys_B=keys_B,
    )
    x_BSD = self.embeddings(inputs, positions)
    x_BSD, _, stats = self.encoder(x_BSD, context, execution=execution)
    return x_BSD, common.under('encoder', stats)

  @property
  def head(self) -> embed.Head:
    table = self.output or self.embeddings.tokens
    return common.make_head(self.config, table.table_VD)

  def empty_caches(self, batch: int, capacity: int, encoded_BSD: jax.Array):
    """Returns caches; the cross-attention's are computed here, once."""
    return self.decoder.empty_caches(batch, capacity, encoded_BSD)

  def step(self, inputs: jax.Array, index_BT: jax.Array, caches, cross_mask):
    """Extends cached targets by the tokens at `index_BT`; see `Decoder.step`.

    `cross_mask` says what the targets see of the source.
    """
    context = block.Context(
      mask=mask_lib.Mask(causal=True, q_index_BT=index_BT),
      positions_BT=index_BT,
      cross_mask=cross_mask,
    )
    x_BTD = self.embeddings(inputs, index_BT)
    return self.decoder(x_BTD, context, caches=caches)[:2]

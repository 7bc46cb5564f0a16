"""Encoder-decoders: the original Transformer and T5.

Shape suffixes: B batch, T decoder position, S encoder position, D embed, V
vocabulary.
"""

import dataclasses
from typing import ClassVar

from flax import nnx
import jax

from t2x.attention import mask as mask_lib
from t2x.layers import block
from t2x.layers import dropout
from t2x.layers import embed
from t2x.layers import moe
from t2x.layers import stack
from t2x.models import common
from t2x.models import forward
from t2x.models import layer_checks
from t2x.models import loss_terms
from t2x.models import tower as tower_lib


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
    layer_checks.check_causal(self)
    layer_checks.check_bidirectional(self)

  @property
  def depths(self) -> dict[str, int]:
    """See `TransformerConfig`."""
    below = self.num_encoder_layers or self.num_layers
    return {'encoder': below, 'decoder': self.num_layers}


class EncoderDecoder(nnx.Module):
  """An encoder, and a decoder that looks at its output.

  >>> model = EncoderDecoder(EncoderDecoderConfig(vocab_size=9),
  ...                        rngs=nnx.Rngs(0))
  >>> ids = jax.numpy.ones((2, 8), int)
  >>> model(ids, encoder_inputs=ids).shape
  (2, 8, 9)
  """

  towers = ('encoder', 'decoder')

  def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.embeddings = common.Embeddings(config, rngs=rngs)
    self.encoder = tower_lib.Tower(
      config,
      config.depths['encoder'],
      bidirectional=True,
      rngs=rngs,
    )
    self.decoder = tower_lib.Tower(
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
      encoder_segments: (B, S); 0 is padding, which no target sees.
      encoder_positions: (B, S); default 0, 1, 2, ...
      segments: (B, T); a target sees targets and the source of its own segment;
        without `encoder_segments` all of the source.
      positions: (B, T); default 0, 1, 2, ...
      keys_B: dropout keys of the rows; None means no dropout.
      execution: scan or unroll, what to recompute, and in which order the
        tokens of a row come.

    Raises:
      ValueError: more tokens than the model has positions.
    """
    batch = {
      'inputs': inputs,
      'segments': segments,
      'positions': positions,
      'encoder_inputs': encoder_inputs,
      'encoder_segments': encoder_segments,
      'encoder_positions': encoder_positions,
    }
    return forward.features(self, batch, keys_B=keys_B, execution=execution)

  def encode(
    self,
    inputs: jax.Array,
    *,
    segments: jax.Array | None = None,
    positions: jax.Array | None = None,
    execution: stack.Execution = stack.Execution(),
  ) -> jax.Array:
    """Returns the encoder's output (B, S, D).

    Args:
      inputs: source tokens (B, S).
      segments: (B, S); 0 is padding.
      positions: (B, S); default 0, 1, 2, ...
      execution: scan or unroll.
    """
    batch = {
      'encoder_inputs': inputs,
      'encoder_segments': segments,
      'encoder_positions': positions,
    }
    x_BSD, _ = forward.run(self, batch, ('encoder',), execution=execution)
    return self.encoder.end(x_BSD)

  def context(
    self,
    tower: str,
    batch: forward.Batch,
    keys_B: jax.Array | None,
    zigzag: int,
  ) -> block.Context:
    """See `forward.Model`."""
    encodes = tower == 'encoder'
    prefix = 'encoder_' if encodes else ''
    zigzag = 1 if encodes else zigzag
    common.check_length(self.config, batch[f'{prefix}inputs'].shape[1])
    segments = batch.get(f'{prefix}segments')
    keys_B = dropout.fold(keys_B, self.towers.index(tower))
    cross = mask_lib.Mask()
    if not encodes:
      source = batch.get('encoder_segments')
      cross = mask_lib.cross_attention(
        batch['inputs'], segments, source, zigzag=zigzag
      )
    return block.Context(
      mask=mask_lib.self_attention(segments, causal=not encodes, zigzag=zigzag),
      positions_BT=common.positions_of(batch, prefix, zigzag),
      keys_B=keys_B,
      cross_mask=cross,
    )

  def enter(
    self,
    tower: str,
    batch: forward.Batch,
    context: block.Context,
    x_BTD: jax.Array | None,
  ) -> tuple[jax.Array, jax.Array | None]:
    """See `forward.Model`."""
    positions = context.positions_BT
    assert positions is not None
    if tower == 'encoder':
      return self.embeddings(batch['encoder_inputs'], positions), None
    encoded_BSD = self.encoder.end(x_BTD)
    return self.embeddings(batch['inputs'], positions), encoded_BSD

  def leave(self, x_BTD: jax.Array, batch: forward.Batch) -> jax.Array:
    """See `forward.Model`."""
    del batch
    return self.decoder.end(x_BTD)

  def terms(
    self,
    x_BTD: jax.Array,
    batch: forward.Batch,
    keys_B: jax.Array | None,
    zigzag: int,
  ) -> loss_terms.Terms:
    """See `forward.Model`."""
    del keys_B, zigzag
    return loss_terms.of_tokens(self.leave(x_BTD, batch), self.head, batch)

  @property
  def head(self) -> embed.Head:
    table = self.output or self.embeddings.tokens
    return common.make_head(self.config, table.table_VD)

  def empty_caches(
    self, batch: int, capacity: int, encoded_BSD: jax.Array, dtype=None
  ):
    """As of a `Decoder`; the cross-attention's are computed here, once."""
    return self.decoder.empty_caches(batch, capacity, encoded_BSD, dtype)

  def step(self, inputs: jax.Array, index_BT: jax.Array, caches, cross_mask):
    """Extends cached targets by the tokens at `index_BT`; see `Decoder.step`.

    `cross_mask` says what the targets see of the source.
    """
    context = block.Context(
      mask=mask_lib.make(causal=True, q_index_BT=index_BT),
      positions_BT=index_BT,
      cross_mask=cross_mask,
    )
    x_BTD = self.embeddings(inputs, index_BT)
    x_BTD, caches, _ = self.decoder(x_BTD, context, caches=caches)
    return self.decoder.end(x_BTD), caches

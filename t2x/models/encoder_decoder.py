"""Encoder-decoders: the original Transformer and T5.

Shape suffixes: B batch, T decoder position, S encoder position, D embed, V
vocabulary.
"""

import dataclasses
from typing import Any
from typing import ClassVar

from flax import nnx
import jax

from t2x.attention import mask as mask_lib
from t2x.layers import block
from t2x.layers import dropout
from t2x.layers import moe
from t2x.layers import stack
from t2x.models import common
from t2x.models import forward
from t2x.models import layer_checks
from t2x.models import loss_terms
from t2x.models import tower as tower_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(common.TransformerConfig):
  """Settings of an encoder-decoder; see `TransformerConfig`.

  Both sides share one token table.

  Attributes:
    num_encoder_layers: number of layers of the encoder; None for that of the
      decoder.
  """

  kind: ClassVar[str] = 'encoder_decoder'
  num_encoder_layers: int | None = None

  def __post_init__(self) -> None:
    super().__post_init__()
    layer_checks.check_causal(self)
    layer_checks.check_bidirectional(self)

  @property
  def depths(self) -> dict[str, int]:
    """See `TransformerConfig`."""
    below = self.num_encoder_layers or self.num_layers
    return {'encoder': below, 'decoder': self.num_layers}


class EncoderDecoder(common.LanguageModel[EncoderDecoderConfig]):
  """An encoder, and a decoder with cross-attention to its output.

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
    self.output = common.output_table(config, rngs=rngs)

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

    Also returns the statistics of the routers of mixtures of experts, by their
    paths in the model.

    Args:
      inputs: target ids, shifted right (B, T).
      encoder_inputs: source ids (B, S).
      encoder_segments: number of each source token's segment (B, S), 0 for
        padding, to which no target attends. None for one segment.
      encoder_positions: positions (B, S); None for 0, 1, 2, ...
      segments: number of each target's segment (B, T); a target attends to the
        targets and the source of its segment, and without `encoder_segments` to
        all of the source. None for one segment.
      positions: positions (B, T); None for 0, 1, 2, ...
      keys_B: dropout keys of the rows; None for no dropout.
      execution: scan or unroll, tensors to recompute, and order of the tokens
        of a row.

    Raises:
      ValueError: if there are more tokens than the model has positions.
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
      inputs: source ids (B, S).
      segments: number of each token's segment (B, S), 0 for padding; None for
        one segment.
      positions: positions (B, S); None for 0, 1, 2, ...
      execution: scan or unroll, and tensors to recompute.
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
    batch: dict[str, Any],
    keys_B: jax.Array | None,
    zigzag: int,
  ) -> block.Context:
    """See `forward.Model`."""
    is_encoder = tower == 'encoder'
    prefix = 'encoder_' if is_encoder else ''
    zigzag = 1 if is_encoder else zigzag
    common.check_length(self.config, batch[f'{prefix}inputs'].shape[1])
    segments = batch.get(f'{prefix}segments')
    keys_B = dropout.fold(keys_B, self.towers.index(tower))
    cross = mask_lib.Mask()
    if not is_encoder:
      source = batch.get('encoder_segments')
      cross = mask_lib.cross_attention(
        batch['inputs'], segments, source, zigzag=zigzag
      )
    return block.Context(
      mask=mask_lib.self_attention(
        segments, causal=not is_encoder, zigzag=zigzag
      ),
      positions_BT=common.positions_of(batch, prefix, zigzag),
      keys_B=keys_B,
      cross_mask=cross,
    )

  def enter(
    self,
    tower: str,
    batch: dict[str, Any],
    context: block.Context,
    x_BTD: jax.Array | None,
  ) -> tuple[jax.Array, jax.Array | None]:
    """See `forward.Model`."""
    positions = context.positions_BT
    assert positions is not None
    if tower == 'encoder':
      return self.embeddings(batch['encoder_inputs'], positions), None
    assert x_BTD is not None  # The decoder follows the encoder.
    encoded_BSD = self.encoder.end(x_BTD)
    return self.embeddings(batch['inputs'], positions), encoded_BSD

  def leave(self, x_BTD: jax.Array, batch: dict[str, Any]) -> jax.Array:
    """See `forward.Model`."""
    del batch
    return self.decoder.end(x_BTD)

  def terms(
    self,
    x_BTD: jax.Array,
    batch: dict[str, jax.Array],
    keys_B: jax.Array | None,
    zigzag: int,
  ) -> loss_terms.Terms:
    """See `forward.Model`."""
    del keys_B, zigzag
    return loss_terms.of_tokens(self.leave(x_BTD, batch), self.head, batch)

  def empty_caches(
    self,
    batch: int,
    capacity: int,
    encoded_BSD: jax.Array,
    dtype: jax.typing.DTypeLike | None = None,
  ) -> Any:
    """Returns caches of the decoder's layers.

    Those of self-attention are empty; the keys and values of cross-attention
    are computed here, once.

    Args:
      batch: number of rows.
      capacity: number of positions of each row.
      encoded_BSD: output of `encode`.
      dtype: dtype of keys and values; None for the model's.
    """
    return self.decoder.empty_caches(batch, capacity, encoded_BSD, dtype)

  def step(
    self,
    inputs: jax.Array,
    index_BT: jax.Array,
    caches: Any,
    cross_mask: mask_lib.Mask,
  ) -> tuple[jax.Array, Any]:
    """Extends cached targets by the tokens at `index_BT`.

    Args:
      inputs: token ids (B, T).
      index_BT: index of each token in its row, which is also its position.
      caches: caches of the decoder's layers.
      cross_mask: mask of the source tokens to which targets attend.

    Returns:
      Features (B, T, D), and the new caches.
    """
    context = block.Context(
      mask=mask_lib.make(causal=True, q_index_BT=index_BT),
      positions_BT=index_BT,
      cross_mask=cross_mask,
    )
    x_BTD = self.embeddings(inputs, index_BT)
    x_BTD, caches, _ = self.decoder(x_BTD, context, caches=caches)
    return self.decoder.end(x_BTD), caches

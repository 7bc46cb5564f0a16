"""Decoder-only Transformers: GPT, PaLM, Llama.

Shape suffixes: B batch, T position, D embed, V vocabulary.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from t2x.attention import mask as mask_lib
from t2x.layers import block
from t2x.layers import moe
from t2x.layers import stack
from t2x.models import common
from t2x.models import forward
from t2x.models import layer_checks
from t2x.models import loss_terms
from t2x.models import segment_memory
from t2x.models import tower as tower_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(common.TransformerConfig):
  """Settings of a decoder; see `TransformerConfig`.

  Attributes:
    ahead: loss weight of each extra head, which predict the second next token,
      the third, and so on (Gloeckle et al., 2024). Each head has one more layer
      on top of the stack; all share the final norm and the table. Plain
      generation does not use them.
  """

  kind: ClassVar[str] = 'decoder'
  ahead: tuple[float, ...] = ()

  @property
  def num_ahead(self) -> int:
    return len(self.ahead)

  def __post_init__(self) -> None:
    super().__post_init__()
    layer_checks.check_causal(self)
    if min(self.ahead, default=1.0) <= 0:
      raise ValueError(f'model.ahead={self.ahead}; its weights are above 0.')
    if self.ahead and isinstance(self.group[-1][1], moe.MoeConfig):
      raise ValueError(
        f'model.ahead={self.ahead}: heads with a layer of experts are not '
        'balanced. Let the last of model.mlp_pattern be kind mlp.'
      )


class Decoder(common.LanguageModel[DecoderConfig]):
  """A causal language model (GPT, PaLM, Llama).

  >>> config = DecoderConfig(vocab_size=100, num_layers=2)
  >>> model = Decoder(config, rngs=nnx.Rngs(0))
  >>> model(jax.numpy.ones((2, 8), int)).shape
  (2, 8, 100)
  """

  towers = ('tower',)

  def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.embeddings = common.Embeddings(config, rngs=rngs)
    self.tower = tower_lib.Tower(
      config, config.num_layers, bidirectional=False, rngs=rngs
    )
    self.ahead = nnx.List([self.tower.layer_on_top(rngs) for _ in config.ahead])
    self.output = common.output_table(config, rngs=rngs)

  def features(
    self,
    inputs: jax.Array,
    *,
    segments: jax.Array | None = None,
    positions: jax.Array | None = None,
    prefix_ends: jax.Array | None = None,
    keys_B: jax.Array | None = None,
    execution: stack.Execution = stack.Execution(),
  ) -> tuple[jax.Array, dict[str, moe.Stats]]:
    """Returns the features (B, T, D) that the head turns into logits.

    Also returns the statistics of the routers of mixtures of experts, by their
    paths in the model.

    Args:
      inputs: token ids (B, T).
      segments: number of each token's segment (B, T), 0 for padding; a token
        attends to its own segment only. None for one segment.
      positions: positions (B, T); None for 0, 1, 2, ...
      prefix_ends: place in the row where the prefix of each token's document
        ends (B, T), to which all its tokens attend; None for no prefix.
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
      'prefix_ends': prefix_ends,
    }
    return forward.features(self, batch, keys_B=keys_B, execution=execution)

  def context(
    self,
    tower: str,
    batch: dict[str, Any],
    keys_B: jax.Array | None,
    zigzag: int,
  ) -> block.Context:
    """See `forward.Model`."""
    del tower
    inputs = batch['inputs']
    common.check_length(self.config, inputs.shape[1])
    segments, prefix_BS = batch.get('segments'), batch.get('prefix_ends')
    mask = mask_lib.self_attention(
      segments, causal=True, zigzag=zigzag, prefix_BS=prefix_BS
    )
    if segment_memory.SEGMENTS in batch:
      mask = segment_memory.mask_of(batch, mask)
    return block.Context(
      mask=mask,
      positions_BT=common.positions_of(batch, zigzag=zigzag),
      keys_B=keys_B,
    )

  def enter(
    self,
    tower: str,
    batch: dict[str, Any],
    context: block.Context,
    x_BTD: jax.Array | None,
  ) -> tuple[jax.Array, jax.Array | None]:
    """See `forward.Model`."""
    del x_BTD
    positions_BT = context.positions_BT
    assert positions_BT is not None
    return self.embeddings(batch['inputs'], positions_BT), None

  def leave(self, x_BTD: jax.Array, batch: dict[str, Any]) -> jax.Array:
    """See `forward.Model`."""
    del batch
    return self.tower.end(x_BTD)

  def terms(
    self,
    x_BTD: jax.Array,
    batch: dict[str, jax.Array],
    keys_B: jax.Array | None,
    zigzag: int,
  ) -> loss_terms.Terms:
    """See `forward`; adds the terms `ahead2`, ... of the extra heads."""
    terms = loss_terms.of_tokens(self.leave(x_BTD, batch), self.head, batch)
    if not self.ahead:
      return terms
    context = self.context('tower', batch, keys_B, zigzag)
    for i, (layer, factor) in enumerate(zip(self.ahead, self.config.ahead)):
      name = f'ahead{i + 2}'
      # Its dropout keys are numbered past all layers of the stack.
      num = self.config.num_layers + 1 + i
      y_BTD, _, _ = self.tower.layer(layer, x_BTD, context, jnp.asarray(num))
      terms[name] = loss_terms.Term(
        x_BTD=self.tower.end(y_BTD),
        head=self.head,
        targets_BT=batch[f'{name}_targets'],
        weights_BT=batch[f'{name}_weights'],
        factor=factor,
      )
    return terms

  def empty_caches(
    self,
    batch: int,
    capacity: int,
    dtype: jax.typing.DTypeLike | None = None,
    slack: int = 0,
  ) -> Any:
    """Returns empty caches of keys and values for all layers.

    Args:
      batch: number of rows.
      capacity: number of positions of each row.
      dtype: dtype of keys and values; None for the model's. int8 keeps a scale
        for each vector.
      slack: number of tokens of a step that may be rejected later.
    """
    return self.tower.empty_caches(batch, capacity, dtype=dtype, slack=slack)

  def empty_pages(
    self, num_pages: int, size: int, dtype: jax.typing.DTypeLike | None = None
  ) -> Any:
    """Returns empty caches in pages that rows share, for all layers.

    Args:
      num_pages: number of pages of each layer.
      size: number of positions in a page, a power of two.
      dtype: dtype of keys and values, as for `empty_caches`.

    Raises:
      ValueError: if a layer keeps a state in place of keys and values.
    """
    return self.tower.empty_pages(num_pages, size, dtype)

  def empty_ahead(
    self, batch: int, capacity: int, slack: int = 0
  ) -> tuple[block.BlockCache, ...]:
    """Returns empty caches of the layers of the extra heads.

    Args:
      batch: number of rows.
      capacity: number of positions of each row.
      slack: number of tokens of a step that may be rejected later.
    """
    dtype = jnp.dtype(self.config.dtype)
    return tuple(
      layer.empty_cache(batch, capacity, dtype, slack=slack)
      for layer in self.ahead
    )

  def step(
    self, inputs: jax.Array, index_BT: jax.Array, caches: Any
  ) -> tuple[jax.Array, Any]:
    """Extends cached sequences by the tokens at `index_BT`.

    Args:
      inputs: token ids (B, T).
      index_BT: index of each token in its row, which is also its position.
      caches: caches of all layers.

    Returns:
      Features (B, T, D), and the new caches.
    """
    x_BTD, caches = self.step_below(inputs, index_BT, caches)
    return self.tower.end(x_BTD), caches

  def step_below(
    self, inputs: jax.Array, index_BT: jax.Array, caches: Any
  ) -> tuple[jax.Array, Any]:
    """As `step`, but before the final norm, as the extra heads read it."""
    context = _step_context(index_BT)
    x_BTD = self.embeddings(inputs, index_BT)
    x_BTD, caches, _ = self.tower(x_BTD, context, caches=caches)
    return x_BTD, caches

  def step_ahead(
    self,
    x_BTD: jax.Array,
    index_BT: jax.Array,
    caches: Sequence[block.BlockCache],
  ) -> tuple[list[jax.Array], tuple[block.BlockCache, ...]]:
    """Extends the extra heads by the tokens at `index_BT`.

    Args:
      x_BTD: features from `step_below`.
      index_BT: index of each token in its row.
      caches: caches of the extra heads' layers.

    Returns:
      Features (B, T, D) of each head, and the new caches.
    """
    context, features, new = _step_context(index_BT), [], []
    for i, (layer, cache) in enumerate(zip(self.ahead, caches)):
      num = jnp.asarray(self.config.num_layers + 1 + i)
      y_BTD, cache, _ = self.tower.layer(layer, x_BTD, context, num, cache)
      features.append(self.tower.end(y_BTD))
      new.append(cache)
    return features, tuple(new)


def _step_context(index_BT: jax.Array) -> block.Context:
  mask = mask_lib.make(causal=True, q_index_BT=index_BT)
  return block.Context(mask=mask, positions_BT=index_BT)

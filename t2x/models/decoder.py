"""Decoder-only Transformers: GPT, PaLM, Llama.

Shape suffixes: B batch, T position, D embed, V vocabulary.
"""

import dataclasses
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from t2x.attention import mask as mask_lib
from t2x.layers import block
from t2x.layers import embed
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
  """See `TransformerConfig`.

  Attributes:
    ahead: weights in the loss of heads that predict the second next token, the
      third, ...: each has one more layer on top of the stack and the final norm
      and table in common (Gloeckle et al., 2024). Generation leaves them out.
  """

  kind: ClassVar[str] = 'decoder'
  ahead: tuple[float, ...] = ()

  @property
  def num_ahead(self) -> int:
    return len(self.ahead)

  def __post_init__(self):
    super().__post_init__()
    layer_checks.check_causal(self)
    if min(self.ahead, default=1.0) <= 0:
      raise ValueError(f'model.ahead={self.ahead}; its weights are above 0.')
    if self.ahead and isinstance(self.group[-1][1], moe.MoeConfig):
      raise ValueError(
        f'model.ahead={self.ahead}: heads with a layer of experts are not '
        'balanced. Let the last of model.mlp_pattern be kind mlp.'
      )


class Decoder(nnx.Module):
  """A causal language model.

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
    segments: jax.Array | None = None,
    positions: jax.Array | None = None,
    prefix_ends: jax.Array | None = None,
    keys_B: jax.Array | None = None,
    execution: stack.Execution = stack.Execution(),
  ) -> tuple[jax.Array, dict[str, moe.Stats]]:
    """Returns the features (B, T, D) that the head turns into logits.

    And what the routers of mixtures of experts did, by their paths.

    Args:
      inputs: token ids (B, T).
      segments: (B, T); a token sees its own segment only. 0 is padding.
      positions: (B, T); default 0, 1, 2, ...
      prefix_ends: (B, T), the place in its row where the prefix of each token's
        document ends, which all its tokens see; default no prefix.
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
      'prefix_ends': prefix_ends,
    }
    return forward.features(self, batch, keys_B=keys_B, execution=execution)

  def context(
    self,
    tower: str,
    batch: forward.Batch,
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
    batch: forward.Batch,
    context: block.Context,
    x_BTD: jax.Array | None,
  ) -> tuple[jax.Array, jax.Array | None]:
    """See `forward.Model`."""
    del x_BTD
    positions_BT = context.positions_BT
    assert positions_BT is not None
    return self.embeddings(batch['inputs'], positions_BT), None

  def leave(self, x_BTD: jax.Array, batch: forward.Batch) -> jax.Array:
    """See `forward.Model`."""
    del batch
    return self.tower.end(x_BTD)

  def terms(self, x_BTD, batch, keys_B, zigzag: int) -> loss_terms.Terms:
    """See `forward`; `ahead2`, ... where a batch has their targets."""
    terms = loss_terms.of_tokens(self.leave(x_BTD, batch), self.head, batch)
    if not self.ahead:
      return terms
    context = self.context('tower', batch, keys_B, zigzag)
    for i, (layer, factor) in enumerate(zip(self.ahead, self.config.ahead)):
      name = f'ahead{i + 2}'
      num = self.config.num_layers + 1 + i  # Of its dropout, past all others.
      y_BTD, _, _ = self.tower.layer(layer, x_BTD, context, jnp.asarray(num))
      terms[name] = loss_terms.Term(
        x_BTD=self.tower.end(y_BTD),
        head=self.head,
        targets_BT=batch[f'{name}_targets'],
        weights_BT=batch[f'{name}_weights'],
        factor=factor,
      )
    return terms

  @property
  def head(self) -> embed.Head:
    table = self.output or self.embeddings.tokens
    return common.make_head(self.config, table.table_VD)

  def empty_caches(self, batch: int, capacity: int, dtype=None, slack: int = 0):
    """Returns caches for `capacity` positions of `batch` rows.

    Args:
      batch: rows.
      capacity: positions of each.
      dtype: of keys and values, by default the model's; int8 keeps a scale for
        each vector.
      slack: tokens of a step that may turn out not to count.
    """
    return self.tower.empty_caches(batch, capacity, dtype=dtype, slack=slack)

  def empty_pages(self, num_pages: int, size: int, dtype=None):
    """Returns caches in pages that rows share.

    Args:
      num_pages: of each layer.
      size: positions of a page, a power of two.
      dtype: as for `empty_caches`.

    Raises:
      ValueError: a layer keeps a state and no keys.
    """
    return self.tower.empty_pages(num_pages, size, dtype)

  def empty_ahead(self, batch: int, capacity: int, slack: int = 0):
    """Returns caches of the heads for further tokens."""
    dtype = jnp.dtype(self.config.dtype)
    return tuple(
      layer.empty_cache(batch, capacity, dtype, slack=slack)
      for layer in self.ahead
    )

  def step(self, inputs: jax.Array, index_BT: jax.Array, caches):
    """Extends cached sequences by the tokens at `index_BT`.

    Args:
      inputs: token ids (B, T).
      index_BT: where each token stands in its row; also its position.
      caches: keys and values of earlier positions.

    Returns:
      Features (B, T, D), and the new caches.
    """
    x_BTD, caches = self.step_below(inputs, index_BT, caches)
    return self.tower.end(x_BTD), caches

  def step_below(self, inputs: jax.Array, index_BT: jax.Array, caches):
    """As `step`, with features that are not normalised: what heads read."""
    context = _step_context(index_BT)
    x_BTD = self.embeddings(inputs, index_BT)
    x_BTD, caches, _ = self.tower(x_BTD, context, caches=caches)
    return x_BTD, caches

  def step_ahead(self, x_BTD: jax.Array, index_BT: jax.Array, caches):
    """Extends the heads for further tokens.

    Args:
      x_BTD: what `step_below` returned.
      index_BT: where each token stands in its row.
      caches: of `empty_ahead`.

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

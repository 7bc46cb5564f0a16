"""Encoder-only Transformers: BERT, RoBERTa, XLNet.

Shape suffixes: B batch, T position, D embed, V vocabulary.
"""

import dataclasses
from typing import Any
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from t2x import field_checks
from t2x.attention import mask as mask_lib
from t2x.layers import attention_config
from t2x.layers import block
from t2x.layers import dropout
from t2x.layers import embed
from t2x.layers import mlp
from t2x.layers import moe
from t2x.layers import norm
from t2x.layers import param
from t2x.layers import position
from t2x.layers import stack
from t2x.models import common
from t2x.models import encoder_inputs
from t2x.models import forward
from t2x.models import layer_checks
from t2x.models import loss_terms
from t2x.models import pooled_heads
from t2x.models import tower as tower_lib
from t2x.models import two_stream as two_stream_lib
from t2x.parallel import sharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(common.TransformerConfig):
  """Settings of an encoder; see `TransformerConfig`.

  Most of BERT's additions are off by default.

  Attributes:
    num_token_types: number of token type (sentence A / B) embeddings; 0 for
      none.
    embed_norm: whether the embeddings are normalised.
    pooler: whether there is a dense layer with tanh on the first token.
    next_sentence: whether there is a two-class head on the pooler's output.
    classes: number of classes of each further head on the pooler's output; 1
      for a head that predicts a value.
    token_classes: number of classes of a head on each token's output; 0 for no
      such head.
    masked_head: whether the output head has a transform (dense, activation,
      norm) and a bias, as in BERT.
    output_bias: whether logits have a bias; a `masked_head` always has one.
    two_stream: whether there is the query stream of XLNet, for permutation
      language modelling; see `objectives.permutation`.
    query_layers: number of layers of a second stack, whose tokens are queries
      for tokens that the first stack does not see, and which attends to the
      first stack's output; see `MaskedLM.dropped`. 0 for no second stack.
  """

  kind: ClassVar[str] = 'encoder'
  num_token_types: int = 0
  embed_norm: bool = False
  pooler: bool = False
  next_sentence: bool = False
  classes: tuple[int, ...] = ()
  token_classes: int = 0
  masked_head: bool = True
  output_bias: bool = False
  two_stream: bool = False
  query_layers: int = 0

  @property
  def head_classes(self) -> tuple[int, ...]:
    return self.classes

  @property
  def is_two_stream(self) -> bool:
    return self.two_stream

  @property
  def num_query_layers(self) -> int:
    return self.query_layers

  def __post_init__(self) -> None:
    super().__post_init__()
    layer_checks.check_bidirectional(self)
    field_checks.least(self, 'model.', query_layers=0)
    if self.query_layers:
      layer_checks.check_query_layers(self)
    if self.two_stream:
      layer_checks.check_two_stream(self)
    field_checks.least(self, 'model.', token_classes=0)
    if min(self.classes, default=1) < 1:
      raise ValueError(
        f'model.classes={self.classes}: a head has a class or more.'
      )
    if self.classes and not self.pooler:
      raise ValueError(
        f'model.classes={self.classes} needs model.pooler=true: its heads read '
        "the pooler's output."
      )
    if self.next_sentence and not self.pooler:
      raise ValueError(
        'model.next_sentence=true needs model.pooler=true: its head reads '
        "the pooler's output."
      )

  @property
  def depths(self) -> dict[str, int]:
    """See `TransformerConfig`."""
    queries = {'queries': self.query_layers} if self.query_layers else {}
    return super().depths | queries


class Encoder(common.LanguageModel[EncoderConfig]):
  """A bidirectional encoder (BERT, RoBERTa, XLNet).

  >>> model = Encoder(EncoderConfig(vocab_size=99), rngs=nnx.Rngs(0))
  >>> model(jax.numpy.ones((2, 8), int)).shape
  (2, 8, 99)
  """

  def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
    self.config = config
    D = config.embed_dim
    init = param.initializer(config.matrix_init, fan_in=D, fan_out=D)
    self.embeddings = common.Embeddings(config, rngs=rngs)
    self.token_types = (
      param.param(
        rngs,
        (config.num_token_types, D),
        (None, 'embed'),
        param.make_initializer(
          common.table_distribution(config.init), config.init.std
        ),
      )
      if config.num_token_types
      else None
    )
    make_norm = lambda: norm.Norm(config.norm, D, rngs=rngs)
    self.embed_norm = make_norm() if config.embed_norm else None
    self.tower = tower_lib.Tower(
      config, config.num_layers, bidirectional=True, rngs=rngs
    )
    self.queries = (
      tower_lib.Tower(
        config, config.query_layers, bidirectional=True, cross=True, rngs=rngs
      )
      if config.query_layers
      else None
    )
    self.towers = tuple(config.depths)
    self.pooler = (
      pooled_heads.DenseLayer(D, D, init, rngs=rngs) if config.pooler else None
    )
    self.next_sentence = (
      pooled_heads.DenseLayer(D, 2, init, rngs=rngs)
      if config.next_sentence
      else None
    )
    self.classes = nnx.List(
      [
        pooled_heads.DenseLayer(D, num, init, rngs=rngs)
        for num in config.classes
      ]
    )
    self.output = common.output_table(config, rngs=rngs)
    masked = config.masked_head
    rows = embed.padded(config.vocab_size, config.vocab_multiple)
    self.transform = (
      pooled_heads.DenseLayer(D, D, init, rngs=rngs) if masked else None
    )
    self.transform_norm = make_norm() if masked else None
    self.output_bias_V = (
      param.param(rngs, (rows,), ('vocab',), param.zeros)
      if masked or config.output_bias
      else None
    )
    drawn = param.make_initializer('normal', config.init.std)
    self.query_D = (
      param.param(rngs, (D,), (None,), drawn) if config.two_stream else None
    )
    num = config.token_classes
    self.token_classes = (
      pooled_heads.DenseLayer(D, num, init, rngs=rngs) if num else None
    )

  def encode(self, inputs: jax.Array, **kwargs: Any) -> jax.Array:
    """Returns the encoded sequence (B, T, D); takes `features`' arguments."""
    return self.tower.end(self._run(inputs, ('tower',), **kwargs)[0])

  def _run(
    self,
    inputs: jax.Array,
    towers: tuple[str, ...] | None = None,
    *,
    keys_B: jax.Array | None = None,
    execution: stack.Execution = stack.Execution(),
    **more: jax.Array | None,
  ) -> tuple[jax.Array, dict[str, moe.Stats]]:
    """Checks the inputs and calls `forward.run`.

    Args:
      inputs: token ids (B, T).
      towers: names of the first towers to run; None for all.
      keys_B: dropout keys of the rows; None for no dropout.
      execution: scan or unroll, and tensors to recompute.
      **more: other arrays of the batch, by name.

    Raises:
      ValueError: if arrays do not fit together, see `encoder_inputs.check`, or
        there are more tokens than the model has positions.
    """
    more = {name: array for name, array in more.items() if array is not None}
    encoder_inputs.check(self.config, more, towers is None)
    batch = {'inputs': inputs, **more}
    return forward.run(self, batch, towers, keys_B=keys_B, execution=execution)

  def context(
    self,
    tower: str,
    batch: dict[str, Any],
    keys_B: jax.Array | None,
    zigzag: int,
  ) -> block.Context:
    """See `forward.Model`."""
    common.check_length(self.config, batch['inputs'].shape[1])
    if two_stream_lib.are_in(batch):
      return two_stream_lib.context(batch, keys_B, self._asks_for_places)
    prefix = 'query_' if tower == 'queries' else ''
    segments, places = batch.get(f'{prefix}segments'), batch.get('places')
    layer_checks.check_documents(self.config, segments)
    mask = mask_lib.self_attention(segments, causal=False)
    cross = mask_lib.Mask()
    if places is not None:  # Some tokens of the rows are left out.
      cross = mask_lib.Mask(
        q_segments_BT=segments, k_segments_BS=batch['segments']
      )
      if self._asks_for_places:
        index_BT = batch[f'{prefix}places']
        mask = dataclasses.replace(
          mask, q_index_BT=index_BT, k_index_BS=index_BT
        )
    if tower == 'queries':
      keys_B = dropout.fold(keys_B, _QUERIES)
    return block.Context(
      mask=mask,
      positions_BT=common.positions_of(batch, prefix),
      types_BT=batch.get('token_types'),
      keys_B=keys_B,
      cross_mask=cross,
    )

  @property
  def _asks_for_places(self) -> bool:
    """Whether attention scores depend on the places of tokens in their row."""
    encoding = self.config.position
    all_dense = all(
      isinstance(k, attention_config.Dense) for k in self.config.kinds
    )
    has_bias = encoding is not None and position.is_bias(encoding)
    return not all_dense or has_bias

  def enter(
    self,
    tower: str,
    batch: dict[str, Any],
    context: block.Context,
    x_BTD: jax.Array | None,
  ) -> tuple[jax.Array, jax.Array | None]:
    """See `forward.Model`."""
    encoded_BSD = None
    if tower == 'queries':
      assert x_BTD is not None  # The queries follow the first stack.
      encoded_BSD, batch = self.tower.end(x_BTD), _query_batch(batch)
    inputs, positions_BT = batch['inputs'], context.positions_BT
    assert positions_BT is not None
    T = inputs.shape[1]
    input_BTD = self.embeddings(inputs, positions_BT[:, :T])
    if two_stream_lib.are_in(batch):
      assert self.query_D is not None, 'model.two_stream is off'
      query_positions_BM = positions_BT[:, T:]
      shape = (*query_positions_BM.shape, input_BTD.shape[-1])
      query_BMD = jnp.broadcast_to(
        self.query_D[...].astype(input_BTD.dtype), shape
      )
      query_BMD = self.embeddings.placed(query_BMD, query_positions_BM)
      input_BTD = jnp.concatenate([input_BTD, query_BMD], axis=1)
    if self.token_types is not None:
      types = batch.get('token_types')
      types = jnp.zeros_like(inputs) if types is None else types
      table = self.token_types[...].astype(input_BTD.dtype)
      table = sharding.constrain(table, None, 'act_embed')
      input_BTD = input_BTD + param.look_up(table, types)
    if self.embed_norm is not None:
      input_BTD = self.embed_norm(input_BTD)
    return input_BTD, encoded_BSD

  def leave(self, x_BTD: jax.Array, batch: dict[str, Any]) -> jax.Array:
    """See `forward.Model`."""
    if self.queries is not None:
      return self._transformed(self.queries.end(x_BTD))
    if two_stream_lib.are_in(batch):
      x_BTD = two_stream_lib.query_stream(x_BTD, batch)
    x_BTD = self.tower.end(x_BTD)
    positions_BM = batch.get('target_positions')
    if positions_BM is not None:
      # Mapped over rows, so that each device reads its own rows.
      x_BTD = jax.vmap(lambda x_TD, at_M: x_TD[at_M])(x_BTD, positions_BM)
    return self._transformed(x_BTD)

  def terms(
    self,
    x_BTD: jax.Array,
    batch: dict[str, jax.Array],
    keys_B: jax.Array | None,
    zigzag: int,
  ) -> loss_terms.Terms:
    """See `forward`; adds the terms of the pooled heads with targets."""
    del keys_B, zigzag
    terms = loss_terms.of_tokens(self.leave(x_BTD, batch), self.head, batch)
    return terms | pooled_heads.terms(self, x_BTD, batch)

  def features(
    self,
    inputs: jax.Array,
    *,
    target_positions: jax.Array | None = None,
    **kwargs: Any,
  ) -> tuple[jax.Array, dict[str, moe.Stats]]:
    """Returns the features (B, T, D) that the masked head reads.

    Also returns the statistics of the routers of mixtures of experts, by their
    paths in the model.

    Args:
      inputs: token ids (B, T).
      target_positions: places of the tokens (B, M) whose features (B, M, D) are
        returned; None for all tokens.
      **kwargs: other arrays of the batch, and options. segments (B, T), number
        of each token's segment, 0 for padding; a token attends to its own
        segment only. positions (B, T), by default 0, 1, 2, ... token_types
        (B, T), sentence A or B, by default 0. keys_B, dropout keys of the rows;
        None for no dropout. execution, scan or unroll, and tensors to
        recompute. With `query_layers` also the arrays of `MaskedLM.dropped`:
        places (B, T), and for M queries, whose features are returned,
        query_inputs, query_positions, query_segments and query_places (B, M).
        With `two_stream` the arrays of `objectives.permutation`: ranks (B, T),
        and for M queries query_ranks, query_positions, query_segments and
        query_places (B, M).

    Raises:
      ValueError: if there are more tokens than the model has positions, or an
        array would be ignored, or is missing.
    """
    kwargs['target_positions'] = target_positions
    x_BTD, stats = self._run(inputs, **kwargs)
    batch = {'inputs': inputs, **kwargs}
    return self.leave(x_BTD, batch), stats

  @jax.named_scope('head')
  def _transformed(self, x_BTD: jax.Array) -> jax.Array:
    """Applies the transform of the masked head, if the model has it."""
    if self.transform is None or self.transform_norm is None:
      return x_BTD
    act = self.config.mlp.activation
    x_BTD = self.transform_norm(mlp.activation(act, self.transform(x_BTD)))
    return sharding.constrain(x_BTD, 'batch', 'length', 'act_embed')

  def pool(self, encoded_BTD: jax.Array) -> jax.Array:
    """Returns tanh(dense(first token)), (B, D) (Devlin et al., 2019)."""
    assert self.pooler is not None, 'model.pooler is off'
    return jnp.tanh(self.pooler(encoded_BTD[:, :1])[:, 0])


_QUERIES = 2**20  # Folded into the second stack's dropout keys.


def _query_batch(batch: dict[str, Any]) -> dict[str, Any]:
  """Returns the inputs of the second stack, by plain names."""
  types = batch.get('token_types')
  assert types is None, 'rows of dropped tokens have no types'
  return {'inputs': batch['query_inputs']}

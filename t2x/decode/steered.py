"""A decoder whose texts others steer: towards a style, a topic, away from one.

What they make is a decoder again, which drawing, beam search and (Experts) the
engine take.

Shape suffixes: B batch, T position, P prefix, V vocabulary.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from t2x.decode import prefill
from t2x.decode import prompts as prompts_lib
from t2x.layers import block
from t2x.layers import position as position_lib
from t2x.models import decoder


class Experts(decoder.Decoder):
  """Adds what an expert would rather say than an anti-expert (DExperts).

  Logits are z + strength (z_expert - z_anti) (Liu et al., 2021, equation 1).
  Without an anti-expert the decoder itself stands in its place.

  >>> config = decoder.DecoderConfig(vocab_size=9, num_layers=1, embed_dim=8)
  >>> make = lambda seed: decoder.Decoder(config, rngs=nnx.Rngs(seed))
  >>> Experts(make(0), make(1), make(2))(jnp.ones((1, 3), int)).shape
  (1, 3, 9)
  """

  towers = ()

  def __init__(
    self,
    base: decoder.Decoder,
    expert: decoder.Decoder,
    anti_expert: decoder.Decoder | None = None,
    *,
    strength: float = 2.0,
  ):
    """Joins decoders of one vocabulary.

    Args:
      base: whose texts are steered.
      expert: writes as is wanted.
      anti_expert: writes as is not wanted.
      strength: 0 leaves the base as it is.

    Raises:
      ValueError: one cannot generate, or has another vocabulary.
    """
    others = [expert] if anti_expert is None else [expert, anti_expert]
    self.models = nnx.List([base, *others])
    self.config = _joint(self.models)
    self.strength = strength

  def __call__(self, inputs: jax.Array, **kwargs) -> jax.Array:
    """Returns float32 logits (B, T, V); arguments as of `Decoder`."""
    return self._combined([model(inputs, **kwargs) for model in self.models])

  def empty_caches(self, batch: int, capacity: int, dtype=None, slack: int = 0):
    """See `Decoder.empty_caches`."""
    return _joined(
      [m.empty_caches(batch, capacity, dtype, slack) for m in self.models]
    )

  def empty_pages(self, num_pages: int, size: int, dtype=None):
    """See `Decoder.empty_pages`."""
    return _joined(
      [model.empty_pages(num_pages, size, dtype) for model in self.models]
    )

  def step(self, inputs: jax.Array, index_BT: jax.Array, caches):
    """See `Decoder.step`; the features are those of all."""
    parts = zip(self.models, _apart(caches, self.models), strict=True)
    found = [model.step(inputs, index_BT, own) for model, own in parts]
    return tuple(x for x, _ in found), _joined([own for _, own in found])

  @property
  def head(self) -> Callable[[Any], jax.Array]:
    """Maps what `step` gives to logits."""
    heads = [model.head for model in self.models]
    return lambda features: self._combined(
      [head(x) for head, x in zip(heads, features, strict=True)]
    )

  def _combined(self, logits: Sequence[jax.Array]) -> jax.Array:
    base, expert, *anti = logits
    return base + self.strength * (expert - (anti[0] if anti else base))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Seen:
  """What the classes said of each row's text so far.

  Attributes:
    sum_B: log-likelihood under the wanted class less that under the other.
    count_B: tokens that it is of.
    next_BV: the same of each token that may be next; 0 where none was asked.
  """

  sum_B: jax.Array
  count_B: jax.Array
  next_BV: jax.Array


class Gedi(decoder.Decoder):
  """Weighs tokens by how likely they make a wanted class (GeDi).

  Two class-conditional decoders, or one with two prefixes, tell how likely the
  text is of the wanted class, by Bayes' rule; log-probabilities of the next
  token are log P(v) + strength log P(class | text v) (Krause et al., 2021,
  equations 4 and 5). Only new tokens count: those of the prompt, which are read
  several at a time, do not.
  """

  towers = ()
  least_chunk = 2  # A single token counts as written.

  def __init__(
    self,
    base: decoder.Decoder,
    wanted: decoder.Decoder,
    other: decoder.Decoder,
    *,
    wanted_prefix: Sequence[int] = (),
    other_prefix: Sequence[int] = (),
    strength: float = 30.0,
    sharpness: float = 1.0,
  ):
    """Joins decoders of one vocabulary.

    Args:
      base: whose texts are steered.
      wanted: writes texts of the wanted class.
      other: writes others; with prefixes it may be the same decoder.
      wanted_prefix: tokens that make `wanted` write them, before each text.
      other_prefix: the same for `other`, of the same length.
      strength: omega; 0 leaves the base as it is.
      sharpness: alpha, by which log-likelihoods a token are multiplied.

    Raises:
      ValueError: one cannot generate, or has another vocabulary; prefixes of
        different lengths.
    """
    if len(wanted_prefix) != len(other_prefix):
      raise ValueError(
        f'wanted_prefix has {len(wanted_prefix)} tokens and other_prefix '
        f'{len(other_prefix)}; they must be of one length.'
      )
    self.models = nnx.List([base, wanted, other])
    self.config = _joint(self.models, len(wanted_prefix))
    self._num_prefix = len(wanted_prefix)
    self._prefixes = tuple(wanted_prefix), tuple(other_prefix)
    self.strength, self.sharpness = strength, sharpness

  def __call__(self, inputs: jax.Array, **kwargs) -> jax.Array:
    """Raises ValueError: what counts is known only step by step."""
    raise ValueError(
      'Gedi weighs tokens as they are written: call it through generate.'
    )

  def empty_caches(self, batch: int, capacity: int, dtype=None, slack: int = 0):
    """See `Decoder.empty_caches`; those of the classes hold their prefixes."""
    base, *classes = self.models
    P = self._num_prefix
    found = [base.empty_caches(batch, capacity, dtype, slack)]
    for model, prefix in zip(classes, self._prefixes):
      caches = model.empty_caches(batch, capacity + P, dtype, slack)
      if P:
        prefix_BP = jnp.broadcast_to(jnp.array([prefix]), (batch, P))
        caches = model.step(prefix_BP, jnp.arange(P)[None], caches)[1]
      found.append(caches)
    group, rest = _joined(found)
    V = self.config.vocab_size
    zeros_B = jnp.zeros((batch,), jnp.float32)
    seen = _Seen(
      sum_B=zeros_B, count_B=zeros_B, next_BV=jnp.zeros((batch, V), jnp.float32)
    )
    return group, (*rest, block.BlockCache(own=seen))

  def empty_pages(self, num_pages: int, size: int, dtype=None):
    """Raises ValueError: a row's class is known from its own text alone."""
    raise ValueError(
      'Gedi keeps a state for each row, which pages cannot hold: it is not '
      'served. Experts are.'
    )

  def step(self, inputs: jax.Array, index_BT: jax.Array, caches):
    """See `Decoder.step`."""
    group, (*rest, last) = caches
    seen, P = last.own, self._num_prefix
    (base, *classes), (own, *others) = (
      self.models,
      _apart((group, tuple(rest)), self.models),
    )
    x_BTD, own = base.step(inputs, index_BT, own)
    log_probs, new = [], [own]
    for model, cache in zip(classes, others):
      # What is written at the capacity is lost, there and here.
      y_BTD, cache = model.step(inputs, index_BT + P, cache)
      logits_BV = model.head(y_BTD[:, -1:])[:, 0]
      log_probs.append(jax.nn.log_softmax(logits_BV, axis=-1))
      new.append(cache)
    next_BV = log_probs[0] - log_probs[1]
    if inputs.shape[1] > 1:  # Of a prompt.
      seen = dataclasses.replace(seen, next_BV=jnp.zeros_like(next_BV))
    else:
      read_B = jnp.take_along_axis(seen.next_BV, inputs, axis=1)[:, 0]
      was_asked_B = (seen.next_BV != 0).any(-1)
      seen = _Seen(
        sum_B=seen.sum_B + read_B,
        count_B=seen.count_B + was_asked_B,
        next_BV=next_BV,
      )
    group, rest = _joined(new)
    caches = group, (*rest, block.BlockCache(own=seen))
    return (x_BTD, seen), caches

  @property
  def head(self) -> Callable[[Any], jax.Array]:
    """Maps what `step` gives to log-probabilities."""
    base = self.models[0].head

    def head(features):
      x_BTD, seen = features
      mean_BV = (seen.sum_B[:, None] + seen.next_BV) / (
        seen.count_B[:, None] + 1
      )
      weights_BV = jax.nn.log_sigmoid(self.sharpness * mean_BV)
      logits_BTV = jax.nn.log_softmax(base(x_BTD), axis=-1)
      return logits_BTV + self.strength * weights_BV[:, None]

    return head


def _joint(
  models: Sequence[decoder.Decoder], num_prefix: int = 0
) -> decoder.DecoderConfig:
  """Returns the config by which a base and its steerers are called.

  It has no more positions than any of them, less those of a prefix.

  Raises:
    ValueError: they cannot write together.
  """
  base, *others = models
  for model in models:
    prefill.check_model(model)
    if not isinstance(model, decoder.Decoder) or not model.towers:
      raise ValueError(
        f'{type(model).__name__} can neither be steered nor steer: plain '
        'decoders can.'
      )
  sizes = [model.config.vocab_size for model in models]
  if len(set(sizes)) > 1:
    raise ValueError(
      f'The models have vocabularies of {sizes} tokens; they must have one '
      'tokenizer in common.'
    )
  least = prompts_lib.limit(*(model.config.max_length for model in others))
  most = base.config.max_length
  if least is None or (most is not None and most <= least - num_prefix):
    return base.config
  position = position_lib.Learned(max_length=least - num_prefix)
  return dataclasses.replace(base.config, position=position)


def _joined(parts: Sequence[Any]) -> Any:
  """Returns the caches of several decoders as those of one."""
  groups, rests = zip(*parts)
  return tuple(c for g in groups for c in g), tuple(c for r in rests for c in r)


def _apart(caches: Any, models: Sequence[decoder.Decoder]) -> list[Any]:
  """The inverse of `_joined`."""
  group, rest = caches
  result = []
  for model in models:
    own = model.tower.layers
    sizes = len(own.group), len(own.remainder)
    result.append((group[: sizes[0]], rest[: sizes[1]]))
    group, rest = group[sizes[0] :], rest[sizes[1] :]
  return result

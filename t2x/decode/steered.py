"""Steered decoders: one decoder's output is steered by others.

For instance towards a style or a topic, or away from one. The result is again a
decoder, for sampling, beam search and (`Experts`) the engine.

Shape suffixes: B batch, T position, P prefix, V vocabulary.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from t2x.decode import decode_loop
from t2x.decode import prefill
from t2x.decode import prompts as prompts_lib
from t2x.layers import block
from t2x.layers import position as position_lib
from t2x.models import decoder


class Experts(decoder.Decoder):
  """Adds the difference between an expert and an anti-expert (DExperts).

  Logits are z + strength (z_expert - z_anti) (Liu et al., 2021, equation 1).
  Without an anti-expert, the base decoder takes its place.

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
      base: decoder whose output is steered.
      expert: decoder of the wanted style.
      anti_expert: decoder of the unwanted style; None for the base.
      strength: factor of the difference; 0 leaves the base as it is.

    Raises:
      ValueError: a decoder cannot generate, or has another vocabulary.
    """
    others = [expert] if anti_expert is None else [expert, anti_expert]
    self.models = nnx.List([base, *others])
    self.config = _joint_config(self.models)
    self.strength = strength

  def __call__(self, inputs: jax.Array, **kwargs: Any) -> jax.Array:
    """Returns float32 logits (B, T, V); arguments as of `Decoder`."""
    return self._combined([model(inputs, **kwargs) for model in self.models])

  def empty_caches(
    self,
    batch: int,
    capacity: int,
    dtype: jax.typing.DTypeLike | None = None,
    slack: int = 0,
  ) -> decode_loop.Caches:
    """See `Decoder.empty_caches`."""
    return _joined(
      [m.empty_caches(batch, capacity, dtype, slack) for m in self.models]
    )

  def empty_pages(
    self, num_pages: int, size: int, dtype: jax.typing.DTypeLike | None = None
  ) -> decode_loop.Caches:
    """See `Decoder.empty_pages`."""
    return _joined(
      [model.empty_pages(num_pages, size, dtype) for model in self.models]
    )

  def step(
    self, inputs: jax.Array, index_BT: jax.Array, caches: decode_loop.Caches
  ) -> tuple[Any, decode_loop.Caches]:
    """See `Decoder.step`; the features are a tuple, those of each decoder."""
    parts = zip(self.models, _apart(caches, self.models), strict=True)
    steps = [model.step(inputs, index_BT, cache) for model, cache in parts]
    return tuple(x for x, _ in steps), _joined([cache for _, cache in steps])

  @property
  def head(self) -> Any:
    """A function from the features of `step` to logits."""
    heads = [model.head for model in self.models]
    return lambda features: self._combined(
      [head(x) for head, x in zip(heads, features, strict=True)]
    )

  def _combined(self, logits: Sequence[jax.Array]) -> jax.Array:
    base, expert, *anti = logits
    return base + self.strength * (expert - (anti[0] if anti else base))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Evidence:
  """Evidence for the wanted class in each row's new tokens so far.

  Attributes:
    sum_B: log-likelihood under the wanted class minus that under the other.
    count_B: number of tokens in `sum_B`.
    next_BV: difference of log-likelihoods of each possible next token; 0 if it
      was not computed.
  """

  sum_B: jax.Array
  count_B: jax.Array
  next_BV: jax.Array


class Gedi(decoder.Decoder):
  """Weighs tokens by the probability of a wanted class (GeDi).

  Two class-conditional decoders, or one with two prefixes, give the probability
  of the wanted class by Bayes' rule. The log-probability of next token v is
  log P(v) + strength log P(class | sequence, v), not normalized (Krause et al.,
  2021, equations 4 and 5). Only new tokens count as evidence, not those of the
  prompt, which run several at a time.
  """

  towers = ()
  least_chunk = 2  # A step of a single token is a decode step.

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
      base: decoder whose output is steered.
      wanted: decoder of the wanted class.
      other: decoder of the other class; with prefixes it may be the same one.
      wanted_prefix: tokens before each sequence that condition `wanted` on its
        class.
      other_prefix: tokens that condition `other`, as many.
      strength: omega, the factor of the class's log-probability; 0 leaves the
        base as it is.
      sharpness: alpha, the factor of the mean log-likelihood difference.

    Raises:
      ValueError: a decoder cannot generate, or has another vocabulary; the
        prefixes have different lengths.
    """
    if len(wanted_prefix) != len(other_prefix):
      raise ValueError(
        f'wanted_prefix has {len(wanted_prefix)} tokens and other_prefix '
        f'{len(other_prefix)}; they must be of one length.'
      )
    self.models = nnx.List([base, wanted, other])
    self.config = _joint_config(self.models, len(wanted_prefix))
    self._num_prefix = len(wanted_prefix)
    self._prefixes = tuple(wanted_prefix), tuple(other_prefix)
    self.strength, self.sharpness = strength, sharpness

  def __call__(self, inputs: jax.Array, **kwargs: Any) -> jax.Array:
    """Raises ValueError: the evidence is only known step by step."""
    raise ValueError(
      'Gedi weighs tokens as they are written: call it through generate.'
    )

  def empty_caches(
    self,
    batch: int,
    capacity: int,
    dtype: jax.typing.DTypeLike | None = None,
    slack: int = 0,
  ) -> decode_loop.Caches:
    """See `Decoder.empty_caches`; those of the classes contain the prefixes."""
    base, *classes = self.models
    P = self._num_prefix
    parts = [base.empty_caches(batch, capacity, dtype, slack)]
    for model, prefix in zip(classes, self._prefixes):
      caches = model.empty_caches(batch, capacity + P, dtype, slack)
      if P:
        prefix_BP = jnp.broadcast_to(jnp.array([prefix]), (batch, P))
        caches = model.step(prefix_BP, jnp.arange(P)[None], caches)[1]
      parts.append(caches)
    group, rest = _joined(parts)
    V = self.config.vocab_size
    zeros_B = jnp.zeros((batch,), jnp.float32)
    evidence = _Evidence(
      sum_B=zeros_B, count_B=zeros_B, next_BV=jnp.zeros((batch, V), jnp.float32)
    )
    return group, (*rest, block.BlockCache(own=evidence))

  def empty_pages(
    self, num_pages: int, size: int, dtype: jax.typing.DTypeLike | None = None
  ) -> decode_loop.Caches:
    """Raises ValueError: pages cannot hold the evidence of a row."""
    raise ValueError(
      'Gedi keeps a state for each row, which pages cannot hold: it is not '
      'served. Experts are.'
    )

  def step(
    self, inputs: jax.Array, index_BT: jax.Array, caches: decode_loop.Caches
  ) -> tuple[Any, decode_loop.Caches]:
    """See `Decoder.step`."""
    group, (*rest, last) = caches
    evidence, P = last.own, self._num_prefix
    base, *classes = self.models
    base_cache, *class_caches = _apart((group, tuple(rest)), self.models)
    x_BTD, base_cache = base.step(inputs, index_BT, base_cache)
    log_probs, new = [], [base_cache]
    for model, cache in zip(classes, class_caches):
      # Writes at the capacity are dropped, with the prefix or without.
      y_BTD, cache = model.step(inputs, index_BT + P, cache)
      logits_BV = model.head(y_BTD[:, -1:])[:, 0]
      log_probs.append(jax.nn.log_softmax(logits_BV, axis=-1))
      new.append(cache)
    next_BV = log_probs[0] - log_probs[1]
    if inputs.shape[1] > 1:  # Prefill.
      evidence = dataclasses.replace(evidence, next_BV=jnp.zeros_like(next_BV))
    else:
      latest_B = jnp.take_along_axis(evidence.next_BV, inputs, axis=1)[:, 0]
      was_computed_B = (evidence.next_BV != 0).any(-1)
      evidence = _Evidence(
        sum_B=evidence.sum_B + latest_B,
        count_B=evidence.count_B + was_computed_B,
        next_BV=next_BV,
      )
    group, rest = _joined(new)
    caches = group, (*rest, block.BlockCache(own=evidence))
    return (x_BTD, evidence), caches

  @property
  def head(self) -> Any:
    """A function from the features of `step` to log-probabilities."""
    base = self.models[0].head

    def head(features: tuple[jax.Array, _Evidence]) -> jax.Array:
      x_BTD, evidence = features
      mean_BV = (evidence.sum_B[:, None] + evidence.next_BV) / (
        evidence.count_B[:, None] + 1
      )
      weights_BV = jax.nn.log_sigmoid(self.sharpness * mean_BV)
      logits_BTV = jax.nn.log_softmax(base(x_BTD), axis=-1)
      return logits_BTV + self.strength * weights_BV[:, None]

    return head


def _joint_config(
  models: Sequence[decoder.Decoder], num_prefix: int = 0
) -> decoder.DecoderConfig:
  """Returns the config of a steered decoder.

  It is that of the base, with no more positions than any other decoder has
  after its prefix.

  Args:
    models: the base and the decoders that steer it.
    num_prefix: number of tokens in the prefixes of the latter.

  Raises:
    ValueError: a model cannot generate, or the vocabularies differ.
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


def _joined(parts: Sequence[decode_loop.Caches]) -> decode_loop.Caches:
  """Returns the caches of several decoders as those of one."""
  groups, rests = zip(*parts)
  return tuple(c for g in groups for c in g), tuple(c for r in rests for c in r)


def _apart(
  caches: decode_loop.Caches, models: Sequence[decoder.Decoder]
) -> list[decode_loop.Caches]:
  """Inverts `_joined`."""
  group, rest = caches
  result = []
  for model in models:
    layers = model.tower.layers
    sizes = len(layers.group), len(layers.remainder)
    result.append((group[: sizes[0]], rest[: sizes[1]]))
    group, rest = group[sizes[0] :], rest[sizes[1] :]
  return result

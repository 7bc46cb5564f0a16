"""Generation that is steered by other runs; see `t2x.decode.steered`."""

from collections.abc import Sequence
import dataclasses
import math

from t2x.decode import steered
from t2x.inference import trained_model


def experts(
  trained: trained_model.Trained,
  expert: trained_model.Trained,
  anti_expert: trained_model.Trained | None = None,
  *,
  strength: float = 2.0,
) -> trained_model.Trained:
  """Returns a run steered towards an expert and away from an anti-expert.

  This is DExperts (Liu et al., 2021). The expert is, for instance, the same
  run trained further on wanted texts, the anti-expert on unwanted ones.

  Args:
    trained: run to steer, a decoder.
    expert: run with the same tokenizer to steer towards.
    anti_expert: run with the same tokenizer to steer away from; None takes
      `trained`.
    strength: factor of the difference between the experts' logits; 0 has no
      effect.

  Raises:
    ValueError: tokenizers or vocabularies differ, or a model is not a decoder.
  """
  others = [expert] if anti_expert is None else [expert, anti_expert]
  _check(trained, others)
  _check_strength(strength)
  writers = [one.decoding_model for one in (trained, *others)]
  model = steered.Experts(*writers, strength=strength)
  return dataclasses.replace(trained, model=model)


def gedi(
  trained: trained_model.Trained,
  wanted: trained_model.Trained,
  other: trained_model.Trained,
  *,
  wanted_prefix: str = '',
  other_prefix: str = '',
  strength: float = 30.0,
) -> trained_model.Trained:
  """Returns a run steered towards a class by class-conditional runs (GeDi).

  See Krause et al., 2021, "GeDi: Generative Discriminator Guided Sequence
  Generation".

  Args:
    trained: run to steer, a decoder.
    wanted: run with the same tokenizer, trained on texts of the wanted class.
    other: run trained on texts of other classes; with prefixes it may be the
      same as `wanted`.
    wanted_prefix: text that stood before the texts of the wanted class in
      training.
    other_prefix: text that stood before the other texts, of as many tokens.
    strength: exponent of the probability of the wanted class (omega in the
      paper); 0 has no effect.

  Raises:
    ValueError: `experts` would raise it, or the prefixes differ in length.
  """
  _check(trained, [wanted, other])
  _check_strength(strength)
  encode = trained.tokenizer.encode
  model = steered.Gedi(
    *(one.decoding_model for one in (trained, wanted, other)),
    wanted_prefix=encode(wanted_prefix),
    other_prefix=encode(other_prefix),
    strength=strength,
  )
  return dataclasses.replace(trained, model=model)


def _check_strength(strength: float) -> None:
  if not math.isfinite(strength):
    raise ValueError(f'strength={strength}; it is a number, 0 for no effect.')


def _check(
  trained: trained_model.Trained, others: Sequence[trained_model.Trained]
) -> None:
  fingerprints = {one.tokenizer.fingerprint for one in (trained, *others)}
  if len(fingerprints) > 1:
    raise ValueError(
      'The runs have different tokenizers, so that their tokens mean different '
      'things. Train those that steer with the tokenizer of the one that they '
      'steer.'
    )

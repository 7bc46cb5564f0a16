"""Runs whose texts other runs steer; see `t2x.decode.steered`."""

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
  """Returns a run that writes rather as an expert than as an anti-expert.

  Such as runs that went on from the same one with texts that are wanted, and
  with texts that are not (Liu et al., 2021).

  Args:
    trained: whose texts are steered.
    expert: of the same tokenizer.
    anti_expert: of the same tokenizer; None takes `trained`.
    strength: 0 leaves the texts as they are.

  Raises:
    ValueError: tokenizers or vocabularies differ, or one is no decoder.
  """
  others = [expert] if anti_expert is None else [expert, anti_expert]
  _check(trained, others)
  _check_strength(strength)
  writers = [one.writer for one in (trained, *others)]
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
  """Returns a run that writes what class-conditional runs hold to be wanted.

  Args:
    trained: whose texts are steered.
    wanted: a run on texts of the wanted class.
    other: a run on others; with prefixes it may be the same.
    wanted_prefix: text that stood before those of the wanted class.
    other_prefix: the same of the others, of as many tokens.
    strength: 0 leaves the texts as they are.

  Raises:
    ValueError: as `experts`; prefixes of different lengths.
  """
  _check(trained, [wanted, other])
  _check_strength(strength)
  encode = trained.tokenizer.encode
  model = steered.Gedi(
    *(one.writer for one in (trained, wanted, other)),
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
  prints = [one.tokenizer.fingerprint for one in (trained, *others)]
  if len(set(prints)) > 1:
    raise ValueError(
      'The runs have different tokenizers, so that their tokens mean different '
      'things. Train those that steer with the tokenizer of the one that they '
      'steer.'
    )

"""Settings of a beam search."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamConfig:
  """Settings of a beam search: how many beams, their scores, when it ends.

  Attributes:
    num_beams: beams of each prompt, over all groups.
    num_groups: groups of beams that are kept different from each other.
    diversity: amount subtracted from a token's log-probability for each beam of
      an earlier group that takes the token in the same step (Vijayakumar et
      al., 2018).
    length_penalty: the alpha of `length_form`; above 0 favours longer
      sequences.
    length_form: `power` divides a sum of log-probabilities by length ** alpha
      (Hugging Face), `gnmt` by ((5 + length) / 6) ** alpha (Wu et al., 2016).
    early_stopping: `heuristic` ends when the best running beam, at its present
      length, scores below the worst hypothesis that is kept; `first` ends when
      enough beams have ended; `never` ends when no running beam could still
      become better.
  """

  num_beams: int = 4
  num_groups: int = 1
  diversity: float = 0.0
  length_penalty: float = 1.0
  length_form: Literal['power', 'gnmt'] = 'power'
  early_stopping: Literal['heuristic', 'first', 'never'] = 'heuristic'

  def __post_init__(self) -> None:
    if self.num_beams < 1 or self.num_groups < 1:
      raise ValueError(
        f'beams.num_beams={self.num_beams}, num_groups={self.num_groups}; both '
        'are 1 or more.'
      )
    if self.num_beams % self.num_groups:
      raise ValueError(
        f'beams.num_beams={self.num_beams} are not {self.num_groups} groups of '
        'as many beams. Let num_groups divide num_beams.'
      )
    if self.num_groups > 1 and self.diversity <= 0:
      raise ValueError(
        f'beams.diversity={self.diversity} with num_groups={self.num_groups}: '
        'the groups would all find the same. Set it above 0, such as 0.5.'
      )
    for name, values in (
      ('length_form', ('power', 'gnmt')),
      ('early_stopping', ('heuristic', 'first', 'never')),
    ):
      if getattr(self, name) not in values:
        raise ValueError(
          f'beams.{name}={getattr(self, name)!r}; it is one of '
          f'{", ".join(values)}.'
        )

  @property
  def group_size(self) -> int:
    """Number of beams in each group."""
    return self.num_beams // self.num_groups

  def divisor(self, length: jax.Array) -> jax.Array:
    """Returns the divisor of the score of a sequence of `length` new tokens."""
    length = length.astype(jnp.float32)
    if self.length_form == 'gnmt':
      length = (5 + length) / 6
    return length**self.length_penalty

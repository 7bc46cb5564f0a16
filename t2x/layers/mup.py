"""Maximal update parametrisation: rates that hold at every width and depth.

Initialisation, multipliers and learning rates depend on the width such that
activations, and how much a step changes them, do not. The rate that is best for
a narrow model is then best for a wide one (Yang et al., 2022, "Tensor Programs
V"). With a base depth this extends to the number of layers (Dey et al., 2025,
"CompleteP"; with power 1/2 it is the depth-aware form of Yang et al., 2023,
"Tensor Programs VI").

With m = width / base width, l = layers / base layers, a = depth power, Adam:

| | initial std | multiplier | learning rate |
|---|---|---|---|
| embeddings | 1 | 1 | 1 |
| matrices of layers | 1 / sqrt(m) | 1 | l^(a - 1) / m |
| norms and biases of layers | 1 | 1 | l^(a - 1) |
| logits | 1 | 1 / m | 1 |
| output of a residual branch | | l^-a | |
| scores of heads of size H | | sqrt(base H) / H | |

At the base sizes every factor is 1, so that nothing changes.
"""

import dataclasses
from typing import ClassVar

from t2x import field_checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mup:
  """The sizes at which rates and initialisation are set.

  All widths of a layer (of the residual stream, of its feed-forward layer, of
  its heads together) are taken to grow in proportion to `embed_dim`.

  Attributes:
    base_width: embed_dim at which every factor is 1.
    base_depth: number of layers of a tower at which every factor is 1; None
      leaves depth out.
    depth_power: power a of the depth in a residual branch's factor, from 0.5
      to 1.
    base_head_dim: size of a head at which scores are scaled by 1 / sqrt(H);
      None scales so at every size.
  """

  kind: ClassVar[str] = 'mup'
  base_width: int = 256
  base_depth: int | None = None
  depth_power: float = 1.0
  base_head_dim: int | None = None

  def __post_init__(self) -> None:
    field_checks.least(
      self, 'model.mup.', base_width=1, base_depth=1, base_head_dim=1
    )
    if not 0.5 <= self.depth_power <= 1.0:
      raise ValueError(
        f'model.mup.depth_power={self.depth_power}; it is in [0.5, 1].'
      )

  def width(self, embed_dim: int) -> float:
    """Returns m, the width as a multiple of the base."""
    return embed_dim / self.base_width

  def branch_factor(self, num_layers: int) -> float:
    """Returns the factor of the output of a residual branch."""
    if self.base_depth is None:
      return 1.0
    return (num_layers / self.base_depth) ** -self.depth_power

  def depth_rate(self, num_layers: int) -> float:
    """Returns the factor of the learning rate of all parameters of layers."""
    if self.base_depth is None:
      return 1.0
    return (num_layers / self.base_depth) ** (self.depth_power - 1.0)

  def score_scale(self, head_dim: int) -> float | None:
    """Returns the factor of attention scores; None leaves it to the layer."""
    if self.base_head_dim is None:
      return None
    return self.base_head_dim**0.5 / head_dim

"""What one device exchanges with others, as a value."""

import dataclasses

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
  """Bytes of a step.

  Attributes:
    part: what for.
    kind: as the program asks for it; a compiler may turn a reduce-scatter or
      an all-gather into permutes beside the product.
    axes: mesh axes along which they move.
    bytes: in a step, on one device.
  """

  part: str
  kind: str
  axes: Axes
  bytes: float

"""The estimate of one kind of communication in a step."""

import dataclasses

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
  """Bytes that one device exchanges in a step, for one purpose.

  Attributes:
    part: purpose, such as 'gathers of weights'.
    kind: kind of collective that the program asks for, one of
      `collectives.KINDS`. A compiler may turn a reduce-scatter or an all-gather
      into permutes that run beside the product.
    axes: mesh axes along which the data moves.
    bytes: bytes in a step on one device, as `Collective.bytes` counts them.
  """

  part: str
  kind: str
  axes: Axes
  bytes: float

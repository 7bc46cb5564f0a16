"""Bytes that one device exchanges in a step, from shapes alone.

Counted as `collectives` counts: what an all-gather returns, and what the others
are given. Weights are gathered over `fsdp` for the forward and the backward
pass, and their gradients reduced; gradients of what devices have each are
summed over the axes that split tokens; activations are summed over `tensor`.
What `train.remat` makes again is sent again, too.
"""

from t2x.cost_model import activation_messages
from t2x.cost_model import device_share
from t2x.cost_model import message
from t2x.cost_model import weight_messages


def messages(local: device_share.Local) -> list[message.Message]:
  """Returns all that a device exchanges, but for scalars."""
  found = [*weight_messages.of_layers(local), *weight_messages.of_tables(local)]
  for layer in local.layers:
    found += activation_messages.of_layer(local, layer)
  if local.plan is not None:
    found += weight_messages.of_stages(local)
  return [m for m in found if m.bytes and local.size(m.axes) > 1]


def total(
  found: list[message.Message], kind: str | None = None, axis: str | None = None
) -> float:
  """Returns the bytes of all, of a kind, or along an axis."""
  return sum(
    m.bytes
    for m in found
    if kind in (None, m.kind) and (axis is None or axis in m.axes)
  )

"""Estimates the bytes that one device exchanges in a step, from shapes alone.

Bytes are those of `hlo.collectives`: of the result of an all-gather, and of the
operands of the other kinds. Weights are gathered over `fsdp` for the forward
and the backward pass, and their gradients reduced. Gradients of weights that
are copied are summed over the axes that split tokens. Activations are summed
over `tensor`. Products that `train.remat` recomputes are exchanged again, too.
"""

from t2x.cost_model import activation_messages
from t2x.cost_model import device_share
from t2x.cost_model import message
from t2x.cost_model import weight_messages


def messages(local: device_share.DeviceShare) -> list[message.Message]:
  """Returns everything that a device exchanges, except scalars."""
  listed = [
    *weight_messages.of_layers(local),
    *weight_messages.of_tables(local),
  ]
  for layer in local.layers:
    listed += activation_messages.of_layer(local, layer)
  if local.plan is not None:
    listed += weight_messages.of_stages(local)
  return [m for m in listed if m.bytes and local.size(m.axes) > 1]


def total(
  listed: list[message.Message],
  kind: str | None = None,
  axis: str | None = None,
) -> float:
  """Returns the bytes of the messages of a kind, or along a mesh axis.

  Args:
    listed: the messages to choose from.
    kind: one of `collectives.KINDS`; None counts all.
    axis: a mesh axis along which they move data; None counts all.
  """
  return sum(
    m.bytes
    for m in listed
    if kind in (None, m.kind) and (axis is None or axis in m.axes)
  )

"""What a train step costs on each device, from shapes: nothing is compiled.

found = estimate.step(config, num_devices=256)
print(estimate_text.text(found))

Arguments are exact; FLOPs are those that the program executes, rematerialised
ones and blocks of attention kernels included; bytes are counted as
`plan/collectives` counts them; memory is what is there at the fullest moment.
BUILD_NOTES.md says how far compiled programs were from it. It is for TPUs: how
arrays are laid out, which attention runs, what the compiler makes of a
reduce-scatter.
"""

from collections.abc import Mapping
import dataclasses
import functools
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh
import numpy as np

from t2x.config import abstract_state
from t2x.config import consistency
from t2x.config import experiment
from t2x.config import partitioning
from t2x.cost_model import device_share
from t2x.cost_model import executed_flops as executed_flops_lib
from t2x.cost_model import message as message_lib
from t2x.cost_model import messages as messages_lib
from t2x.cost_model import peak_memory
from t2x.cost_model import tpu_tiles
from t2x.cost_model import weight_shards
from t2x.data import input_pipeline as data_pipeline
from t2x.parallel import mesh as mesh_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
  """One step, on a device.

  Attributes:
    sizes: of the mesh axes.
    arguments: bytes by name: parameters, optimizer state, moving average,
      batch; as a TPU lays them out.
    moments: what else is there, at each of the moments that can be fullest.
    flops: of matrix products, by name, of the stage that has the most.
    mean_flops: of all stages.
    messages: what is exchanged, by the stage that sends the most.
  """

  sizes: Mapping[str, int]
  arguments: dict[str, int]
  moments: tuple[peak_memory.Moment, ...]
  flops: dict[str, float]
  mean_flops: float
  messages: tuple[message_lib.Message, ...]

  @property
  def argument_bytes(self) -> int:
    return sum(self.arguments.values())

  @property
  def fullest(self) -> peak_memory.Moment:
    return max(self.moments, key=lambda moment: moment.bytes)

  @property
  def peak_bytes(self) -> float:
    """Arguments, and what is there beside them at the fullest moment."""
    return self.argument_bytes + self.fullest.bytes

  @property
  def temporary_bytes(self) -> float:
    """What the compiler reserves, holes of its heap included."""
    return max(map(peak_memory.reserved, self.moments))

  @property
  def executed_flops(self) -> float:
    return sum(self.flops.values())

  def sent_bytes(
    self, kind: str | None = None, axis: str | None = None
  ) -> float:
    """Returns the bytes of all messages, of a kind, or along an axis."""
    return messages_lib.total([*self.messages], kind, axis)


def step(
  config: experiment.Experiment,
  num_devices: int | None = None,
  *,
  sizes: Mapping[str, int] | None = None,
) -> Estimate:
  """Returns the estimate of one update on a full batch.

  Args:
    config: the experiment; its mesh is used.
    num_devices: all of them; by default what the mesh's sizes multiply to.
    sizes: of the mesh axes, instead of those of `config.mesh`.

  Raises:
    ShardingError: a layout that cannot be.
    ValueError: parts that do not fit each other or the devices.
  """
  if sizes is not None:
    mesh = dataclasses.replace(config.mesh, **sizes)
    config = dataclasses.replace(config, mesh=mesh)
  given = [getattr(config.mesh, axis) for axis in mesh_lib.AXES]
  if num_devices is None:
    if -1 in given:
      raise ValueError(
        f'mesh={config.mesh}: one axis takes the devices that remain (-1), and '
        'their number is not known. Give num_devices, or each axis its size.'
      )
    num_devices = math.prod(given)
  consistency.check(config, num_devices)
  whole = mesh_lib.sizes(config.mesh, num_devices)
  state, batch_sharding = _shapes(config, whole)
  plan = partitioning.of(config, whole).pipeline
  local = device_share.Local(
    config=config,
    sizes=whole,
    weights=weight_shards.weights_of(state.model, config.rules, whole, plan),
    plan=plan,
  )
  stages = local.of_stages()
  flops = [executed_flops_lib.flops(stage) for stage, _ in stages]
  total = lambda parts: sum(parts.values())
  num_stages = sum(num for _, num in stages)
  messages = [messages_lib.messages(stage) for stage, _ in stages]
  return Estimate(
    sizes=whole,
    arguments=_arguments(config, state, batch_sharding),
    moments=tuple(peak_memory.moments(local)),
    flops=max(flops, key=total),
    mean_flops=sum(n * total(f) for f, (_, n) in zip(flops, stages))
    / num_stages,
    messages=tuple(max(messages, key=messages_lib.total)),
  )


def _shapes(config: experiment.Experiment, sizes: Mapping[str, int]):
  """As `program.shapes_of`; the model is traced once for all layouts."""
  mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
  train = config.train
  shapes = _state_shapes(
    config.model, config.optim, train.ema_decay, train.trainable
  )
  shardings, batch_sharding = abstract_state.shardings_of(config, shapes, mesh)
  place = lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d)
  return jax.tree.map(place, shapes, shardings), batch_sharding


@functools.lru_cache(maxsize=8)
def _state_shapes(model, optim, ema_decay, trainable) -> Any:
  train = experiment.TrainConfig(ema_decay=ema_decay, trainable=trainable)
  return abstract_state.state_shapes(
    experiment.Experiment(model=model, optim=optim, train=train)
  )


def _arguments(config, state, batch_sharding) -> dict[str, int]:
  """Bytes by name, as a TPU lays arrays out."""
  groups = {
    'parameters': state.model,
    'optimizer state': state.opt_state,
    'moving average': state.ema,
    'counters': (state.step, state.num_skipped),
  }
  found = {
    name: sum(map(_bytes, jax.tree.leaves(tree)))
    for name, tree in groups.items()
  }
  found['batch'] = sum(
    tpu_tiles.padded(batch_sharding.shard_shape(shape), dtype.itemsize)
    for shape, dtype in data_pipeline.batch_spec(config.data).values()
  )
  if config.train.offload == 'optimizer':  # On the hosts.
    del found['optimizer state']
  return {name: size for name, size in found.items() if size}


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
  assert leaf.sharding is not None
  shape = leaf.sharding.shard_shape(leaf.shape)
  return tpu_tiles.padded(shape, np.dtype(leaf.dtype).itemsize)

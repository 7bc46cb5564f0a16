"""Estimates the cost of a train step on each device, without compiling.

result = estimate.step(config, num_devices=256)
print(estimate_text.text(result))

The bytes of arguments are exact. FLOPs are those that the program executes,
recomputed products and blocks of attention kernels included. Bytes exchanged
are those of `hlo.collectives`. Memory is its peak. docs/measured-devices.md
says how far compiled programs were from the estimate. It is for TPUs: their
array layouts, their attention kernel, and their compiler's way to run a
reduce-scatter.
"""

from collections.abc import Mapping
import dataclasses
import functools
import math

import jax
from jax.sharding import AbstractMesh
from jax.sharding import NamedSharding
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
from t2x.models import model as model_lib
from t2x.parallel import mesh as mesh_lib
from t2x.training import optim as optim_lib
from t2x.training import train_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
  """Cost of one step on one device.

  Attributes:
    sizes: number of devices along each mesh axis.
    arguments: bytes of the step's arguments by name (parameters, optimizer
      state, moving average, counters, batch), as a TPU lays them out.
    phases: temporary memory at each point of the step that can be the peak.
    flops: FLOPs of matrix products, by name, on a device of the stage that has
      most of them.
    mean_flops: FLOPs of matrix products on a device, the mean over stages.
    messages: bytes exchanged, on a device of the stage that sends the most.
  """

  sizes: Mapping[str, int]
  arguments: dict[str, int]
  phases: tuple[peak_memory.Phase, ...]
  flops: dict[str, float]
  mean_flops: float
  messages: tuple[message_lib.Message, ...]

  @property
  def argument_bytes(self) -> int:
    """Bytes of all arguments."""
    return sum(self.arguments.values())

  @property
  def peak_phase(self) -> peak_memory.Phase:
    """The point of the step with the most temporary memory."""
    return max(self.phases, key=lambda phase: phase.bytes)

  @property
  def peak_bytes(self) -> float:
    """Bytes of the arguments and of the temporary memory at its peak."""
    return self.argument_bytes + self.peak_phase.bytes

  @property
  def temporary_bytes(self) -> float:
    """Bytes that the compiler reserves, fragmentation of its heap included."""
    return max(map(peak_memory.reserved, self.phases))

  @property
  def executed_flops(self) -> float:
    """FLOPs of all matrix products, on a device of the busiest stage."""
    return sum(self.flops.values())

  def sent_bytes(
    self, kind: str | None = None, axis: str | None = None
  ) -> float:
    """Returns the bytes of the messages of a kind, or along a mesh axis.

    Args:
      kind: one of `collectives.KINDS`; None counts all.
      axis: a mesh axis along which they move data; None counts all.
    """
    return messages_lib.total([*self.messages], kind, axis)


def step(
  config: experiment.Experiment,
  num_devices: int | None = None,
  *,
  sizes: Mapping[str, int] | None = None,
) -> Estimate:
  """Returns the estimate of one update on a full batch.

  Args:
    config: the experiment, whose mesh is used.
    num_devices: number of all devices; None for the product of the mesh's axis
      sizes.
    sizes: sizes of mesh axes that replace those of `config.mesh`.

  Raises:
    ShardingError: the layout is impossible.
    ValueError: parts of the config do not fit each other or the devices.
  """
  if sizes is not None:
    mesh = dataclasses.replace(config.mesh, **sizes)
    config = dataclasses.replace(config, mesh=mesh)
  axis_sizes = [getattr(config.mesh, axis) for axis in mesh_lib.AXES]
  if num_devices is None:
    if -1 in axis_sizes:
      raise ValueError(
        f'mesh={config.mesh}: one axis takes the devices that remain (-1), and '
        'their number is not known. Give num_devices, or each axis its size.'
      )
    num_devices = math.prod(axis_sizes)
  consistency.check(config, num_devices)
  whole = mesh_lib.sizes(config.mesh, num_devices)
  state, batch_sharding = _shapes(config, whole)
  plan = partitioning.of(config, whole).pipeline
  local = device_share.DeviceShare(
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
    phases=tuple(peak_memory.phases(local)),
    flops=max(flops, key=total),
    mean_flops=sum(n * total(f) for f, (_, n) in zip(flops, stages))
    / num_stages,
    messages=tuple(max(messages, key=messages_lib.total)),
  )


def _shapes(
  config: experiment.Experiment, sizes: Mapping[str, int]
) -> tuple[train_state.TrainState, NamedSharding]:
  """Does what `abstract_state.shapes_of` does, but traces each model once."""
  mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
  train = config.train
  shapes = _state_shapes(
    config.model, config.optim, train.ema_decay, train.trainable
  )
  shardings, batch_sharding = abstract_state.shardings_of(config, shapes, mesh)
  place = lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d)
  return jax.tree.map(place, shapes, shardings), batch_sharding


@functools.lru_cache(maxsize=8)
def _state_shapes(
  model: model_lib.ModelConfig,
  optim: optim_lib.OptimConfig,
  ema_decay: float | None,
  trainable: str,
) -> train_state.TrainState:
  train = experiment.TrainConfig(ema_decay=ema_decay, trainable=trainable)
  return abstract_state.state_shapes(
    experiment.Experiment(model=model, optim=optim, train=train)
  )


def _arguments(
  config: experiment.Experiment,
  state: train_state.TrainState,
  batch_sharding: NamedSharding,
) -> dict[str, int]:
  """Returns the bytes of a step's arguments by name, as a TPU lays them out."""
  groups = {
    'parameters': state.model,
    'optimizer state': state.opt_state,
    'moving average': state.ema,
    'counters': (state.step, state.num_skipped),
  }
  sizes = {
    name: sum(map(_bytes, jax.tree.leaves(tree)))
    for name, tree in groups.items()
  }
  sizes['batch'] = sum(
    tpu_tiles.padded(batch_sharding.shard_shape(shape), dtype.itemsize)
    for shape, dtype in data_pipeline.batch_spec(config.data).values()
  )
  if config.train.offload == 'optimizer':  # On the hosts.
    del sizes['optimizer state']
  return {name: size for name, size in sizes.items() if size}


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
  assert leaf.sharding is not None
  shape = leaf.sharding.shard_shape(leaf.shape)
  return tpu_tiles.padded(shape, np.dtype(leaf.dtype).itemsize)

"""The cost of a run on devices that need not be here, from their compiler.

result = plan.make(config, 'v5e:4x4')
result.fits, result.memory.peak, result.roofline.seconds

The train step of the run is compiled for the topology and never run. All
figures are those of one device. They are as exact as the compiler's; only the
roofline is a model.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import re
import time
from typing import Any

import jax

from t2x.compilation import lowering
from t2x.config import consistency
from t2x.config import experiment
from t2x.config import partitioning
from t2x.cost_model import roofline as roofline_lib
from t2x.data import input_pipeline as data_pipeline
from t2x.hardware import machines
from t2x.hardware import target_devices
from t2x.hlo import collectives as collectives_lib
from t2x.hlo import divergence
from t2x.hlo import kernel_flops
from t2x.hlo import matmul_flops
from t2x.hlo import memory_traffic
from t2x.hlo import stage_trips
from t2x.models import flops as flops_lib
from t2x.models import model as model_lib
from t2x.parallel import mesh as mesh_lib
from t2x.planning import memory as memory_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flops:
  """FLOPs of one step on one device; with a pipeline, of the busiest stage.

  Attributes:
    model: FLOPs of the model, `flops.train_flops`, over the number of devices.
    executed_matmul: FLOPs of the program's matrix products outside kernels.
    kernels: FLOPs of the products in kernels, of attention and of experts.
  """

  model: float
  executed_matmul: float
  kernels: float

  @property
  def executed(self) -> float:
    """FLOPs that the program executes, in kernels and outside."""
    return self.executed_matmul + self.kernels

  @property
  def ratio(self) -> float:
    """Executed FLOPs over the model's; above 1 some are computed again."""
    return self.executed / self.model


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectiveTotal:
  """Collectives of one kind along the same mesh axes, in one step.

  Attributes:
    kind: one of `collectives.KINDS`.
    axes: mesh axes along which the data moves.
    times: number of times that such a collective runs.
    bytes: bytes on one device, of all of them.
    hidden: bytes of those that run beside matrix products.
    exposed: least seconds that the others take; 0 if no bandwidth is known.
    between: True if they go from one slice to others, False if they stay within
      one; None if all devices share a program.
  """

  kind: str
  axes: tuple[str, ...]
  times: float
  bytes: float
  hidden: float
  exposed: float
  between: bool | None = None

  @property
  def along(self) -> str:
    """The axes as text, and whether they go between slices."""
    return ','.join(self.axes) + (' between slices' if self.between else '')


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageCost:
  """Cost of a step on a device of one stage of a pipeline.

  Attributes:
    executed: FLOPs of matrix products, in kernels and outside.
    sent: bytes of collectives.
  """

  executed: float
  sent: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """The cost of a run on a topology. Figures that are not known are None.

  Attributes:
    topology: name of the topology, such as 'v5e:4x4'.
    num_slices: number of slices of that topology.
    sizes: number of devices along each mesh axis.
    chip: a name of `machines.CHIPS`; None for simulated devices.
    memory: memory of one device.
    compile_seconds: seconds that lowering and compiling took.
    refused: message of the compiler if it refused the program as too large.
    flops: FLOPs of one step on one device.
    collectives: collectives of one step on one device, the most bytes first.
    roofline: lower bound on the time of a step; None for simulated devices.
    peak: peak FLOP/s of a device in the dtype of the activations.
    formula: text that shows how the model's FLOPs are counted.
    schedule: summary of the pipeline's schedule; '' without a pipeline.
    stages: cost of each stage of the pipeline; () without one. Collectives are
      those of the stage that sends most, other figures those of the stage that
      computes most.
  """

  topology: str
  num_slices: int
  sizes: dict[str, int]
  chip: str | None
  memory: memory_lib.DeviceMemory
  compile_seconds: float
  refused: str | None = None
  flops: Flops
  collectives: tuple[CollectiveTotal, ...] = ()
  roofline: roofline_lib.Roofline | None = None
  peak: float | None = None
  formula: str = ''
  schedule: str = ''
  stages: tuple[StageCost, ...] = ()

  @property
  def fits(self) -> bool | None:
    """Whether a device's memory is enough; None if its size is unknown."""
    if self.refused is not None:
      return False
    return self.memory.fits

  @property
  def mfu_limit(self) -> float | None:
    """Model FLOPs utilisation if a step took only the time of the roofline."""
    if self.roofline is None or self.peak is None:
      return None
    return self.flops.model / (self.roofline.seconds * self.peak)


def make(
  config: experiment.Experiment, topology: str, num_slices: int = 1
) -> Plan:
  """Compiles the train step of a run for a topology and returns its cost.

  Args:
    config: the experiment.
    topology: name of a topology, as for `target_devices.devices`.
    num_slices: number of slices of that topology.

  Raises:
    ValueError: there is no such topology or no compiler for it, or the layout
      is impossible.
  """
  devices = target_devices.devices(topology, num_slices)
  consistency.check(config, len(devices))
  mesh = mesh_lib.make(config.mesh, devices)
  chip = machines.chip_of(devices[0].device_kind)
  peak = flops_lib.peak_flops(devices[0].device_kind, config.model.dtype)
  common: dict[str, Any] = {
    'topology': topology,
    'num_slices': num_slices,
    'sizes': dict(mesh.shape),
    'chip': chip,
    'peak': peak,
    'formula': flops_lib.formula(*_arguments(config), peak=peak),
  }
  start = time.perf_counter()
  lowered = lowering.lower_step(config, mesh)
  try:
    compiled = target_devices.compile(lowered)
  except jax.errors.JaxRuntimeError as error:
    # The device's memory is exhausted, and not the chip's memory for a kernel.
    if not re.search('RESOURCE_EXHAUSTED.*hbm', str(error), re.I | re.S):
      raise
    return Plan(
      **common,
      compile_seconds=time.perf_counter() - start,
      refused=_sentence(error),
      memory=memory_lib.of_refused(config, mesh, chip, str(error)),
      flops=_flops(config, mesh.size, [(0, 0)]),
    )
  seconds = time.perf_counter() - start
  return _of_compiled(
    config, mesh, compiled, {**common, 'compile_seconds': seconds}
  )


def _of_compiled(
  config: experiment.Experiment,
  mesh: jax.sharding.Mesh,
  compiled: jax.stages.Compiled,
  common: Mapping[str, Any],
) -> Plan:
  """Returns the plan of a compiled train step.

  Args:
    config: the experiment.
    mesh: the mesh that it was compiled for.
    compiled: the train step.
    common: attributes of the plan that are known before it is compiled.
  """
  text = compiled.as_text()
  assert text is not None, 'a compiled program has a text'
  stages = partitioning.of(config, mesh.shape).pipeline
  trips: Sequence[Any] = [None]
  bubble = 0.0
  if stages is not None:
    if not config.pipeline.uniform:
      divergence.check(text)
    numbers = range(stages.table.num_stages)
    trips = [stage_trips.trips(stages, number) for number in numbers]
    if not config.pipeline.uniform:  # Uniform stages compute without a pause.
      bubble = stages.table.simulate().bubble
  of_stages = [collectives_lib.collectives(text, mesh, t) for t in trips]
  collectives = max(of_stages, key=collectives_lib.total)
  executed = [
    (matmul_flops.matrix_flops(text, t), kernel_flops.kernel_flops(text, t))
    for t in trips
  ]
  flops = _flops(config, mesh.size, executed)
  mean = sum(map(sum, executed)) / len(executed)
  roofline, times = None, [0.0] * len(collectives)
  if common['chip'] is not None and common['peak'] is not None:
    chip = machines.CHIPS[common['chip']]
    times = roofline_lib.exchange_seconds(collectives, mesh, chip)
    roofline = roofline_lib.Roofline(
      compute=flops.executed / common['peak'],
      memory=max(memory_traffic.memory_bytes(text, t) for t in trips)
      / chip.bandwidth,
      network=sum(times),
      exposed=sum(t for c, t in zip(collectives, times) if not c.hidden),
      idle=roofline_lib.idle(flops.executed, mean, bubble),
    )
  return Plan(
    **common,
    memory=memory_lib.of_compiled(
      config, mesh, common['chip'], compiled.memory_analysis(), text
    ),
    flops=flops,
    collectives=_sent(collectives, times),
    roofline=roofline,
    schedule=stages.summary() if stages else '',
    stages=tuple(
      StageCost(executed=sum(parts), sent=collectives_lib.total(sent))
      for parts, sent in zip(executed, of_stages, strict=True)
      if stages
    ),
  )


def _arguments(
  config: experiment.Experiment,
) -> tuple[model_lib.ModelConfig, flops_lib.BatchShape]:
  """Returns the arguments of `flops.train_flops` for a full batch."""
  spec = data_pipeline.batch_spec(config.data)
  shapes = {name: shape for name, (shape, _) in spec.items()}
  return flops_lib.arguments(config.model, shapes)


def _flops(
  config: experiment.Experiment,
  num_devices: int,
  executed: Sequence[tuple[int, int]],
) -> Flops:
  """Returns the FLOPs of the stage that computes most.

  Args:
    config: the experiment.
    num_devices: number of devices of the mesh.
    executed: FLOPs of each stage, outside kernels and in kernels.
  """
  products, kernels = max(executed, key=sum)
  model = flops_lib.train_flops(*_arguments(config)) / num_devices
  return Flops(model=model, executed_matmul=products, kernels=kernels)


def _sent(
  collectives: Sequence[collectives_lib.Collective], times: Sequence[float]
) -> tuple[CollectiveTotal, ...]:
  """Sums collectives of one kind along the same axes.

  Args:
    collectives: the collectives of a step.
    times: least seconds of each.
  """
  sums: dict[tuple, list[float]] = {}
  for c, seconds in zip(collectives, times, strict=True):
    row = sums.setdefault((c.kind, c.axes, c.between), [0.0] * 4)
    size = float(c.bytes * c.times)
    once = float(c.times), size, size * c.hidden, seconds * (not c.hidden)
    row[:] = map(sum, zip(row, once))
  rows = [
    CollectiveTotal(
      kind=kind,
      axes=axes,
      times=times,
      bytes=size,
      hidden=hidden,
      exposed=exposed,
      between=between,
    )
    for (kind, axes, between), (times, size, hidden, exposed) in sums.items()
  ]
  return tuple(sorted(rows, key=lambda row: -row.bytes))


def _sentence(error: Exception) -> str:
  """Returns the first line of a compiler's message, without its status code."""
  first, *_ = str(error).splitlines()
  return re.sub(r'^[A-Z_]+: ', '', first)

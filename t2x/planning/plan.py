"""What a run would cost on devices that are not here, by their own compiler.

plan = planning.make(config, 'v5e:4x4')
plan.fits, plan.memory.peak, plan.roofline.seconds

The train step is that of the run, compiled for the topology and never run. All
figures are of one device, and exact as far as the compiler's are, but for the
roofline, which is a model.
"""

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
from t2x.parallel import mesh as mesh_lib
from t2x.planning import memory as memory_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flops:
  """Of one step, on one device: of a pipeline the stage with the most.

  Attributes:
    model: the model's own, `flops.train_flops`, divided by the devices.
    executed_matmul: of the program's products, but for those in kernels.
    kernels: of products in kernels, of attention and of experts' groups.
  """

  model: float
  executed_matmul: float
  kernels: float

  @property
  def executed(self) -> float:
    return self.executed_matmul + self.kernels

  @property
  def ratio(self) -> float:
    """Executed over the model's: what is computed more than once."""
    return self.executed / self.model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sent:
  """Exchanges of one kind along the same mesh axes.

  Attributes:
    kind: of `collectives.KINDS`.
    axes: mesh axes along which data moves.
    times: how often one runs.
    bytes: on one device, in all.
    hidden: bytes of those beside which products are scheduled.
    exposed: seconds that the others take at least; 0 where no speed is known.
    between: whether they go from one slice to others; None where all devices
      share a program.
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
    """The axes, in words."""
    return ','.join(self.axes) + (' between slices' if self.between else '')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """What a device of one stage of a pipeline does in a step.

  Attributes:
    executed: FLOPs, of products and in kernels.
    sent: bytes.
  """

  executed: float
  sent: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """The answer; what the compiler could not tell is None.

  Attributes:
    topology: as it was named.
    num_slices: of it.
    sizes: of every mesh axis.
    chip: a name of `machines.CHIPS`, or None for simulated devices.
    memory: of one device.
    compile_seconds: of lowering and compiling.
    refused: what the compiler said of a program that it did not take.
    flops: of one step.
    sent: exchanges, the most bytes first.
    roofline: the least time of a step.
    peak: FLOP/s of a device.
    formula: of the model's FLOPs.
    schedule: of the pipeline, in a line; '' without one.
    stages: of the pipeline; none without one. Other figures are of the stage
      that computes most, exchanges of the one that sends most.
  """

  topology: str
  num_slices: int
  sizes: dict[str, int]
  chip: str | None
  memory: memory_lib.Memory
  compile_seconds: float
  refused: str | None = None
  flops: Flops
  sent: tuple[Sent, ...] = ()
  roofline: roofline_lib.Roofline | None = None
  peak: float | None = None
  formula: str = ''
  schedule: str = ''
  stages: tuple[Stage, ...] = ()

  @property
  def fits(self) -> bool | None:
    """Whether a device's memory is enough; None where its size is unknown."""
    if self.refused is not None:
      return False
    return self.memory.fits

  @property
  def mfu_limit(self) -> float | None:
    """The utilisation at the roofline's time."""
    if self.roofline is None or self.peak is None:
      return None
    return self.flops.model / (self.roofline.seconds * self.peak)


def make(
  config: experiment.Experiment, topology: str, num_slices: int = 1
) -> Plan:
  """Returns the plan of a run on a topology.

  Args:
    config: of the run.
    topology: as for `target_devices.devices`.
    num_slices: of it.

  Raises:
    ValueError: no such topology, no compiler, or a layout that cannot be.
  """
  devices = target_devices.devices(topology, num_slices)
  consistency.check(config, len(devices))
  mesh = mesh_lib.make(config.mesh, devices)
  chip = machines.chip_of(devices[0].device_kind)
  peak = flops_lib.peak_flops(devices[0].device_kind, config.model.dtype)
  given: dict[str, Any] = {
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
    # Of the device's memory, and not of what a kernel has of the chip.
    if not re.search('RESOURCE_EXHAUSTED.*hbm', str(error), re.I | re.S):
      raise
    return Plan(
      **given,
      compile_seconds=time.perf_counter() - start,
      refused=_sentence(error),
      memory=memory_lib.of_refused(config, mesh, chip, str(error)),
      flops=_flops(config, mesh.size, [(0, 0)]),
    )
  seconds = time.perf_counter() - start
  return _of_compiled(
    config, mesh, compiled, {**given, 'compile_seconds': seconds}
  )


def _of_compiled(config, mesh, compiled: jax.stages.Compiled, given) -> Plan:
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
    if not config.pipeline.uniform:  # Else they compute all the while.
      bubble = stages.table.simulate().bubble
  exchanges = [collectives_lib.collectives(text, mesh, t) for t in trips]
  found = max(exchanges, key=collectives_lib.total)
  executed = [
    (matmul_flops.matrix_flops(text, t), kernel_flops.kernel_flops(text, t))
    for t in trips
  ]
  flops = _flops(config, mesh.size, executed)
  mean = sum(map(sum, executed)) / len(executed)
  roofline, times = None, [0.0] * len(found)
  if given['chip'] is not None and given['peak'] is not None:
    chip = machines.CHIPS[given['chip']]
    times = roofline_lib.exchange_seconds(found, mesh, chip)
    roofline = roofline_lib.Roofline(
      compute=flops.executed / given['peak'],
      memory=max(memory_traffic.memory_bytes(text, t) for t in trips)
      / chip.bandwidth,
      network=sum(times),
      exposed=sum(t for c, t in zip(found, times) if not c.hidden),
      idle=roofline_lib.idle(flops.executed, mean, bubble),
    )
  return Plan(
    **given,
    memory=memory_lib.of_compiled(
      config, mesh, given['chip'], compiled.memory_analysis(), text
    ),
    flops=flops,
    sent=_sent(found, times),
    roofline=roofline,
    schedule=stages.summary() if stages else '',
    stages=tuple(
      Stage(executed=sum(own), sent=collectives_lib.total(sent))
      for own, sent in zip(executed, exchanges, strict=True)
      if stages
    ),
  )


def _arguments(config: experiment.Experiment):
  spec = data_pipeline.batch_spec(config.data)
  shapes = {name: shape for name, (shape, _) in spec.items()}
  return flops_lib.arguments(config.model, shapes)


def _flops(config, num_devices, executed) -> Flops:
  """Of the stage that computes most, of (products, kernels) of each."""
  products, own = max(executed, key=sum)
  model = flops_lib.train_flops(*_arguments(config)) / num_devices
  return Flops(model=model, executed_matmul=products, kernels=own)


def _sent(found, times) -> tuple[Sent, ...]:
  sums: dict[tuple, list[float]] = {}
  for c, seconds in zip(found, times, strict=True):
    row = sums.setdefault((c.kind, c.axes, c.between), [0.0] * 4)
    size = float(c.bytes * c.times)
    own = float(c.times), size, size * c.hidden, seconds * (not c.hidden)
    row[:] = map(sum, zip(row, own))
  rows = [
    Sent(
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
  """Returns what a compiler says, without its code and its tables."""
  first, *_ = str(error).splitlines()
  return re.sub(r'^[A-Z_]+: ', '', first)

"""Which layout to run on: all that can be, estimated.

found = plan_search.candidates(config, 'v5e:4x4')

Layouts (mesh sizes) x remat policies x microbatches that can be are estimated
by `estimate` within seconds. `trials` compiles the best.
"""

from collections.abc import Iterator
import dataclasses
from typing import Any

from t2x.config import experiment
from t2x.config import layout_advice
from t2x.config import overrides
from t2x.config import partitioning
from t2x.cost_model import estimate as estimate_lib
from t2x.cost_model import links
from t2x.cost_model import roofline
from t2x.hardware import machines
from t2x.hardware import target_devices
from t2x.layers import moe
from t2x.models import flops as flops_lib
from t2x.parallel import mesh as mesh_lib
from t2x.planning import memory

_REMATS = ('none', 'dots', 'full')
_SCHEDULES = ('one_f_one_b', 'interleaved', 'zb_h1')  # The leanest first.
_MOST_TENSOR = 8  # Past it the sums of activations are what a step waits for.
_LONG = 8192  # Rows from which it may be worth splitting them.
MARGIN = 1.1  # Estimates are off by about a tenth.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
  """One way to run an experiment.

  Attributes:
    config: the experiment in this layout.
    settings: all that was chosen, as for --set.
    peak: bytes that it should need on a device.
    seconds: the least time of a step, of products and exchanges.
    limit: bytes that a device has.
    fits: whether the peak, with a margin, is within a device's memory.
  """

  config: experiment.Experiment
  settings: tuple[str, ...]
  peak: float
  seconds: float
  limit: float
  fits: bool


class Site:
  """The devices that a run is to be on.

  Attributes:
    num_devices: of all slices.
    num_slices: in which they lie.
    limit: bytes that a device has.
  """

  def __init__(self, topology: str, num_slices: int, dtype: str):
    """Makes one.

    Args:
      topology: as for `target_devices.devices`.
      num_slices: of it.
      dtype: of products, whose speed matters.

    Raises:
      ValueError: devices of which no figures are known.
    """
    self._devices = target_devices.devices(topology, num_slices)
    self.num_devices, self.num_slices = len(self._devices), num_slices
    kind = self._devices[0].device_kind
    chip = machines.chip_of(kind)
    peak = flops_lib.peak_flops(kind, dtype)
    limit = memory.limit_of(chip)
    if chip is None or peak is None or limit is None:
      raise ValueError(
        f'--topology={topology}: no memory and speed are known of {kind!r}, so '
        'that there is nothing to rank by. Name a kind of TPU or GPU.'
      )
    self.limit = limit
    self._chip, self._peak = machines.CHIPS[chip], peak
    self._links: dict[Any, dict[str, links.Axis]] = {}

  def candidate(
    self, config: experiment.Experiment, settings: tuple[str, ...]
  ) -> Candidate | None:
    """Returns an experiment with settings, estimated; None if it cannot be."""
    try:
      own = overrides.override(config, overrides.parse_settings([*settings]))
      estimate = estimate_lib.step(own, self.num_devices)
      if own.mesh not in self._links:
        mesh = mesh_lib.make(own.mesh, self._devices)
        self._links[own.mesh] = links.axes_of(mesh)
    except ValueError:
      return None
    axes = self._links[own.mesh]
    return Candidate(
      config=own,
      settings=settings,
      peak=estimate.peak_bytes,
      seconds=_seconds(own, estimate, axes, self._chip, self._peak),
      limit=self.limit,
      fits=MARGIN * estimate.peak_bytes <= self.limit,
    )


def candidates(
  config: experiment.Experiment, topology: str, num_slices: int = 1
) -> list[Candidate]:
  """Returns the ways to run that can be, estimated; the fastest that fit first.

  Args:
    config: the experiment; its rows and model stay.
    topology: as for `target_devices.devices`.
    num_slices: of it.

  Raises:
    ValueError: devices of which no figures are known.
  """
  site = Site(topology, num_slices, config.model.dtype)
  made = (site.candidate(config, s) for s in ways(config, site))
  return sorted((c for c in made if c is not None), key=_order)


def _order(candidate: Candidate):
  c = candidate
  return not c.fits, c.seconds if c.fits else c.peak


def _seconds(config, estimate, axes, chip, peak) -> float:
  """Products, and what of exchanges is usually not hidden by them.

  Gathers and reductions of weights are; sums of activations are what products
  wait for.
  """
  network = exposed = 0.0
  for m in estimate.messages:
    own = [axes[name] for name in m.axes]
    time = links.seconds(m.kind, m.bytes, own, chip)
    network += time
    if {*m.axes} & {'tensor', 'expert', 'context'}:
      exposed += time
  stages = partitioning.of(config, estimate.sizes).pipeline
  bubble = 0.0
  if stages is not None and not config.pipeline.uniform:
    bubble = stages.table.simulate().bubble
  return roofline.Roofline(
    compute=estimate.executed_flops / peak,
    memory=0.0,  # Not estimated.
    network=network,
    exposed=exposed,
    idle=roofline.idle(estimate.executed_flops, estimate.mean_flops, bubble),
  ).seconds


def ways(
  config: experiment.Experiment, site: Site
) -> Iterator[tuple[str, ...]]:
  """Yields settings of layouts that may be, recomputation and microbatches."""
  for mesh in _meshes(config, site):
    for remat in _REMATS:
      for settings in _microbatches(config, mesh, _SCHEDULES):
        yield *_text(mesh), f'train.remat={remat}', *settings


def leanest(config: experiment.Experiment, site: Site) -> list[Candidate]:
  """Returns of each mesh the way that takes the least memory.

  Without meshes whose mesh.fsdp could have what mesh.data has: it splits the
  state too.
  """
  found, split = [], set()
  for mesh in sorted(_meshes(config, site), key=lambda mesh: mesh.data):
    parts = dataclasses.replace(mesh, data=1, fsdp=mesh.data * mesh.fsdp)
    cuts = [*_microbatches(config, mesh, _SCHEDULES[:1])]
    if not cuts or parts in split:
      continue
    settings = *_text(mesh), 'train.remat=full', *cuts[-1]
    candidate = site.candidate(config, settings)
    if candidate is not None:
      found.append(candidate)
      split.add(parts)
  return found


def _meshes(config, site: Site) -> Iterator[mesh_lib.MeshConfig]:
  model, rows = config.model, config.data.batch_size
  experts = any(isinstance(m, moe.MoeConfig) for m in model.mlp_kinds)
  for sizes in layout_advice.factorisations(site.num_devices, 6):
    data, fsdp, tensor, context, expert, pipe = sizes
    if tensor > _MOST_TENSOR or (expert > 1 and not experts):
      continue
    if context > 1 and config.data.length < _LONG:
      continue
    if pipe > sum(model.depths.values()) or rows % (data * fsdp * expert):
      continue
    for dcn in _between(site.num_slices, data=data, fsdp=fsdp, pipe=pipe):
      yield mesh_lib.MeshConfig(
        data=data,
        fsdp=fsdp,
        tensor=tensor,
        context=context,
        expert=expert,
        pipe=pipe,
        dcn=dcn,
      )


def _between(num_slices: int, **sizes: int) -> Iterator[mesh_lib.Dcn]:
  """Yields the axes that can lie between slices; others send too much."""
  if num_slices == 1:
    yield mesh_lib.Dcn(data=1)
    return
  for axis, size in sizes.items():
    if size % num_slices == 0:
      yield mesh_lib.Dcn(**{'data': 1, axis: num_slices})


def _text(mesh: mesh_lib.MeshConfig) -> Iterator[str]:
  for axis in mesh_lib.AXES:
    yield f'mesh.{axis}={getattr(mesh, axis)}'
  for axis in mesh_lib.AXES:
    yield f'mesh.dcn.{axis}={getattr(mesh.dcn, axis)}'


def _microbatches(config, mesh, schedules) -> Iterator[tuple[str, ...]]:
  """Yields ways to cut a device's rows."""
  rows = config.data.batch_size // (mesh.data * mesh.fsdp * mesh.expert)
  counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if rows % n == 0]
  if mesh.pipe == 1:
    for n in counts:
      yield (f'train.accumulate={n}',)
    return
  for n in counts:
    if n < mesh.pipe:
      continue
    for schedule in schedules:
      yield (
        'train.accumulate=1',
        f'pipeline.microbatches={n}',
        f'pipeline.schedule={schedule}',
      )

"""Searches for the fastest layout of a run, by estimates.

ranked = search.candidates(config, 'v5e:4x4')

Every possible combination of mesh sizes, rematerialisation and microbatches is
estimated, which takes seconds. `trials` compiles the best of them.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses

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
_MOST_TENSOR = 8  # Beyond it a step waits for sums of activations.
_LONG = 8192  # Tokens of a row from which it can be worth splitting it.
MARGIN = 1.1  # Estimates of memory are off by about a tenth.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
  """One way to run an experiment, with its estimate.

  Attributes:
    config: the experiment with these settings.
    settings: settings that were chosen, as `name=value` for --set.
    peak: estimated peak of a device's memory, in bytes.
    seconds: lower bound on the time of a step, of products and collectives.
    limit: bytes of memory that a device has.
    fits: True if the peak, with a margin, is within the limit.
  """

  config: experiment.Experiment
  settings: tuple[str, ...]
  peak: float
  seconds: float
  limit: float
  fits: bool


class Site:
  """The devices that a run is planned for.

  Attributes:
    num_devices: number of devices of all slices.
    num_slices: number of slices.
    limit: bytes of memory that a device has.
  """

  def __init__(self, topology: str, num_slices: int, dtype: str):
    """Describes the devices.

    Args:
      topology: name of a topology, as for `target_devices.devices`.
      num_slices: number of slices of that topology.
      dtype: dtype of matrix products, which decides their speed.

    Raises:
      ValueError: memory or speed of the devices is unknown.
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
    self._links: dict[mesh_lib.MeshConfig, dict[str, links.Axis]] = {}

  def candidate(
    self, config: experiment.Experiment, settings: tuple[str, ...]
  ) -> Candidate | None:
    """Returns the estimate of an experiment with other settings.

    Args:
      config: the experiment.
      settings: settings to change, as `name=value`.

    Returns:
      The candidate, or None if the settings are impossible on these devices.
    """
    try:
      changed = overrides.override(
        config, overrides.parse_settings([*settings])
      )
      estimate = estimate_lib.step(changed, self.num_devices)
      if changed.mesh not in self._links:
        mesh = mesh_lib.make(changed.mesh, self._devices)
        self._links[changed.mesh] = links.axes_of(mesh)
    except ValueError:
      return None
    axes = self._links[changed.mesh]
    return Candidate(
      config=changed,
      settings=settings,
      peak=estimate.peak_bytes,
      seconds=_seconds(changed, estimate, axes, self._chip, self._peak),
      limit=self.limit,
      fits=MARGIN * estimate.peak_bytes <= self.limit,
    )


def candidates(
  config: experiment.Experiment, topology: str, num_slices: int = 1
) -> list[Candidate]:
  """Returns the possible ways to run an experiment, with their estimates.

  Those that should fit come first, the fastest of them first; then the others,
  the leanest first.

  Args:
    config: the experiment. Its batch size and its model stay.
    topology: name of a topology, as for `target_devices.devices`.
    num_slices: number of slices of that topology.

  Raises:
    ValueError: memory or speed of the devices is unknown.
  """
  site = Site(topology, num_slices, config.model.dtype)
  estimated = (site.candidate(config, s) for s in ways(config, site))
  return sorted((c for c in estimated if c is not None), key=_order)


def _order(candidate: Candidate) -> tuple[bool, float]:
  c = candidate
  return not c.fits, c.seconds if c.fits else c.peak


def _seconds(
  config: experiment.Experiment,
  estimate: estimate_lib.Estimate,
  axes: Mapping[str, links.Axis],
  chip: machines.Chip,
  peak: float,
) -> float:
  """Returns a lower bound on the time of a step: products and collectives.

  Products are taken to hide the gathers and reductions of weights, as they
  usually do, but to wait for sums of activations.

  Args:
    config: the experiment.
    estimate: its estimate.
    axes: links along each mesh axis.
    chip: the chip, which has the bandwidth of the links.
    peak: peak FLOP/s of a device.
  """
  network = exposed = 0.0
  for m in estimate.messages:
    parts = [axes[name] for name in m.axes]
    time = links.seconds(m.kind, m.bytes, parts, chip)
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
  """Yields ways to run: settings of mesh, rematerialisation and microbatches.

  Some of them can turn out to be impossible.

  Args:
    config: the experiment.
    site: the devices.
  """
  for mesh in _meshes(config, site):
    for remat in _REMATS:
      for settings in _microbatches(config, mesh, _SCHEDULES):
        yield *_mesh_settings(mesh), f'train.remat={remat}', *settings


def leanest(config: experiment.Experiment, site: Site) -> list[Candidate]:
  """Returns for each mesh the way to run that takes the least memory.

  A mesh is left out if another has its mesh.data in mesh.fsdp instead, which
  splits the state too.

  Args:
    config: the experiment.
    site: the devices.
  """
  lean, split = [], set()
  for mesh in sorted(_meshes(config, site), key=lambda mesh: mesh.data):
    parts = dataclasses.replace(mesh, data=1, fsdp=mesh.data * mesh.fsdp)
    cuts = [*_microbatches(config, mesh, _SCHEDULES[:1])]
    if not cuts or parts in split:
      continue
    settings = *_mesh_settings(mesh), 'train.remat=full', *cuts[-1]
    candidate = site.candidate(config, settings)
    if candidate is not None:
      lean.append(candidate)
      split.add(parts)
  return lean


def _meshes(
  config: experiment.Experiment, site: Site
) -> Iterator[mesh_lib.MeshConfig]:
  """Yields the meshes of the devices that can be worth a try."""
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
  """Yields the ways to lay one mesh axis across slices.

  Args:
    num_slices: number of slices.
    **sizes: sizes of the mesh axes that can lie across slices; other axes send
      too much.
  """
  if num_slices == 1:
    yield mesh_lib.Dcn(data=1)
    return
  for axis, size in sizes.items():
    if size % num_slices == 0:
      yield mesh_lib.Dcn(**{'data': 1, axis: num_slices})


def _mesh_settings(mesh: mesh_lib.MeshConfig) -> Iterator[str]:
  for axis in mesh_lib.AXES:
    yield f'mesh.{axis}={getattr(mesh, axis)}'
  for axis in mesh_lib.AXES:
    yield f'mesh.dcn.{axis}={getattr(mesh.dcn, axis)}'


def _microbatches(
  config: experiment.Experiment,
  mesh: mesh_lib.MeshConfig,
  schedules: Sequence[str],
) -> Iterator[tuple[str, ...]]:
  """Yields settings that cut a device's rows into microbatches.

  Args:
    config: the experiment.
    mesh: sizes of the mesh axes.
    schedules: schedules to try on a mesh with stages.
  """
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

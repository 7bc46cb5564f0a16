"""Which layout to run on: all that can be, estimated.

found = plan_search.candidates(config, 'v5e:4x4')

Layouts (mesh sizes) x remat policies x microbatches that can be are estimated
by `estimate` within seconds. `plan_trials` compiles the best.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import math
from typing import Any

from t2x import absent
from t2x import config as config_lib
from t2x import consistency
from t2x import estimate as estimate_lib
from t2x import experiment
from t2x import flops as flops_lib
from t2x import layouts
from t2x import machines
from t2x import mesh as mesh_lib
from t2x import on_mesh
from t2x import plan_memory
from t2x.layers import moe
from t2x.models import encoder_decoder
from t2x.plan import links
from t2x.plan import roofline

_REMATS = ('none', 'dots', 'full')
_MOST_TENSOR = 8  # Past it the sums of activations are what a step waits for.
_LONG = 8192  # Rows from which it may be worth splitting them.
MARGIN = 1.1  # Estimates are off by about a tenth.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
  """One way to run an experiment.

  Attributes:
    config: the experiment in this layout.
    settings: what differs from the experiment, as for --set.
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


def candidates(
  config: experiment.Experiment, topology: str, num_slices: int = 1
) -> list[Candidate]:
  """Returns the ways to run that can be, estimated; the fastest that fit first.

  Args:
    config: the experiment; its rows and model stay.
    topology: as for `absent.devices`.
    num_slices: of it.

  Raises:
    ValueError: devices of which no figures are known.
  """
  devices = absent.devices(topology, num_slices)
  kind = devices[0].device_kind
  chip = machines.chip_of(kind)
  peak = flops_lib.peak_flops(kind, config.model.dtype)
  if chip is None or peak is None:
    raise ValueError(
      f'--topology={topology}: no memory and speed are known of {kind!r}, so '
      'that there is nothing to rank by. Name a kind of TPU or GPU.'
    )
  limit = plan_memory.limit_of(chip)
  assert limit is not None
  links_of: dict[Any, dict[str, links.Axis]] = {}
  found = []
  for own, settings in _ways(config, len(devices), num_slices):
    try:
      estimate = estimate_lib.step(own, len(devices))
      if own.mesh not in links_of:
        mesh = mesh_lib.make(own.mesh, devices)
        links_of[own.mesh] = links.axes_of(mesh)
    except ValueError:  # A layout that cannot be.
      continue
    seconds = _seconds(
      own, estimate, links_of[own.mesh], machines.CHIPS[chip], peak
    )
    found.append(
      Candidate(
        config=own,
        settings=settings,
        peak=estimate.peak_bytes,
        seconds=seconds,
        limit=limit,
        fits=MARGIN * estimate.peak_bytes <= limit,
      )
    )
  return sorted(found, key=_order)


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
  stages = on_mesh.pipeline(config, estimate.sizes)
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


def _ways(
  config: experiment.Experiment, num: int, num_slices: int
) -> Iterator[tuple[experiment.Experiment, tuple[str, ...]]]:
  for mesh in _meshes(config, num, num_slices):
    parts = mesh.data * mesh.fsdp * mesh.expert
    rows = config.data.batch_size
    if rows % parts:
      continue
    for remat in _REMATS:
      for settings in _microbatches(rows // parts, mesh):
        settings = (*_text(mesh), f'train.remat={remat}', *settings)
        try:
          own = config_lib.override(
            config, config_lib.parse_settings([*settings])
          )
          consistency.check(own, num)
        except ValueError:
          continue
        yield own, settings


def _meshes(config, num: int, num_slices: int) -> Iterator[mesh_lib.MeshConfig]:
  model = config.model
  experts = any(isinstance(m, moe.MoeConfig) for m in model.mlp_kinds)
  for sizes in layouts.factorisations(num, 6):
    data, fsdp, tensor, context, expert, pipe = sizes
    if tensor > _MOST_TENSOR or (expert > 1 and not experts):
      continue
    if context > 1 and config.data.length < _LONG:
      continue
    if pipe > _depth(model):
      continue
    for dcn in _between(num_slices, data=data, fsdp=fsdp, pipe=pipe):
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


def _depth(model) -> int:
  """Returns the layers of all towers."""
  if isinstance(model, encoder_decoder.EncoderDecoderConfig):
    return model.num_layers + (model.num_encoder_layers or model.num_layers)
  return model.num_layers


def _text(mesh: mesh_lib.MeshConfig) -> Iterator[str]:
  for axis in mesh_lib.AXES:
    yield f'mesh.{axis}={getattr(mesh, axis)}'
  for axis in mesh_lib.AXES:
    yield f'mesh.dcn.{axis}={getattr(mesh.dcn, axis)}'


def _microbatches(rows: int, mesh) -> Iterator[tuple[str, ...]]:
  """Yields ways to cut a device's rows."""
  counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if rows % n == 0]
  if mesh.pipe == 1:
    for n in counts:
      yield (f'train.accumulate={n}',)
    return
  for n in counts:
    if n < mesh.pipe:
      continue
    for schedule in ('one_f_one_b', 'interleaved', 'zb_h1'):
      yield (
        'train.accumulate=1',
        f'pipeline.microbatches={n}',
        f'pipeline.schedule={schedule}',
      )


def nearest_fit(
  found: Sequence[Candidate], config: experiment.Experiment
) -> Candidate | None:
  """Returns the candidate that fits with the fewest settings changed."""
  # One without a change was planned, and does not fit whatever is estimated.
  fitting = [c for c in found if c.fits and changes(c, config)]
  near = lambda c: (len(changes(c, config)), c.seconds)
  return min(fitting, key=near, default=None)


def changes(candidate: Candidate, config: experiment.Experiment) -> list[str]:
  """Returns the settings in which a candidate differs from an experiment.

  An axis that takes what remains (-1) is as before where the others are.
  """
  flat = config_lib.flatten(config_lib.to_json(config))
  asked = [(s, *s.partition('=')[::2]) for s in candidate.settings]
  other = [
    (text, name) for text, name, value in asked if str(flat.get(name)) != value
  ]
  rest = [
    name for _, name in other if name.startswith('mesh.') and flat[name] == -1
  ]
  # Each of mesh and mesh.dcn may have one.
  parent = lambda name: name.rpartition('.')[0]
  alone = [
    name
    for name in rest
    if sum(parent(o) == parent(name) for _, o in other) == 1
  ]
  return [text for text, name in other if name not in alone]


def remedy(
  config: experiment.Experiment,
  topology: str,
  num_slices: int,
  num_devices: int,
  limit: float,
) -> str:
  """Returns what to change of a run that does not fit, in a sentence.

  The least change with which it should, or else how many chips it needs.
  """
  nearest = nearest_fit(candidates(config, topology, num_slices), config)
  if nearest is None:
    return too_large(config, num_devices, limit)
  changed = ' '.join(f'--set {s}' for s in changes(nearest, config))
  return (
    f'it should fit with {changed} (and no --layout): by estimate '
    f'{nearest.peak / 2**30:.2f} of {limit / 2**30:.2f} GiB.'
  )


def too_large(
  config: experiment.Experiment, num_devices: int, limit: float
) -> str:
  """Returns that nothing fits, and what would, in a sentence."""
  need = chips_needed(config, num_devices, limit)
  how_many = f'{need:,} of them' if need else 'many more of them'
  return (
    f'it fits on {num_devices} of these devices in no layout, recomputed or in '
    f'microbatches: by estimate, and a tenth more, it needs {how_many} or '
    'larger ones.'
  )


def chips_needed(
  config: experiment.Experiment, num_devices: int, limit: float
) -> int | None:
  """Returns on how many devices a lean layout should fit: 2, 4, 8, ... times.

  Lean is a row at a time, recomputed, split by fsdp as far as there are rows
  and by tensor parallelism then. None where 1,024 times are not enough.
  """
  rows = config.data.batch_size
  for num in (num_devices << i for i in range(1, 11)):
    fsdp = math.gcd(rows, num)
    mesh = mesh_lib.MeshConfig(data=1, fsdp=fsdp, tensor=num // fsdp)
    own = dataclasses.replace(config, mesh=mesh)
    settings = {'train.remat': 'full', 'train.accumulate': str(rows // fsdp)}
    try:
      found = estimate_lib.step(config_lib.override(own, settings), num)
    except ValueError:  # More parts than heads.
      continue
    if MARGIN * found.peak_bytes <= limit:
      return num
  return None

"""What to change of a run that does not fit: the least, or more devices.

said = plan_remedy.remedy(config, 'v5e:4x4')
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math
from typing import Any

from t2x.config import experiment
from t2x.config import overrides
from t2x.cost_model import estimate as estimate_lib
from t2x.hardware import target_devices
from t2x.hardware import topologies
from t2x.parallel import mesh as mesh_lib
from t2x.planning import search

Write = Callable[[Sequence[str], mesh_lib.MeshConfig], str]
_MOST = 200  # Ways that are estimated, a second for about thirty.


def set_text(settings: Sequence[str], _: mesh_lib.MeshConfig) -> str:
  return ' '.join(f'--set {setting}' for setting in settings)


def remedy(
  config: experiment.Experiment,
  topology: str,
  num_slices: int = 1,
  write: Write = set_text,
) -> str:
  """Returns what to change of a run that does not fit, in a sentence.

  The least change with which it should, or else how many chips it needs.

  Args:
    config: the run.
    topology: as for `target_devices.devices`.
    num_slices: of it.
    write: from settings, and the mesh with those of them that are its, to
      flags.

  Raises:
    ValueError: devices of which no figures are known.
  """
  site = search.Site(topology, num_slices, config.model.dtype)
  nearest = nearest_fit(config, site)
  if nearest is None:
    return too_large(config, topology, site.num_devices, site.limit)
  changed = changes(nearest.settings, config)
  return (
    f'it should fit with {write(changed, nearest.config.mesh)}: by estimate '
    f'{nearest.peak / 2**30:.2f} of {site.limit / 2**30:.2f} GiB.'
  )


def nearest_fit(
  config: experiment.Experiment, site: search.Site
) -> search.Candidate | None:
  """Returns the way that should fit with the fewest settings changed.

  Of several the fastest. None where the leanest way of no mesh should fit.
  """
  flat = overrides.flatten(overrides.to_json(config))
  count = lambda settings: len(_changed(settings, flat))
  # One without a change was planned, and does not fit whatever is estimated.
  found = search.leanest(config, site)
  lean = [c for c in found if c.fits and count(c.settings)]
  if not lean:
    return None
  ways = sorted(search.ways(config, site), key=count)
  ways = [settings for settings in ways if count(settings)][:_MOST]
  best: list[search.Candidate] = []
  for settings in ways:
    if best and count(settings) > count(best[0].settings):
      break
    candidate = site.candidate(config, settings)
    best += [candidate] if candidate is not None and candidate.fits else []
  near = lambda c: (count(c.settings), c.seconds)
  return min(best or lean, key=near)


def changes(
  settings: Sequence[str], config: experiment.Experiment
) -> list[str]:
  """Returns which of the settings differ from those of an experiment.

  An axis that takes what remains (-1) follows from the others.
  """
  return _changed(settings, overrides.flatten(overrides.to_json(config)))


def _changed(settings: Sequence[str], flat: Mapping[str, Any]) -> list[str]:
  pairs = [(text, *text.partition('=')[::2]) for text in settings]
  return [
    text
    for text, name, value in pairs
    if str(flat.get(name)) not in ('-1', value)
  ]


def too_large(
  config: experiment.Experiment, topology: str, num_devices: int, limit: float
) -> str:
  """Returns that nothing fits, and what would, in a sentence."""
  need = chips_needed(config, num_devices, limit)
  how_many = 'many more of them'
  if need:
    most, name = topologies.largest(topology)
    here = topologies.parse(topology).shape
    most *= len(target_devices.devices(topology)) // math.prod(
      here
    )  # To a chip.
    how_many = f'{need:,} of them'
    if need > most:
      slices = -(-need // most)
      how_many += f' (--topology={name} --num_slices={slices})'
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
      found = estimate_lib.step(overrides.override(own, settings), num)
    except ValueError:  # More parts than heads.
      continue
    if search.MARGIN * found.peak_bytes <= limit:
      return num
  return None

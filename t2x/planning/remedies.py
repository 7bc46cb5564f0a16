"""Finds the smallest change with which a run fits in memory.

sentence = remedies.remedy(config, 'v5e:4x4')
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

# Returns the command-line flags of settings, given the mesh that they lead to.
Write = Callable[[Sequence[str], mesh_lib.MeshConfig], str]
_MOST = 200  # Ways that are estimated; about thirty take a second.


def set_text(settings: Sequence[str], _: mesh_lib.MeshConfig) -> str:
  """Returns a flag `--set` for each setting."""
  return ' '.join(f'--set {setting}' for setting in settings)


def remedy(
  config: experiment.Experiment,
  topology: str,
  num_slices: int = 1,
  write: Write = set_text,
) -> str:
  """Returns a sentence that tells how to make a run fit in memory.

  It names the smallest change of settings with which the run should fit, or
  else the number of chips that it needs.

  Args:
    config: the experiment, which does not fit.
    topology: name of a topology, as for `target_devices.devices`.
    num_slices: number of slices of that topology.
    write: a function from settings, and the mesh that they lead to, to
      command-line flags.

  Raises:
    ValueError: memory or speed of the devices is unknown.
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
  """Returns the way to run that should fit with the fewest settings changed.

  Of several, it is the fastest. None if no way should fit.

  Args:
    config: the experiment, which does not fit.
    site: the devices.
  """
  flat = overrides.flatten(overrides.to_json(config))
  count = lambda settings: len(_changed(settings, flat))
  # Without a change it does not fit, even if the estimate says that it does.
  leanest = search.leanest(config, site)
  lean = [c for c in leanest if c.fits and count(c.settings)]
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
  """Returns the settings whose values an experiment does not have already.

  A mesh axis of -1, which takes the remaining devices, counts as equal.

  Args:
    settings: settings as `name=value`.
    config: the experiment.
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
  """Returns a sentence that tells how many devices an experiment needs.

  Args:
    config: the experiment, which fits in no layout.
    topology: name of a topology, as for `target_devices.devices`.
    num_devices: number of devices of all its slices.
    limit: bytes of memory that a device has.
  """
  need = chips_needed(config, num_devices, limit)
  how_many = 'many more of them'
  if need:
    most, name = topologies.largest(topology)
    num_chips = math.prod(topologies.parse(topology).shape)
    most *= len(target_devices.devices(topology)) // num_chips
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
  """Returns the number of devices on which a lean layout should fit.

  Lean is a microbatch of one row, with full rematerialisation, split by fsdp as
  far as there are rows and then by tensor parallelism. The number is 2, 4, 8,
  ... times `num_devices`; None if 1,024 times are not enough.

  Args:
    config: the experiment.
    num_devices: number of devices on which it does not fit.
    limit: bytes of memory that a device has.
  """
  rows = config.data.batch_size
  for num in (num_devices << i for i in range(1, 11)):
    fsdp = math.gcd(rows, num)
    mesh = mesh_lib.MeshConfig(data=1, fsdp=fsdp, tensor=num // fsdp)
    split = dataclasses.replace(config, mesh=mesh)
    settings = {'train.remat': 'full', 'train.accumulate': str(rows // fsdp)}
    try:
      estimate = estimate_lib.step(overrides.override(split, settings), num)
    except ValueError:  # More parts than heads.
      continue
    if search.MARGIN * estimate.peak_bytes <= limit:
      return num
  return None

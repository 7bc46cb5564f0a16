"""What a compiled program was made for, and how that differs from a run.

A program runs where it was made for: the same versions of the compilers, the
same devices in the same order, the same options, and the same lowered text.
"""

import functools
import hashlib
from importlib import metadata
import os
import pathlib
import re
from typing import Any

import jax

from t2x.compilation import program as program_lib
from t2x.config import experiment
from t2x.config import overrides
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import simulated_devices

# What compiles and what loads. A program of one version is none of another.
_COMPILERS = {
  'cpu': ('jax', 'jaxlib'),
  'tpu': ('jax', 'jaxlib', 'libtpu'),
  'gpu': ('jax', 'jaxlib', 'jax-cuda12-plugin', 'jax-cuda13-plugin'),
}
# Name the reason where lowered texts differ; they forbid nothing themselves.
_LIBRARIES = ('flax', 'optax', 'numpy')
# Read by compilers; the first also says how many devices are simulated, which
# are compared by themselves.
_FLAGS = ('XLA_FLAGS', 'LIBTPU_INIT_ARGS')
_COUNT = simulated_devices.COUNT + r'=\S+'
_MOST = 8  # Differences that a message lists.


def of_target(program: program_lib.Program) -> dict[str, Any]:
  """Returns the devices, compilers and flags of a program, as JSON.

  They must match before anything is lowered.

  Args:
    program: the program of a run; its devices may be absent.
  """
  mesh = program.batch_sharding.mesh
  assert isinstance(mesh, jax.sharding.Mesh)
  devices = [*mesh.devices.flat]
  platform = devices[0].platform
  options = program_lib.options_for(program.config, mesh)
  return {
    'versions': _versions(_COMPILERS.get(platform, ('jax', 'jaxlib'))),
    'devices': {
      'kind': devices[0].device_kind,
      'number': len(devices),
      'slices': mesh_lib.num_slices(devices),
      'mesh': [_place(d) for d in devices],
    },
    'options': {name: str(value) for name, value in options.items()},
    'flags': {name: _flags(name) for name in _FLAGS},
  }


def compilers() -> dict[str, str]:
  """Returns the versions of whatever may compile here, and its flags."""
  names = dict.fromkeys(sum(_COMPILERS.values(), ()))
  return _versions((*names,)) | {name: _flags(name) for name in _FLAGS}


def of_source(config: experiment.Experiment) -> dict[str, Any]:
  """Returns settings, libraries and code, as JSON.

  They explain lowered texts that differ.
  """
  return {
    'config': overrides.to_json(config),
    'libraries': _versions(_LIBRARIES),
    'code': dict(_code()),
  }


def of_lowered(lowered: jax.stages.Lowered) -> str:
  """Returns the hash of a program, its arguments' names and shapes included."""
  paths, _ = jax.tree_util.tree_flatten_with_path(lowered.args_info)
  names = [f'{jax.tree_util.keystr(path)} {leaf}' for path, leaf in paths]
  text = '\n'.join([lowered.as_text(), *names])
  return hashlib.sha256(text.encode()).hexdigest()


def target_differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
  """Returns in words where two of `of_target` differ, most telling first."""
  a, b = then['devices'], now['devices']
  said = []
  for name in ('kind', 'number', 'slices'):
    if a[name] != b[name]:
      what = {'kind': 'kind of device', 'number': 'number of devices'}
      what = what.get(name, 'number of slices')
      said.append(f'{what}: {a[name]} in the file, {b[name]} here')
  if not said and a['mesh'] != b['mesh']:
    i = [x != y for x, y in zip(a['mesh'], b['mesh'], strict=True)].index(True)
    said.append(
      f'device {i} of the mesh: {_place_text(a["mesh"][i])} in the file, '
      f'{_place_text(b["mesh"][i])} here'
    )
  # Those of another chip have other compilers and options anyhow.
  same = a['kind'] == b['kind']
  for name in ('versions', 'options', 'flags') if same else ():
    said += _pairs(then[name], now[name])
  return said


def source_differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
  """Returns in words where two of `of_source` differ, if anywhere."""
  outer = experiment.OUTER_SETTINGS
  said = [
    text
    for text in _pairs(then['config'], now['config'])
    if not text.startswith(tuple(f'{s}{end}' for s in outer for end in ':.'))
  ]
  said += _pairs(then['libraries'], now['libraries'])
  code = overrides.differences(then['code'], now['code'])
  if code:
    said.append('code: ' + _some([*code], ', '))
  return said


def _pairs(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
  pairs = overrides.differences(then, now).items()
  text = lambda value: 'none' if value in ('', None) else value
  return [
    f'{name}: {text(a)} in the file, {text(b)} here' for name, (a, b) in pairs
  ]


def sentence(differences: list[str]) -> str:
  """Returns differences as the middle of a message."""
  return _some(differences, '; ')


def _some(items: list[str], separator: str) -> str:
  more = len(items) - _MOST
  shown = items[:_MOST] + ([f'and {more} more'] if more > 0 else [])
  return separator.join(shown)


def _place(device: Any) -> dict[str, Any]:
  """Returns which of all devices it is; a single slice may go unnumbered."""
  return {
    'id': device.id,
    'process': device.process_index,
    'slice': getattr(device, 'slice_index', None) or 0,
    'coords': [*(getattr(device, 'coords', None) or ())],
    'core': getattr(device, 'core_on_chip', None) or 0,
  }


def _place_text(place: dict[str, Any]) -> str:
  text = f'id {place["id"]} of process {place["process"]}'
  if place['coords']:
    coords = ','.join(map(str, place['coords']))
    text += f', slice {place["slice"]} at ({coords}) core {place["core"]}'
  return text


def _versions(names: tuple[str, ...]) -> dict[str, str]:
  found = {}
  for name in names:
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      continue
  return found


def _flags(name: str) -> str:
  return ' '.join(re.sub(_COUNT, '', os.environ.get(name, '')).split())


@functools.cache
def _code() -> tuple[tuple[str, str], ...]:
  """Returns (file, hash) of this package."""
  root = pathlib.Path(__file__).parents[1]
  return tuple(
    (f't2x/{path.relative_to(root).as_posix()}', _hash(path.read_bytes()))
    for path in sorted(root.rglob('*.py'))
  )


def _hash(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()[:16]

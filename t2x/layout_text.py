"""Layouts as a command line writes them.

>>> parse('data=2,tensor=4').num_devices
8
>>> parse('context=2,rules.norm_length=context,tensor').settings
{'rules.norm_length': 'context,tensor'}
"""

from collections.abc import Sequence
import dataclasses
import difflib
import math

from t2x import config as config_lib
from t2x import experiment
from t2x import mesh as mesh_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """A mesh, and settings that say how it is used.

  Attributes:
    text: as it was given.
    mesh: sizes of the axes.
    settings: dotted name -> value.
  """

  text: str
  mesh: mesh_lib.MeshConfig
  settings: dict[str, str]

  @property
  def num_devices(self) -> int:
    """What the sizes multiply to.

    Raises:
      ValueError: one of them is -1.
    """
    sizes = [getattr(self.mesh, axis) for axis in mesh_lib.AXES]
    if -1 in sizes:
      raise ValueError(
        f'--layout={self.text}: an axis takes the devices that remain (-1), '
        'and their number is not known. Give each axis its size, as in '
        '--layout=data=2,fsdp=4, or the number, where there is a flag '
        '--num_devices.'
      )
    return math.prod(sizes)

  def applied(self, config: experiment.Experiment) -> experiment.Experiment:
    """Returns `config` in this layout.

    Raises:
      ValueError: a setting that changes what is computed, or that is none.
    """
    for name in self.settings:
      if not name.startswith(experiment.MAY_CHANGE):
        raise ValueError(
          f'--layout={self.text}: {name} may change what is computed, so both '
          f'sides must have it: --set {name}={self.settings[name]}.'
        )
    config = dataclasses.replace(config, mesh=self.mesh)
    return config_lib.override(config, self.settings)


def parse_all(texts: Sequence[str]) -> list[Layout]:
  """Reads the layouts of the command line, of which there must be one."""
  if not texts:
    raise ValueError(
      '--layout is missing: say what to compare with one device, as in '
      '--layout=data=2,tensor=4. It may repeat.'
    )
  return [parse(text) for text in texts]


def of_mesh(mesh: mesh_lib.MeshConfig) -> Layout:
  """Returns the layout of a config's own mesh."""
  sizes = {axis: getattr(mesh, axis) for axis in mesh_lib.AXES}
  text = ','.join(f'{axis}={size}' for axis, size in sizes.items() if size != 1)
  return Layout(text=text or 'data=1', mesh=mesh, settings={})


def parse(text: str) -> Layout:
  """Reads `data=2,tensor=2,rules.norm_length=context,tensor`.

  Args:
    text: sizes of mesh axes (others are 1, one may be -1) and dotted settings,
      with commas between; what has no `=` belongs to the value before it.

  Raises:
    ValueError: no such axis, twice the same, or no such size.
  """
  pairs: list[list[str]] = []
  for item in text.split(','):
    name, equals, value = item.partition('=')
    if equals:
      pairs.append([name.strip(), value.strip()])
    elif pairs and '.' in pairs[-1][0]:
      pairs[-1][1] += f',{item}'
    else:
      raise ValueError(
        f'--layout={text}: {item!r} is not of the form AXIS=SIZE. Write for '
        'example --layout=data=2,tensor=4.'
      )
  sizes: dict[str, int] = dict.fromkeys(mesh_lib.AXES, 1)
  names = [name for name, _ in pairs]
  for name, value in pairs:
    if names.count(name) > 1:
      raise ValueError(f'--layout={text}: {name} is given twice. Give it once.')
    if '.' not in name:
      sizes[name] = _size(text, name, value)
  return Layout(
    text=text,
    mesh=dataclasses.replace(mesh_lib.MeshConfig(), **sizes),
    settings={name: value for name, value in pairs if '.' in name},
  )


def _size(text: str, name: str, value: str) -> int:
  if name not in mesh_lib.AXES:
    close = difflib.get_close_matches(name, mesh_lib.AXES, n=1, cutoff=0.5)
    hint = f' Did you mean {close[0]!r}?' if close else ''
    raise ValueError(
      f'--layout={text}: there is no mesh axis {name!r}; the axes are '
      f'{", ".join(mesh_lib.AXES)}.{hint}'
    )
  if value != '-1' and (not value.isdigit() or int(value) < 1):
    raise ValueError(
      f'--layout={text}: {name}={value} is no size; it is a number of parts, '
      'at least 1, or -1 for the devices that remain.'
    )
  return int(value)

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
import re

from t2x.config import experiment
from t2x.config import layout_advice
from t2x.config import overrides
from t2x.parallel import mesh as mesh_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """A mesh, and settings that say how it is used.

  Attributes:
    text: the flag as it was given.
    mesh: sizes of the mesh axes.
    settings: the value of each further setting, by its dotted name.
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

  def applied(
    self, config: experiment.Experiment, num_slices: int = 1
  ) -> experiment.Experiment:
    """Returns `config` in this layout.

    Args:
      config: the experiment.
      num_slices: number of slices in which the devices lie. With several, the
        `mesh.dcn` of `config` stays, but for what settings say.

    Raises:
      ValueError: a setting that is none, or that no layout may have.
    """
    dcn = config.mesh.dcn if num_slices > 1 else self.mesh.dcn
    mesh = dataclasses.replace(self.mesh, dcn=dcn)
    config = dataclasses.replace(config, mesh=mesh)
    for name in self.settings:
      self._check_known(config, name)
    try:
      config = overrides.override(config, self.settings)
    except ValueError as error:
      raise ValueError(f'--layout={self.text}: {error}') from error
    for name, value in self.settings.items():
      if not _allowed(name):
        raise ValueError(
          f'--layout={self.text}: {name} is no setting of one layout, which '
          f'may have {_SETTINGS_TEXT}. Set it for all: --set {name}={value}.'
        )
    return config

  def check(
    self,
    config: experiment.Experiment,
    num_devices: int | None = None,
    *,
    num_slices: int = 1,
    dcn: mesh_lib.Dcn | None = None,
    own: experiment.Experiment | None = None,
  ) -> None:
    """Refuses a config in this layout that cannot run.

    Args:
      config: the experiment that `applied` returned.
      num_devices: number of devices; None for the product of the sizes, and
        then layouts of other numbers may be advised.
      num_slices: number of slices in which they lie.
      dcn: sizes of the axes between slices without this layout.
      own: the experiment whose layouts are advised first, as for
        `layout_advice.check`.

    Raises:
      ValueError: or a subclass; with the nearest layouts that do work.
    """
    num = self.num_devices if num_devices is None else num_devices
    before = dcn or mesh_lib.Dcn()
    try:
      if said := mesh_lib.mismatch(config.mesh, num):
        raise ValueError(f'{said} Change --layout or the number of devices.')
      layout_advice.fit(config, num, num_slices=num_slices)
    except ValueError as error:
      said = layout_advice.advice(
        error,
        [config] if own is None else [own, config],
        num,
        num_slices=num_slices,
        any_number=num_devices is None,
        write=lambda _, mesh: self._text(before, mesh, num_slices),
      )
      text = re.sub(
        r'--set (rules\.\w+)=(\w+)',
        lambda found: self._flag(config.mesh, {found[1]: found[2]}),
        str(error),
      ).replace('--set mesh.', '--layout=mesh.')
      raise type(error)(f'--layout={self.text}: {text}{said}') from error

  def _check_known(self, config: experiment.Experiment, name: str) -> None:
    """Refuses a name whose first part is none; others `override` knows."""
    if hasattr(config, name.partition('.')[0]):
      return
    known = overrides.flatten(overrides.to_json(config))
    known = [other for other in known if _allowed(other)]
    ends = [other for other in known if other.endswith(f'.{name}')]
    close = ends or difflib.get_close_matches(name, known, n=1)
    hint = (
      f'Did you mean {close[0]!r}?'
      if close
      else f'A layout may have {_SETTINGS_TEXT}.'
    )
    raise ValueError(
      f'--layout={self.text}: there is no setting {name!r}. {hint}'
    )

  def _text(
    self, dcn: mesh_lib.Dcn, mesh: mesh_lib.MeshConfig, num_slices: int
  ) -> str:
    """Returns the flag for another mesh, where `dcn` holds without it."""
    kept = {n: v for n, v in self.settings.items() if n[:5] != 'mesh.'}
    # In one slice, what remains is 1.
    plain = lambda size: 1 if size == -1 and num_slices == 1 else size
    between = {
      f'mesh.dcn.{axis}': str(getattr(mesh.dcn, axis))
      for axis in mesh_lib.AXES
      if plain(getattr(mesh.dcn, axis)) != plain(getattr(dcn, axis))
    }
    return dataclasses.replace(self, settings=kept)._flag(mesh, between)

  def changed(self, settings: Sequence[str], mesh: mesh_lib.MeshConfig) -> str:
    """Returns the flags for this layout with some settings changed.

    Args:
      settings: settings as for --set.
      mesh: the mesh with those of them that are about it.
    """
    pairs = [text.partition('=')[::2] for text in settings]
    sizes = [f'mesh.{axis}' for axis in mesh_lib.AXES]
    own = dict(self.settings)
    others = []
    for name, value in pairs:
      if name in own or name.startswith('mesh.dcn.'):
        own[name] = value
      elif name not in sizes:
        others.append(f'--set {name}={value}')
    flag = dataclasses.replace(self, settings=own)._flag(mesh, {})
    return ' '.join([flag, *others])

  def _flag(self, mesh: mesh_lib.MeshConfig, more: dict[str, str]) -> str:
    settings = {**self.settings, **more}
    items = [f'{name}={value}' for name, value in settings.items()]
    return '--layout=' + ','.join([of_mesh(mesh).text, *items])


_SETTINGS_TEXT = ', '.join(
  f'{name}NAME' if name.endswith('.') else name
  for name in experiment.LAYOUT_SETTINGS
)


def _allowed(name: str) -> bool:
  groups = tuple(s for s in experiment.LAYOUT_SETTINGS if s.endswith('.'))
  return name in experiment.LAYOUT_SETTINGS or name.startswith(groups)


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
    text: sizes of mesh axes (others are 1, one may be -1; `mesh.data=2` is
      `data=2`) and settings, with commas between; what has no `=`
      belongs to the value before it.

  Raises:
    ValueError: no such axis, twice the same, or no such size.
  """
  pairs: list[list[str]] = []
  for item in text.split(','):
    name, equals, value = item.partition('=')
    last = pairs[-1][0] if pairs else ''
    # The options of compilers have an `=` of their own.
    option = last == 'compiler_options' and name.strip().startswith('xla_')
    if equals and not option:
      pairs.append([_short(name.strip()), value.strip()])
    elif pairs and _dotted(last):
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
    if not _dotted(name):
      sizes[name] = _size(text, name, value)
  try:
    mesh = dataclasses.replace(mesh_lib.MeshConfig(), **sizes)
  except ValueError as error:
    said = str(error).replace('--set ', '--layout=')
    raise ValueError(f'--layout={text}: {said}') from error
  settings = {name: value for name, value in pairs if _dotted(name)}
  return Layout(text=text, mesh=mesh, settings=settings)


def _short(name: str) -> str:
  """Returns `data` for `mesh.data`; `mesh.dcn.data` stays."""
  return name.removeprefix('mesh.') if name.count('.') == 1 else name


def _dotted(name: str) -> bool:
  """Whether it is a setting, and no axis."""
  return '.' in name or name in experiment.LAYOUT_SETTINGS


def _size(text: str, name: str, value: str) -> int:
  if name not in mesh_lib.AXES:
    known = experiment.LAYOUT_SETTINGS
    close = [other for other in known if other.endswith(f'.{name}')]
    close += difflib.get_close_matches(name, mesh_lib.AXES, n=1, cutoff=0.5)
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

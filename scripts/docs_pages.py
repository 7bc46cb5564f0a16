r"""The pages of the documentation site, from which zensical builds it.

python scripts/docs_pages.py DIR

writes into DIR/pages what stands in docs/ and beside README.md, a page for each
module of t2x (its docstrings, by mkdocstrings), and a page for each part of an
experiment's config: every field of every class that it can hold, with type,
default and meaning. DIR/zensical.toml names them. `bash scripts/docs.sh` calls
it and builds the site.
"""

import ast
from collections.abc import Iterator
import dataclasses
import inspect
import os
import pathlib
import re
import shutil
import sys
import types
import typing
from typing import Any

import docs_entries

from t2x.config import experiment
from t2x.config import overrides

ROOT = pathlib.Path(__file__).parents[1]
EXTENSION = ROOT / 'scripts' / 'docs_entries.py'

# Pages beside docs/, and what the site calls them.
_BESIDE = {
  'README.md': 'index.md',
  'CONTRIBUTING.md': 'contributing.md',
  'BUILD_NOTES.md': 'build_notes.md',
}
# Title and pages of each part of the menu.
_MENU = {
  'Using it': (
    'running features modules objectives attention training pipelines planning'
    ' sweeps inference serving'
  ),
  'Working on it': 'architecture glossary contributing',
  'Notes': 'build_notes limits limits-devices measured measured-devices',
}
_LINK = re.compile(r'(\]\()([^)#\s]+)((?:#[^)\s]*)?\))')
_ENTRY = re.compile(r'  (\w+(?:, \w+)*): ?(.*)')

# Names of fields stay in one piece.
_STYLE = """
.md-typeset table:not([class]) td:first-child code { white-space: nowrap; }
"""

_SETTINGS = """
[project]
site_name = "t2x"
site_description = "Transformers on device meshes, in JAX."
docs_dir = "pages"
site_dir = "site"
use_directory_urls = false
extra_css = ["site.css"]
nav = {nav}

[project.theme]
font = false
features = [
  "content.code.copy",
  "navigation.indexes",
  "navigation.prune",
  "navigation.tabs",
  "navigation.top",
  "toc.follow",
]

[project.plugins.search]

[project.plugins.mkdocstrings.handlers.python]
paths = ["{root}"]

[project.plugins.mkdocstrings.handlers.python.options]
docstring_style = "google"
docstring_options = {{ warn_missing_types = false }}
extensions = ["{extension}"]
filters = ["!^_"]
heading_level = 2
members_order = "source"
merge_init_into_class = true
separate_signature = true
show_root_heading = false
show_root_toc_entry = false
show_signature_annotations = true
show_source = false
"""


class Field(typing.NamedTuple):
  """A field of a config, as the reference shows it.

  Attributes:
    name: name of the field.
    hint: type that it is annotated with.
    default: value where nothing is set.
    meaning: entry under `Attributes`, of the class or of a base; '' if there is
      none.
  """

  name: str
  hint: Any
  default: Any
  meaning: str


def fields(cls: type) -> list[Field]:
  """Returns the fields of a config's class, in order."""
  hints = typing.get_type_hints(cls)
  meanings = {}
  for base in reversed(cls.__mro__):
    meanings |= _attributes(base.__dict__.get('__doc__') or '')
  return [
    Field(f.name, hints[f.name], _default(f), meanings.get(f.name, ''))
    for f in dataclasses.fields(cls)
  ]


def _attributes(doc: str) -> dict[str, str]:
  """Returns the entries under `Attributes` of a docstring, by name."""
  entries, inside, names = {}, False, []
  for line in inspect.cleandoc(doc).splitlines():
    if line and not line.startswith(' '):
      inside, names = line == 'Attributes:', []
    elif inside and (match := _ENTRY.fullmatch(line)):
      names = match[1].split(', ')
      entries |= dict.fromkeys(names, match[2])
    elif inside:
      entries |= {name: f'{entries[name]} {line.strip()}' for name in names}
  return entries


def _default(field: dataclasses.Field) -> Any:
  if field.default_factory is not dataclasses.MISSING:
    return field.default_factory()
  return field.default


def classes(hint: Any) -> list[type]:
  """Returns the config classes that a value of a type can hold."""
  if dataclasses.is_dataclass(hint):
    return [typing.cast(type, hint)]
  return [cls for part in typing.get_args(hint) for cls in classes(part)]


def walk(hint: Any, path: str) -> Iterator[tuple[type, str]]:
  """Yields each class of a config once, with the dotted name of its value."""
  queue, seen = [(cls, path) for cls in classes(hint)], set()
  while queue:
    cls, path = queue.pop(0)
    if cls not in seen:
      seen.add(cls)
      yield cls, path
      for field in fields(cls):
        below = f'{path}.{field.name}' if path else field.name
        queue += [(c, below) for c in classes(field.hint)]


def undocumented() -> list[str]:
  """Returns `Class.field` of each config field without a meaning."""
  return [
    f'{cls.__name__}.{field.name}'
    for cls, _ in walk(experiment.Experiment, '')
    for field in fields(cls)
    if not field.meaning
  ]


def _type(hint: Any) -> str:
  """Returns a type as the command line takes it, in Markdown."""
  if cls := classes(hint)[:1]:
    if typing.get_origin(hint) is tuple:
      return f'several of: {_type(typing.get_args(hint)[0])}'
    if dataclasses.is_dataclass(hint):
      name = getattr(hint, 'kind', cls[0].__name__)
      return f'[{name}](#{_anchor(cls[0])})'
    return ', '.join(_type(part) for part in typing.get_args(hint))
  if typing.get_origin(hint) is typing.Literal:
    return ', '.join(f'`{value}`' for value in typing.get_args(hint))
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    return ' or '.join(_type(part) for part in typing.get_args(hint))
  return overrides.describe(hint)


def _value(value: Any) -> str:
  """Returns a default as the command line takes it, in Markdown."""
  if value is dataclasses.MISSING:
    return 'required'
  if dataclasses.is_dataclass(value):
    return getattr(value, 'kind', 'its defaults')
  if isinstance(value, tuple):
    if any(dataclasses.is_dataclass(part) for part in value):
      return ', '.join(_value(part) for part in value)
    value = ','.join(map(str, value))
  if value is None or isinstance(value, bool):
    value = str(value).lower()
  return f'`{value}`' if value != '' else 'empty'


def _anchor(cls: type) -> str:
  return f'{cls.__module__}-{cls.__name__}'.replace('.', '-').lower()


def _class_section(cls: type, path: str) -> str:
  kind = getattr(cls, 'kind', None)
  title = f'{path}={kind}' if kind else path or cls.__name__
  doc = inspect.cleandoc(cls.__doc__ or '').partition('\nAttributes:')[0]
  doc = docs_entries.markdown(doc)
  depth = '##' if path.count('.') < 2 else '###'
  lines = [f'{depth} `{title}` {{ #{_anchor(cls)} }}', '', doc.strip(), '']
  if rows := fields(cls):
    lines += ['| field | type | default | meaning |', '|---|---|---|---|']
  for field in rows:
    (meaning,) = docs_entries.escaped([field.meaning])
    cells = _type(field.hint), _value(field.default), meaning
    cells = [cell.replace('|', '\\|') for cell in cells]
    lines.append(f'| `{field.name}` | {" | ".join(cells)} |')
  return '\n'.join([*lines, ''])


def config_pages() -> dict[str, str]:
  """Returns the reference of the config: a page for each part."""
  parts = fields(experiment.Experiment)
  lines = [
    '# Config reference',
    '',
    'An experiment is one value, `t2x.config.experiment.Experiment`. Any '
    'field is set by its dotted name: `--set train.num_steps=500`. A field '
    'that takes one of several kinds is set by the name of the kind, '
    '`--set model.attention=local`, and then its own fields can be set.',
    '',
    '| part | meaning |',
    '|---|---|',
  ]
  pages = {}
  for part in parts:
    if not classes(part.hint):
      lines.append(f'| `{part.name}` | {part.meaning} |')
      continue
    summary = part.meaning or classes(part.hint)[0].__doc__ or ''
    (summary,) = docs_entries.escaped(summary.splitlines()[:1])
    lines.append(f'| [`{part.name}`]({part.name}.md) | {summary} |')
    sections = [_class_section(*found) for found in walk(part.hint, part.name)]
    pages[f'config/{part.name}.md'] = '\n'.join(
      [f'# {part.name}', '', *sections]
    )
  return {'config/index.md': '\n'.join([*lines, '']), **pages}


def modules() -> dict[str, pathlib.Path]:
  """Returns the file of each module of t2x, by dotted name."""
  found = {}
  for path in sorted((ROOT / 't2x').rglob('*.py')):
    parts = path.relative_to(ROOT).with_suffix('').parts
    name = '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)
    found[name] = path
  return found


def _summary(path: pathlib.Path) -> str:
  doc = ast.get_docstring(ast.parse(path.read_text())) or ''
  (line,) = docs_entries.escaped([' '.join(doc.partition('\n\n')[0].split())])
  return line


def api_pages() -> dict[str, str]:
  """Returns a page for each module, and one for each package."""
  files = modules()
  pages = {}
  for name, path in files.items():
    lines = [f'# {name}', '']
    if path.name == '__init__.py':
      lines += [_summary(path), '', '| module | |', '|---|---|']
      for other, file in files.items():
        if other.rpartition('.')[0] == name:
          link = os.path.relpath(_api(other, files), _api(name, files) + '/..')
          lines.append(f'| [{other}]({link}) | {_summary(file)} |')
    else:
      lines.append(f'::: {name}')
    pages[_api(name, files)] = '\n'.join([*lines, ''])
  return pages


def _api(name: str, files: dict[str, pathlib.Path]) -> str:
  path = 'api/' + name.replace('.', '/')
  is_package = files[name].name == '__init__.py'
  return f'{path}/index.md' if is_package else f'{path}.md'


def _site_path(path: str) -> str | None:
  """Returns where the site has a file of the repository; None without it."""
  if path in _BESIDE:
    return _BESIDE[path]
  return path.removeprefix('docs/') if path.startswith('docs/') else None


def _relinked(text: str, path: str) -> str:
  """Returns a page of the repository with its links as the site needs them."""
  here = os.path.dirname(path)

  def replace(match: re.Match[str]) -> str:
    target = os.path.normpath(os.path.join(here, match[2]))
    there = _site_path(target)
    if '://' in match[2] or there is None:
      return match[0]
    own = os.path.dirname(_site_path(path) or '')
    return f'{match[1]}{os.path.relpath(there, own or ".")}{match[3]}'

  return _LINK.sub(replace, text)


def _nav() -> list[tuple[str, Any]]:
  title = lambda path: path.read_text().partition('\n')[0].removeprefix('# ')
  menu: list[tuple[str, Any]] = [('t2x', 'index.md')]
  named = {site: repo for repo, site in _BESIDE.items()}
  for name, pages in _MENU.items():
    files = [f'{page}.md' for page in pages.split()]
    menu.append(
      (name, [(title(ROOT / named.get(f, f'docs/{f}')), f) for f in files])
    )
  decisions = sorted((ROOT / 'docs' / 'decisions').glob('*.md'))
  entries = [(title(p), f'decisions/{p.name}') for p in decisions]
  menu[-1][1].append(('Decisions', entries))
  (_, first), *config = [(name[7:-3], name) for name in config_pages()]
  menu.append(('Config', [('Overview', first), *config]))
  files = modules()
  packages: list[tuple[str, Any]] = [('t2x', _api('t2x', files))]
  for package in [n for n in files if n.count('.') == 1]:
    own = [n for n in files if n.startswith(f'{package}.')]
    pages = [(n.rpartition('.')[2], _api(n, files)) for n in [package, *own]]
    short = package.removeprefix('t2x.')
    packages.append((short, pages if own else pages[0][1]))
  menu.append(('API', packages))
  return menu


def _toml(nav: Any) -> str:
  if isinstance(nav, str):
    return f'"{nav}"'
  return f'[{", ".join(f"{{{_toml(n)} = {_toml(v)}}}" for n, v in nav)}]'


def write(folder: pathlib.Path) -> None:
  """Writes the pages and the settings of the site into a folder."""
  pages = folder / 'pages'
  shutil.rmtree(pages, ignore_errors=True)
  shutil.copytree(ROOT / 'docs', pages)
  texts = {}
  for path in [ROOT / name for name in _BESIDE] + sorted(
    (ROOT / 'docs').rglob('*.md')
  ):
    name = str(path.relative_to(ROOT))
    site = _site_path(name)
    assert site is not None
    texts[site] = _relinked(path.read_text(), name)
  for name, text in (texts | config_pages() | api_pages()).items():
    path = pages / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  (pages / 'site.css').write_text(_STYLE)
  settings = _SETTINGS.format(nav=_toml(_nav()), root=ROOT, extension=EXTENSION)
  (folder / 'zensical.toml').write_text(settings)


if __name__ == '__main__':
  write(pathlib.Path(sys.argv[1]).absolute())

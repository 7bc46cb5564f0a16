"""Dotted overrides on trees of frozen dataclasses, and their JSON form.

A config is a frozen keyword-only dataclass whose fields are values or further
configs. A field that takes one of several classes (a union) is told apart by
the classes' `kind`, a `ClassVar[str]`.

  >>> import dataclasses
  >>> @dataclasses.dataclass(frozen=True, kw_only=True)
  ... class Optim:
  ...   learning_rate: float = 1e-3
  >>> override(Optim(), {'learning_rate': '3e-4'})
  Optim(learning_rate=0.0003)
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import difflib
import json
import logging
import math
import types
import typing
from typing import Any

_log = logging.getLogger(__name__)

MISSING = '(not set)'  # The value of a name that one of two configs has not.


def parse_settings(
  settings: Sequence[str],
  flag: str = 'set',
  example: str = 'model.num_layers=4',
) -> dict[str, str]:
  """Splits `name=value` strings; a later one for the same name wins.

  Args:
    settings: the strings.
    flag: name of the flag that they were given by, for messages.
    example: such a string, for messages.

  Raises:
    ValueError: a setting has no `=`.
  """
  result = {}
  for setting in settings:
    name, equals, value = setting.partition('=')
    if not equals or not name.strip():
      raise ValueError(
        f'--{flag} {setting!r} is not of the form dotted.name=value, for '
        f'example --{flag} {example}.'
      )
    result[name.strip()] = value.strip()
  return result


def override(config: Any, settings: Mapping[str, str]) -> Any:
  """Returns `config` with every dotted setting, rebuilt once, leaves first.

  Since nothing is built before all values are known, their order never
  matters and no half-set config is ever checked. Choosing another kind for a
  union field keeps the values of the fields that both kinds share.

  A config's `overruled` names fields that others, where they are not empty,
  stand for.

  Args:
    config: a frozen dataclass.
    settings: dotted name -> text; the text is parsed by the annotation.

  Raises:
    ValueError: an unknown name (the closest one is suggested), a value that
      does not fit the annotation, a field that is overruled, or whatever the
      configs themselves refuse.
  """
  tree: dict[str, Any] = {}
  for name, text in settings.items():
    node = tree
    if not all(name.split('.')):
      raise ValueError(
        f'{name!r} is no dotted name; write for example model.num_layers.'
      )
    for part in name.split('.'):
      node = node.setdefault(part, {})
    node[''] = text
  return _rebuild(type(config), config, tree, '')


def _rebuild(hint: Any, value: Any, tree: dict[str, Any], path: str) -> Any:
  """Applies the settings in `tree`, whose own value stands under ''."""
  if not tree:
    return value
  classes = _config_classes(hint)
  kind = _chosen_kind(tree, classes)
  if kind is not None and classes:
    if _accepts_none(hint) and kind.lower() == 'none':
      return None
    return _build(_by_kind(classes, kind, path), value, tree, path)
  if dataclasses.is_dataclass(value):
    return _build(type(value), value, tree, path)
  if isinstance(value, tuple) and '' not in tree:
    return _rebuild_tuple(hint, value, tree, path)
  if '' not in tree:
    raise ValueError(_no_fields_message(path, value, tree, classes))
  extra = next((name for name in tree if name), None)
  if extra is not None:
    raise ValueError(f'{_join(path, extra)!r}: {path!r} has no fields.')
  return parse(tree[''], hint, path)


def _chosen_kind(tree: dict[str, Any], classes: list[type]) -> str | None:
  if '' in tree and classes:
    return tree['']
  if 'kind' in tree and any(hasattr(c, 'kind') for c in classes):
    return tree['kind'].get('')
  return None


def _build(cls: type, old: Any, tree: dict[str, Any], path: str) -> Any:
  """Builds `cls` from the old value's shared fields and the settings."""
  fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
  hints = typing.get_type_hints(cls)
  values = {}
  if dataclasses.is_dataclass(old):
    shared = fields.keys() & {f.name for f in dataclasses.fields(old)}
    values = {name: getattr(old, name) for name in shared}
    if not isinstance(old, cls):
      _tell_lost(old, cls, path)
  for name, by in getattr(cls, 'overruled', {}).items():
    items = values.get(by)
    if name in tree and items and '' not in tree.get(by, {}):
      name, by = _join(path, name), _join(path, by)
      raise ValueError(
        f'{name!r} is set, and no layer would read it, since {by!r} has '
        f'{len(items)} items. Set {by}.0 to {by}.{len(items) - 1}, or {by}=().'
      )
  for name, subtree in tree.items():
    if name == '' or (name == 'kind' and hasattr(cls, 'kind')):
      continue
    if name not in fields:
      raise ValueError(_unknown_message(cls, name, _join(path, name), fields))
    current = values.get(name, _default(fields[name]))
    values[name] = _rebuild(hints[name], current, subtree, _join(path, name))
  return cls(**values)


def _tell_lost(old: Any, cls: type, path: str) -> None:
  """Logs the values of another kind that the new one has no field for."""
  kept = {f.name for f in dataclasses.fields(cls)}
  lost = [
    f'{f.name}={getattr(old, f.name)}'
    for f in dataclasses.fields(old)
    if f.name not in kept and getattr(old, f.name) != _default(f)
  ]
  if lost:
    kind = getattr(cls, 'kind', cls.__name__)
    _log.warning('%s=%s leaves out %s.', path, kind, ', '.join(lost))


def _rebuild_tuple(
  hint: Any, value: tuple[Any, ...], tree: dict[str, Any], path: str
) -> tuple[Any, ...]:
  items = list(value)
  item_hint = _item_hint(hint)
  for name, subtree in tree.items():
    if not name.isdigit() or int(name) >= len(items):
      known = (
        f'has {len(items)} items; name one by its index, 0 to {len(items) - 1}.'
        if items
        else 'is empty: list its items in Python, in the experiment.'
      )
      raise ValueError(f'{_join(path, name)!r}: {path!r} {known}')
    index = int(name)
    items[index] = _rebuild(item_hint, items[index], subtree, f'{path}.{name}')
  return tuple(items)


def parse(text: str, hint: Any, path: str = 'value') -> Any:
  """Parses `text` as the annotation `hint` says.

  Raises:
    ValueError: names `path`, the text and the type that is needed.
  """
  # A str takes any text, so it comes last, but before a tuple of one item;
  # None and bool must be spelled out.
  one = bool(text) and not set(',()[]') & set(text)
  last = [str, 'tuple'] if one else ['tuple', str]
  order = [type(None), bool, int, float, 'other', *last]
  rank = lambda t: order.index(
    t if t in order else 'tuple' if typing.get_origin(t) is tuple else 'other'
  )
  for member in sorted(_members(hint), key=rank):
    try:
      return _parse_as(text, member, path)
    except ValueError:
      continue
  raise ValueError(
    f'{path!r}: {text!r} does not fit the type {describe(hint)}.'
  )


def _parse_as(text: str, hint: Any, path: str) -> Any:
  lower = text.lower()
  if hint is type(None) and lower in ('none', 'null'):
    return None
  if hint is bool and lower in ('true', 'false', '1', '0'):
    return lower in ('true', '1')
  if hint is int:
    number = float(text) if 'e' in lower else int(text)
    if math.isfinite(number) and number == int(number):
      return int(number)
  if hint is float and not math.isnan(number := float(text)):
    return number
  if hint is str:
    return text
  origin = typing.get_origin(hint)
  if origin is typing.Literal:
    for choice in typing.get_args(hint):
      if str(choice) == text:
        return choice
  if origin is tuple:
    # Brackets around it all; those of `train[90%:]` belong to the item.
    bracketed = text[:1] + text[-1:] in ('()', '[]')
    inner = text[1:-1] if bracketed else text
    items = [item.strip() for item in inner.split(',') if item.strip()]
    return tuple(_parse_item(item, _item_hint(hint), path) for item in items)
  raise ValueError


def _parse_item(text: str, hint: Any, path: str) -> Any:
  classes = _config_classes(hint)
  if classes:
    return _by_kind(classes, text, path)()
  return parse(text, hint, path)


def to_json(config: Any) -> Any:
  """Returns dicts, lists and scalars; each dict of a union keeps its kind."""
  if dataclasses.is_dataclass(config):
    fields = dataclasses.fields(config)
    values = {f.name: to_json(getattr(config, f.name)) for f in fields}
    kind = getattr(config, 'kind', None)
    return {'kind': kind, **values} if kind else values
  if isinstance(config, tuple):
    return [to_json(item) for item in config]
  return config


def from_json(hint: Any, data: Any, path: str = '') -> Any:
  """Inverse of `to_json`; `hint` is the class, or the annotation.

  Raises:
    ValueError: a field that the class does not have, an unknown kind, or a
      value that does not fit the annotation.
  """
  classes = _config_classes(hint)
  if isinstance(data, dict) and classes:
    data = dict(data)
    kind = data.pop('kind', None)
    if not isinstance(kind, str | None):
      raise ValueError(f'{_join(path, "kind")!r}: {kind!r} is not text.')
    cls = _by_kind(classes, kind, path) if kind else classes[0]
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for name in data:
      if name not in fields:
        raise ValueError(_unknown_message(cls, name, _join(path, name), fields))
    return cls(
      **{
        name: from_json(hints[name], value, _join(path, name))
        for name, value in data.items()
      }
    )
  if isinstance(data, list) and _item_hint(hint) is not None:
    item = _item_hint(hint)
    return tuple(from_json(item, value, path) for value in data)
  if not any(_fits(data, member) for member in _members(hint)):
    raise ValueError(
      f'{path!r}: {data!r} does not fit the type {describe(hint)}.'
    )
  return data


def _fits(data: Any, hint: Any) -> bool:
  if typing.get_origin(hint) is typing.Literal:
    return data in typing.get_args(hint)
  if isinstance(data, bool):
    return hint is bool
  if isinstance(data, int):
    return hint in (int, float)
  if isinstance(data, float) and math.isnan(data):
    return False  # As on the command line.
  return isinstance(hint, type) and isinstance(data, hint)


def dumps(config: Any) -> str:
  """Returns `config` as indented JSON text."""
  return json.dumps(to_json(config), indent=2) + '\n'


def flatten(data: Any, path: str = '') -> dict[str, Any]:
  """Returns dotted name -> scalar for the JSON form of a config."""
  if isinstance(data, dict):
    items = data.items()
  elif isinstance(data, list) and data:
    items = enumerate(data)
  else:
    return {path: data}
  result = {}
  for name, value in items:
    result.update(flatten(value, _join(path, str(name))))
  return result


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
  """Returns dotted name -> (old, new) where two JSON forms differ."""
  a, b = flatten(old), flatten(new)
  names = [*a, *(name for name in b if name not in a)]
  pairs = {n: (a.get(n, MISSING), b.get(n, MISSING)) for n in names}
  return {n: pair for n, pair in pairs.items() if pair[0] != pair[1]}


def describe(hint: Any) -> str:
  """Returns an annotation in words, for messages."""
  if typing.get_origin(hint) is typing.Literal:
    return 'one of ' + ', '.join(map(repr, typing.get_args(hint)))
  if len(_members(hint)) > 1:
    return ' or '.join(describe(member) for member in _members(hint))
  if hint is type(None):
    return 'none'
  if typing.get_origin(hint) is tuple:
    return f'{describe(typing.get_args(hint)[0])}s separated by commas'
  return hint.__name__ if isinstance(hint, type) else str(hint)


def _members(hint: Any) -> list[Any]:
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    return [m for arg in typing.get_args(hint) for m in _members(arg)]
  return [hint]


def _config_classes(hint: Any) -> list[Any]:
  return [m for m in _members(hint) if dataclasses.is_dataclass(m)]


def _accepts_none(hint: Any) -> bool:
  return type(None) in _members(hint)


def _item_hint(hint: Any) -> Any:
  for member in _members(hint):
    if typing.get_origin(member) is tuple:
      return typing.get_args(member)[0]
  return None


def _by_kind(classes: list[type], kind: str, path: str) -> type:
  kinds = {cls.kind: cls for cls in classes if hasattr(cls, 'kind')}
  if not kinds:
    names = ', '.join(f.name for f in dataclasses.fields(classes[0]))
    raise ValueError(
      f'{path!r} is a group of settings and takes no value itself; set one '
      f'of its fields, {path}.NAME=VALUE with NAME among {names}.'
    )
  if kind not in kinds:
    close = difflib.get_close_matches(kind, kinds, n=1, cutoff=0.5)
    hint = f' Did you mean {close[0]!r}?' if close else ''
    raise ValueError(
      f'{path!r}: there is no kind {kind!r}; the kinds are '
      f'{", ".join(kinds)}.{hint}'
    )
  return kinds[kind]


def _default(field: dataclasses.Field) -> Any:
  if field.default is not dataclasses.MISSING:
    return field.default
  if field.default_factory is not dataclasses.MISSING:
    return field.default_factory()
  return None


def _unknown_message(
  cls: type, name: str, path: str, fields: Mapping[str, Any]
) -> str:
  close = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
  hint = (
    f'Did you mean {close[0]!r}?' if close else f'It has {", ".join(fields)}.'
  )
  return f'{path!r}: {cls.__name__} has no {name!r}. {hint}'


def _no_fields_message(
  path: str, value: Any, tree: dict[str, Any], classes: Sequence[type]
) -> str:
  name = next(iter(tree))
  if classes:
    kinds = ', '.join(getattr(c, 'kind', c.__name__) for c in classes)
    return (
      f'{_join(path, name)!r}: {path!r} is {value!r}; choose what it is '
      f'first, --set {path}=KIND with one of {kinds}.'
    )
  return f'{_join(path, name)!r}: {path!r} is {value!r} and has no fields.'


def _join(path: str, name: str) -> str:
  return f'{path}.{name}' if path else name

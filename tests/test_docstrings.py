"""Docstrings begin with nouns, everything public has one, all is annotated.

`python tests/docstrings.py` prints what is missing, with file and line.
"""

import ast
import collections

import docstrings
import pytest

# Trees of arrays, libraries that are imported late, JSON: there it is true.
_MOST_ANY = 205
# One name for two things that the field calls so: of a pipeline, of a rate.
_SHARED = {'Schedule'}


@pytest.fixture(scope='module')
def found():
  return [f for path in docstrings.files() for f in docstrings.findings(path)]


@pytest.mark.parametrize(
  'kind', ['vague', 'undocumented', 'parameters', 'results']
)
def test_nothing_is_missing(found, kind):
  missing = [f'{f.file}:{f.line}: {f.text}' for f in found if f.kind == kind]
  assert not missing, '\n'.join(missing)


def test_any_stays_rare(found):
  assert sum(f.kind == 'any' for f in found) <= _MOST_ANY


def test_a_class_has_a_name_of_its_own():
  places = collections.defaultdict(list)
  for path in docstrings.files():
    for node in ast.parse(path.read_text()).body:
      if isinstance(node, ast.ClassDef) and not node.name.startswith('_'):
        places[node.name].append(f'{path.parent.name}/{path.name}')
  shared = {n: p for n, p in places.items() if len(p) > 1}
  assert not shared.keys() - _SHARED, shared


_SOURCE = '''
def shape(rows, sizes):
  """Returns what is split.

  Args:
    rows: of the batch.
    sizes: the number of devices along each axis.
  """

class Kept:
  def own(self, x: int) -> int:
    return x
'''


def test_the_check_finds_what_is_missing(tmp_path, monkeypatch):
  file = tmp_path / 'sample.py'
  file.write_text(_SOURCE)
  monkeypatch.setattr(docstrings, 'ROOT', tmp_path)
  kinds = collections.Counter(f.kind for f in docstrings.findings(file))
  assert kinds == {
    'vague': 2,  # The summary, and `rows`.
    'undocumented': 3,  # The module, the class, its method.
    'parameters': 2,
    'results': 1,
  }

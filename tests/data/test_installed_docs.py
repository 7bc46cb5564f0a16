import ast
import pathlib
import re
import sys
import textwrap

from t2x.data import installed_docs

PROSE = (
  'This is a sentence of the kind that the documentation of a library is made '
  'of: it says what a function does, and which of the values it can be given. '
) * 2


def test_docstrings_are_found_and_other_strings_are_not():
  code = f'''
x = """
{PROSE} not this
"""
def f():
  """{PROSE} first"""
  y = """{PROSE} nor this"""
  return """{PROSE} nor that"""

class C:
  r\'\'\'Second \\d.

  {PROSE}
    indented more
  \'\'\'
'''
  first, second = installed_docs._docstrings(code)
  assert first == f'{PROSE} first'
  assert second.startswith('Second \\d.\n\nThis is')
  assert second.endswith('\n  indented more')


def test_docstrings_agree_with_the_parser():
  for module in (textwrap, ast, pathlib, re):
    code = pathlib.Path(module.__file__).with_suffix('.py').read_text()
    expected = set()
    for node in ast.walk(ast.parse(code)):
      if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
        docstring = ast.get_docstring(node)
        if docstring and len(docstring) >= 250:
          expected.add(docstring.strip())
    found = {d.strip() for d in installed_docs._docstrings(code)}
    assert expected <= found


def test_prose_is_told_from_code_and_tables():
  assert installed_docs._is_prose(PROSE)
  assert not installed_docs._is_prose('too short, and it is the end of it')
  assert not installed_docs._is_prose('x = f(a[i], b[j]) ** 2 + 1\n' * 30)
  assert not installed_docs._is_prose('tench goldfish shark hammerhead\n' * 30)
  assert not installed_docs._is_prose('0.1 the 0.25 of 3.5 and 1e-3 is\n' * 30)


def test_description_of_a_package_comes_without_its_headers(tmp_path):
  (tmp_path / 'METADATA').write_text(f'Name: x\nVersion: 1\n\n{PROSE}\n')
  passages = installed_docs._passages(tmp_path / 'METADATA')
  assert passages == [PROSE.strip()]


def test_only_what_the_core_needs_is_read():
  names = set(installed_docs._distributions())
  assert {'jax', 'numpy', 'scipy', 'tensorflow-datasets'} <= names
  assert not {'torch', 'transformers', 'jupyterlab', 't2x'} & names


def test_key_is_stable():
  assert installed_docs.key() == installed_docs.key()


def test_files_have_names_without_machine_paths():
  files = list(installed_docs._files())
  names = [name for name, _ in files]
  assert len(names) == len(set(names)) > 1000
  assert 'python/asyncio/locks.py' in names
  assert not [n for n in names if n.startswith('/') or sys.prefix in n]
  assert not [n for n in names if re.search('licen[cs]e', n, re.IGNORECASE)]

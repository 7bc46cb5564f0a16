"""Every notebook runs from top to bottom, draws its figures, and is clean."""

import pathlib

import jax
import nbclient
import nbformat
import pytest

_FOLDER = pathlib.Path(__file__).parents[2] / 'experiments' / 'notebooks'
_PATHS = sorted(_FOLDER.glob('*.ipynb'))


def _code_cells(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == 'code']


def _figures(cell):
  return [o for o in cell.outputs if 'image/png' in o.get('data', {})]


def test_there_are_notebooks():
  assert 'modules.ipynb' in [path.name for path in _PATHS]


@pytest.mark.parametrize('path', _PATHS, ids=lambda path: path.stem)
def test_a_notebook_is_saved_clean(path):
  notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
  nbformat.validate(notebook)
  assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
  for cell in _code_cells(notebook):
    assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.slow
@pytest.mark.parametrize('path', _PATHS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_draws(path, tmp_path, monkeypatch):
  # The kernel inherits these: strict shapes, and what tests have compiled.
  monkeypatch.setenv('JAX_NUMPY_RANK_PROMOTION', 'raise')
  cache = jax.config.jax_compilation_cache_dir
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', cache)
  monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
  # Nothing of this user's settings, history or kernels.
  monkeypatch.setenv('IPYTHONDIR', str(tmp_path))
  monkeypatch.setenv('JUPYTER_DATA_DIR', str(tmp_path))
  notebook = nbformat.read(path, as_version=4)
  client = nbclient.NotebookClient(
    notebook,
    kernel_name='python3',
    timeout=600,
    resources={'metadata': {'path': str(tmp_path)}},
  )
  client.execute()
  for cell in _code_cells(notebook):
    assert cell.execution_count, cell.source
    for output in cell.outputs:
      assert output.output_type != 'error', output
      # A warning would greet every reader.
      assert output.get('name') != 'stderr', output.text
    draws = 'plt.show()' in cell.source
    assert len(_figures(cell)) == draws, cell.source

"""The tests that a run left out, as an extra was missing, and those alone.

A whole run notes them where pytest keeps its cache; with --skipped the next one
runs nothing else. So an environment with more extras need not run all anew.
"""

import pytest

_KEY = 't2x/skipped'


class Skipped:
  """Notes what is skipped for want of an extra; a plugin of pytest."""

  def __init__(self, config: pytest.Config, reason: str):
    """Makes the plugin.

    Args:
      config: of the run.
      reason: words that such skips begin with.
    """
    self._config = config
    self._reason = reason
    self._noted: set[str] = set()
    # A worker of pytest-xdist says what it has seen; the others write it down.
    self._output = getattr(config, 'workeroutput', None)
    wanted = config.getoption('skipped')
    self._chosen = set(config.cache.get(_KEY, [])) if wanted else None

  def pytest_collectreport(self, report: pytest.CollectReport) -> None:
    self._note(report)

  def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
    self._note(report)

  def _note(self, report) -> None:
    said = report.longrepr[-1] if report.skipped else ''
    if said.removeprefix('Skipped: ').startswith(self._reason):
      self._noted.add(report.nodeid)

  def pytest_ignore_collect(self, collection_path) -> bool | None:
    """Leaves out files without a test that was skipped."""
    if self._chosen is None or not collection_path.is_file():
      return None
    name = collection_path.relative_to(self._config.rootpath).as_posix()
    files = {node.partition('::')[0] for node in self._chosen}
    return True if name not in files else None

  def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
    if self._chosen is not None:
      # A file whose import was skipped is noted whole.
      items[:] = [
        item
        for item in items
        if {item.nodeid, item.nodeid.partition('::')[0]} & self._chosen
      ]

  @pytest.hookimpl(optionalhook=True)
  def pytest_testnodedown(self, node, error) -> None:
    del error
    self._noted.update(getattr(node, 'workeroutput', {}).get(_KEY, ()))

  def pytest_sessionfinish(self) -> None:
    if self._output is not None:
      self._output[_KEY] = sorted(self._noted)
    elif self._chosen is None and not self._config.getoption('collectonly'):
      self._config.cache.set(_KEY, sorted(self._noted))

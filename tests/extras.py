"""Packages that tests need and `bash scripts/test.sh` does not install."""

from typing import Any

import pytest

REASON = 'needs the extra'


def need(module: str, *, extra: str) -> Any:
  """Returns a module, or skips the test with the name of the extra it is in.

  Args:
    module: name of the module, such as `torch`.
    extra: name of the extra of setup.py that installs it.
  """
  # `exc_type`: a package that is there but broken is an error, not a skip.
  return pytest.importorskip(
    module,
    reason=f'{REASON} {extra}: bash scripts/setup.sh {extra}',
    exc_type=ModuleNotFoundError,
  )

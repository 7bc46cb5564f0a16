"""The launchers by name; each is imported once it is chosen."""

from collections.abc import Sequence
import dataclasses

from t2x.config import overrides
from t2x.sweeps.launchers import launcher as launcher_lib
from t2x.sweeps.launchers import local

LauncherConfig = local.Local
KINDS = ('local',)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Chosen:
  """A launcher's config, as a field for `overrides`."""

  launcher: LauncherConfig = local.Local()


def make(kind: str, settings: Sequence[str] = ()) -> launcher_lib.Launcher:
  """Returns a launcher.

  Args:
    kind: one of `KINDS`.
    settings: its settings, as `name=value`.

  Raises:
    ValueError: there is no such launcher, or a setting that it has not.
  """
  given = overrides.parse_settings(settings)
  named = {f'launcher.{name}': value for name, value in given.items()}
  config = overrides.override(_Chosen(), {'launcher': kind, **named}).launcher
  return local.LocalLauncher(config)

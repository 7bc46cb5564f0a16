"""The launchers by name; what they need is imported once one is chosen."""

from collections.abc import Sequence
import dataclasses

from t2x.config import overrides
from t2x.sweeps.launchers import gke
from t2x.sweeps.launchers import launcher as launcher_lib
from t2x.sweeps.launchers import local
from t2x.sweeps.launchers import ray_cluster
from t2x.sweeps.launchers import skypilot
from t2x.sweeps.launchers import slurm
from t2x.sweeps.launchers import tpu_vm

LauncherConfig = (
  local.LocalConfig
  | ray_cluster.RayConfig
  | slurm.SlurmConfig
  | gke.GkeConfig
  | tpu_vm.TpuVmConfig
  | skypilot.SkyPilotConfig
)
_LAUNCHERS = {
  'local': local.LocalLauncher,
  'ray': ray_cluster.RayLauncher,
  'slurm': slurm.SlurmLauncher,
  'gke': gke.GkeLauncher,
  'tpu_vm': tpu_vm.TpuVmLauncher,
  'skypilot': skypilot.SkyPilotLauncher,
}
KINDS = tuple(_LAUNCHERS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Chosen:
  """A launcher's config, as a field for `overrides`.

  Attributes:
    launcher: the config; None before one is chosen, so that no kind takes over
      what another has.
  """

  launcher: LauncherConfig | None = None


def make(kind: str, settings: Sequence[str] = ()) -> launcher_lib.Launcher:
  """Returns a launcher.

  Args:
    kind: one of `KINDS`.
    settings: its settings, as `name=value`.

  Raises:
    ValueError: there is no such launcher, or a setting that it has not.
  """
  given = overrides.parse_settings(settings, 'launcher_set', 'devices=8')
  named = {f'launcher.{name}': value for name, value in given.items()}
  config = overrides.override(_Chosen(), {'launcher': kind, **named}).launcher
  if config is None:
    raise ValueError(f'--launcher={kind}: it is one of {", ".join(KINDS)}.')
  return _LAUNCHERS[kind](config)

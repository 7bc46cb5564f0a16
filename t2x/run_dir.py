"""What a run leaves in its workdir besides checkpoints and metrics.

config.json, versions.json, history.jsonl (changed settings) and tokenizer/.
"""

import importlib.metadata as importlib_metadata
import json
import logging
import platform
import subprocess
from typing import Any

from etils import epath

from t2x import config as config_lib
from t2x import experiment
from t2x.data import tokenizers

_log = logging.getLogger(__name__)

_PACKAGES = (
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'grain',
  'tensorflow-datasets',
  'sentencepiece',
  'numpy',
)


def path(workdir: str) -> epath.Path:
  """Returns the workdir as a path, local or gs://."""
  return epath.Path(workdir).expanduser()


def write(
  workdir: str,
  config: experiment.Experiment,
  tokenizer: tokenizers.Tokenizer,
  *,
  allow_change: bool = False,
) -> None:
  """Writes the resolved config before step 0, or checks it on resume.

  Raises:
    ValueError: the workdir holds a run whose model, data, optimizer or seed
      differs and `allow_change` is False; every difference is listed.
  """
  root = path(workdir)
  new = config_lib.to_json(config)
  old_path = root / 'config.json'
  if old_path.exists():
    old = json.loads(old_path.read_text())
    _check_changes(root, config_lib.differences(old, new), allow_change)
  root.mkdir(parents=True, exist_ok=True)
  old_path.write_text(config_lib.dumps(config))
  _write_versions(root / 'versions.json')
  tokenizer.save(root / 'tokenizer')


def read_config(workdir: str) -> experiment.Experiment:
  """Returns the config of a run.

  Raises:
    ValueError: there is no run in `workdir`.
  """
  file = path(workdir) / 'config.json'
  if not file.exists():
    raise ValueError(
      f'{workdir} holds no run: it has no config.json. Name the --workdir of '
      'an experiment that has started.'
    )
  return load_config(str(file))


def load_config(file: str) -> experiment.Experiment:
  """Returns the config saved in a file.

  Raises:
    ValueError: no such file, or a field that no longer exists.
  """
  if not path(file).exists():
    raise ValueError(f'--config={file}: there is no such file.')
  data = json.loads(path(file).read_text())
  return config_lib.from_json(experiment.Experiment, data)


def versions() -> dict[str, str]:
  """Returns the versions of Python, of packages, and the git revision."""
  result = {'python': platform.python_version()}
  for name in _PACKAGES:
    result[name] = importlib_metadata.version(name)
  revision = _git_revision()
  return {**result, 'git': revision} if revision else result


def _check_changes(root, changes, allow_change: bool) -> None:
  free = {n: c for n, c in changes.items() if _may_change(n)}
  fixed = {n: c for n, c in changes.items() if n not in free}
  if fixed and not allow_change:
    lines = [f'  {n}: {old!r} -> {new!r}' for n, (old, new) in fixed.items()]
    raise ValueError(
      f'{root} holds a run with other settings:\n'
      + '\n'.join(lines)
      + '\nUse another --workdir, undo the changes, or go on all the same with '
      '--allow_config_change.'
    )
  if changes:
    for name, (old, new) in changes.items():
      _log.info('changed since the last start: %s: %r -> %r', name, old, new)
    with (root / 'history.jsonl').open('a') as f:
      f.write(json.dumps({'changes': changes}) + '\n')


def _may_change(name: str) -> bool:
  return any(
    name.startswith(m)
    if m.endswith('.')
    else name == m or name.startswith(m + '.')
    for m in experiment.MAY_CHANGE
  )


def _write_versions(file: Any) -> None:
  new = versions()
  if file.exists():
    old = json.loads(file.read_text())
    for name, pair in config_lib.differences(old, new).items():
      _log.warning('%s was %s when the run started, and is %s.', name, *pair)
  file.write_text(json.dumps(new, indent=2) + '\n')


def _git_revision() -> str | None:
  root = epath.Path(__file__).parent
  command = ['git', '-C', str(root), 'describe', '--always', '--dirty']
  try:
    result = subprocess.run(command, capture_output=True, text=True, timeout=10)
  except (OSError, subprocess.TimeoutExpired):
    return None
  return result.stdout.strip() or None if result.returncode == 0 else None

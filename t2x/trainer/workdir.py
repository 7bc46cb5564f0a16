"""What a run leaves in its workdir besides checkpoints and metrics.

config.json, versions.json, numbers.json (the changes of what is computed that
it knows; see `t2x.config.number_changes`), history.jsonl (changed settings, and
those that it came to know), tokenizer/, schedule.csv, the last table of one's
own that its stages ran, labels.json, the labels of each class head in the
order of its classes, and finished.json, once all steps are taken, or
stopped.json.
"""

from collections.abc import Sequence
import importlib.metadata as importlib_metadata
import itertools
import json
import logging
import platform
import subprocess
from typing import Any

from etils import epath

from t2x import files
from t2x import reading
from t2x.config import experiment
from t2x.config import number_changes
from t2x.config import overrides
from t2x.data import corpus as corpus_lib
from t2x.data import tokenizer_loading
from t2x.data import tokenizers
from t2x.data import words
from t2x.tracking import metrics

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


_TABLE = 'schedule.csv'
LABELS = 'labels.json'
NUMBERS = 'numbers.json'
CORPUS = 'corpus.json'  # The text's fingerprint, and what was dropped of it.
CALIBRATION = 'calibration.json'
FINISHED = 'finished.json'  # The step at which the run had taken all its steps.
STOPPED = 'stopped.json'  # The step after which it was told to stop, and did.
HUGGINGFACE = 'huggingface.json'  # The config.json that a run came with.
GENERATION = 'generation_config.json'  # The same of how its texts are written.
Changes = dict[str, tuple[Any, Any]]


def check(
  workdir: str, config: experiment.Experiment, *, allow_change: bool = False
) -> Changes:
  """Compares `config` with that of the run in `workdir`, if there is one.

  Returns:
    Dotted name -> (old, new) of every setting that differs.

  Raises:
    ValueError: model, data, optimizer or seed differ, steps were taken and
      `allow_change` is False; every difference is listed.
  """
  file = files.path(workdir) / 'config.json'
  if not file.exists():
    return {}
  changes = overrides.differences(_read(file), overrides.to_json(config))
  # A setting that came since, and that is none, changes nothing.
  missing = overrides.MISSING
  changes = {n: c for n, c in changes.items() if c != (missing, None)}
  changes |= _change_of_table(workdir, config)
  fixed = {n: c for n, c in changes.items() if not _may_change(n)}
  if fixed and not allow_change and _has_steps(workdir):
    lines = [f'  {n}: {old!r} -> {new!r}' for n, (old, new) in fixed.items()]
    lines += [_OTHER_COPIES] if _had_other_copies(fixed) else []
    raise ValueError(
      f'{workdir} holds a run with other settings:\n'
      + '\n'.join(lines)
      + '\nUse another --workdir, undo the changes, or go on all the same with '
      '--allow_config_change.'
    )
  return changes


_OTHER_COPIES = (
  'The run is older than the setting data.duplicates: documents with the same '
  'words were dropped as copies then, which no value of it does. Going on, it '
  'reads more documents, and may train on some that it evaluated.'
)


def _had_other_copies(changes: Changes) -> bool:
  missing = overrides.MISSING
  return changes.get('data.duplicates', (None, None))[0] == missing


def _has_steps(workdir: str) -> bool:
  """Whether there is anything that other settings would spoil."""
  root = files.path(workdir)
  saved = root / 'checkpoints'
  found = saved.exists() and any(p.name.isdigit() for p in saved.iterdir())
  return found or bool(metrics.read_rows(root))


def write(
  workdir: str,
  config: experiment.Experiment,
  corpus: corpus_lib.Corpus,
  changes: Changes,
  step: int = 0,
) -> None:
  """Writes what the run is, and logs the changes that `check` returned.

  Args:
    workdir: directory of the run.
    config: the experiment of the run.
    corpus: the prepared text that it reads.
    changes: settings that changed since the last start.
    step: the step that it goes on from.
  """
  root = files.path(workdir)
  root.mkdir(parents=True, exist_ok=True)
  for name, (old, new) in changes.items():
    _log.info('changed since the last start: %s: %r -> %r', name, old, new)
  if changes:
    _add_to_history(root, {'step': step, 'changes': changes})
  _tell_of_numbers(root, config)
  files.write_whole(root / 'config.json', overrides.dumps(config))
  table = _own_table(config)
  if table is not None:
    files.write_whole(root / _TABLE, table)
  labels = words.label_texts(config.data, corpus)
  if labels:
    write_labels(workdir, labels)
  write_versions(workdir)
  if read_tokenizer(workdir, changes) is None:
    corpus.tokenizer.save(root / 'tokenizer')
  # Last: its presence says that the tokenizer is whole.
  files.write_whole(
    root / CORPUS, json.dumps(_corpus_facts(corpus), indent=1) + '\n'
  )


def _tell_of_numbers(root: epath.Path, config: experiment.Experiment) -> None:
  """Tells a run that has taken steps what is computed otherwise since."""
  file = root / NUMBERS
  known = _read(file) if file.exists() else []
  new = number_changes.since(known, config) if _has_steps(str(root)) else ()
  for change in new:
    _log.warning(
      'This run began before %s, when its numbers changed: %s It goes on by '
      'the new rule; begin anew in another workdir for one rule throughout.',
      change.date,
      change.text,
    )
  if new:
    _add_to_history(root, {'numbers': [change.name for change in new]})


def _add_to_history(root: epath.Path, entry: dict[str, Any]) -> None:
  """Adds a line; read and written whole, as an object takes no appending."""
  file = root / 'history.jsonl'
  text = file.read_text() if file.exists() else ''
  files.write_whole(file, text + json.dumps(entry) + '\n')


def _corpus_facts(corpus: corpus_lib.Corpus) -> dict[str, Any]:
  """Returns the text's fingerprint and, by task, what its documents became."""
  parts = corpus.tasks or {'': corpus}
  documents = {name: own.documents for name, own in parts.items()}
  found = {name: facts for name, facts in documents.items() if facts}
  return {'id': corpus.fingerprint, 'documents': found}


def batch_size_at(workdir: str, step: int) -> int | None:
  """Returns the batch size that led to a step, by the settings; or None.

  Of a start that changed it and saved nothing after, the one before.
  """
  root = files.path(workdir)
  if not (root / 'config.json').exists():
    return None
  size = _read(root / 'config.json').get('data', {}).get('batch_size')
  file = root / 'history.jsonl'
  lines = file.read_text().splitlines() if file.exists() else []
  for line in reversed(lines):
    entry = json.loads(line)
    if entry.get('step', -1) >= step:
      size, _ = entry['changes'].get('data.batch_size', (size, None))
  return size


def _own_table(config: experiment.Experiment) -> str | None:
  """Returns the text of the table that stages run, if it is one's own."""
  file = files.path(config.pipeline.schedule)
  if config.mesh.pipe == 1 or not config.pipeline.own_table:
    return None
  return reading.text(file) if file.exists() else None


def _change_of_table(workdir: str, config: experiment.Experiment) -> Changes:
  """Returns whether a table has other lines than the run's copy."""
  kept, table = files.path(workdir) / _TABLE, _own_table(config)
  if table is None or not kept.exists():
    return {}
  lines = [text.splitlines() for text in (reading.text(kept), table)]
  if lines[0] == lines[1]:
    return {}
  pairs = enumerate(itertools.zip_longest(*lines), 1)
  number, (old, new) = next(
    (n, pair) for n, pair in pairs if pair[0] != pair[1]
  )
  return {f'pipeline.schedule, line {number} of the table': (old, new)}


def read_tokenizer(
  workdir: str, changes: Changes | None = None
) -> tokenizers.Tokenizer | None:
  """Returns the tokenizer that a run reads on with.

  None before the run has taken steps, and where `changes` ask for another.
  """
  started = (files.path(workdir) / CORPUS).exists()
  started = started and _has_steps(workdir)
  if not started or any(n.startswith('data.tokenizer') for n in changes or ()):
    return None
  return tokenizer_loading.load(files.path(workdir) / 'tokenizer')


def check_corpus(workdir: str, fingerprint: str, *, allow_change: bool) -> None:
  """Raises ValueError if a run would go on with another text."""
  file = files.path(workdir) / CORPUS
  if not file.exists() or allow_change or not _has_steps(workdir):
    return
  old = read_corpus(workdir)
  if old != fingerprint:
    raise ValueError(
      f'{workdir} holds a run on another text: its corpus was {old} and is now '
      f'{fingerprint} (files, installed packages or the rule of copies, data.'
      'duplicates, have changed). Restore the text, use another --workdir, or '
      'go on all the same with --allow_config_change.'
    )


def read_corpus(workdir: str) -> str | None:
  """Returns the fingerprint of the text that a run reads, if it has begun."""
  file = files.path(workdir) / CORPUS
  return _read(file)['id'] if file.exists() else None


def write_end(workdir: str, step: int, *, finished: bool) -> None:
  """Notes that a run has ended as it should, and has saved its last step.

  Args:
    workdir: directory of the run.
    step: its last step.
    finished: whether it has taken all its steps, or was told to stop there.
  """
  file = files.path(workdir) / (FINISHED if finished else STOPPED)
  files.write_whole(file, json.dumps({'step': step}) + '\n')


def finished_step(workdir: epath.PathLike) -> int | None:
  """Returns the step at which a run had taken all its steps, if it has.

  A run that goes on for longer has rows of later steps.
  """
  return _step_of(workdir, FINISHED)


def stopped_step(workdir: epath.PathLike) -> int | None:
  """Returns the step after which a run was last told to stop, if it was."""
  return _step_of(workdir, STOPPED)


def _step_of(workdir: epath.PathLike, name: str) -> int | None:
  file = files.path(workdir) / name
  return _read(file)['step'] if file.exists() else None


def write_labels(workdir: str, labels: dict[str, list[str]]) -> None:
  """Writes the labels of each class head, in the order of its classes.

  Raises:
    ValueError: a head of the run has others.
  """
  old = read_labels(workdir)
  for name in set(old) & set(labels):
    if old[name] != labels[name]:
      raise ValueError(
        f'{files.path(workdir) / LABELS} has the labels {old[name]} of '
        f'{name}, in the order of its classes, and the training text has '
        f'{labels[name]}. Set data.objective.labels={",".join(old[name])} for '
        'the same order, or use another --workdir.'
      )
  text = json.dumps({**old, **labels}, indent=1) + '\n'
  files.write_whole(files.path(workdir) / LABELS, text)


def read_labels(workdir: str) -> dict[str, list[str]]:
  """Returns the labels of each class head, by the name of its term."""
  file = files.path(workdir) / LABELS
  return _read(file) if file.exists() else {}


def read_huggingface(workdir: str) -> dict[str, Any] | None:
  """Returns the config.json of Hugging Face that a run came with, if it did."""
  file = files.path(workdir) / HUGGINGFACE
  return _read(file) if file.exists() else None


def read_generation(workdir: str) -> dict[str, Any] | None:
  """Returns the generation_config.json that a run came with, if it did."""
  file = files.path(workdir) / GENERATION
  return _read(file) if file.exists() else None


def read_temperature(workdir: str) -> float:
  """Returns the divisor of the run's logits; see `calibration`."""
  file = files.path(workdir) / CALIBRATION
  return float(_read(file)['temperature']) if file.exists() else 1.0


def read_config(workdir: str) -> experiment.Experiment:
  """Returns the config of a run.

  Raises:
    ValueError: there is no run in `workdir`.
  """
  file = files.path(workdir) / 'config.json'
  if not file.exists():
    raise ValueError(
      f'{workdir} holds no run: it has no config.json. Name the --workdir of '
      'an experiment that has started.'
    )
  return load_config(str(file))


def load_config(file: str) -> experiment.Experiment:
  """Returns the config saved in a file.

  Raises:
    ValueError: no such file, one that is not JSON, or a field or a value that
      cannot be.
  """
  if not files.path(file).exists():
    raise ValueError(
      f'--config={file}: there is no such file. A run keeps its own in '
      'WORKDIR/config.json.'
    )
  data = _read(files.path(file))
  if not isinstance(data, dict):
    raise ValueError(
      f'--config={file} holds no config: it is a JSON object, and here is '
      f'{json.dumps(data)[:40]}.'
    )
  return overrides.from_json(experiment.Experiment, data)


def versions() -> dict[str, str]:
  """Returns the versions of Python, of packages, and the git revision."""
  result = {'python': platform.python_version()}
  for name in _PACKAGES:
    result[name] = importlib_metadata.version(name)
  revision = _git_revision()
  return {**result, 'git': revision} if revision else result


def _may_change(name: str) -> bool:
  return any(
    name.startswith(m)
    if m.endswith('.')
    else name == m or name.startswith(m + '.')
    for m in experiment.MAY_CHANGE
  )


def write_versions(workdir: str) -> None:
  """Writes the versions of Python, of packages and of numbers, and of git."""
  file, new = files.path(workdir) / 'versions.json', versions()
  if file.exists():
    old = _read(file)
    for name, pair in overrides.differences(old, new).items():
      _log.warning('%s was %s when the run started, and is %s.', name, *pair)
  files.write_whole(file, json.dumps(new, indent=2) + '\n')
  names = [change.name for change in number_changes.CHANGES]
  numbers = files.path(workdir) / NUMBERS
  files.write_whole(numbers, json.dumps(names, indent=1) + '\n')


def _read(file: epath.Path) -> Any:
  remedy = 'Restore it, or start in another workdir.'
  return reading.parse_json(reading.text(file), str(file), remedy)


def _git_revision() -> str | None:
  root = epath.Path(__file__).parents[1]
  command = ['git', '-C', str(root), 'describe', '--always', '--dirty']
  try:
    result = subprocess.run(command, capture_output=True, text=True, timeout=10)
  except (OSError, subprocess.TimeoutExpired):
    return None
  return result.stdout.strip() or None if result.returncode == 0 else None


def write_samples(
  file: str, prompts: Sequence[str], texts: Sequence[str]
) -> None:
  """Writes prompts and texts as the JSON that the report shows."""
  samples = [{'prompt': p, 'text': t} for p, t in zip(prompts, texts)]
  files.path(file).write_text(json.dumps(samples, indent=1))

"""The batches of a corpus, as functions of (seed, step), prepared ahead.

  config = DataConfig(length=256, batch_size=32)
  pipeline.check(config)
  corpus = corpus_lib.prepare(config)
  for batch in pipeline.train_batches(corpus, config, seed=0):
    ...

A batch holds `inputs`, `targets`, `weights` (float32), `segments` (0 is
padding) and `positions`, each of shape (batch, length) and int32 unless stated
otherwise. With an encoder it also holds `encoder_inputs`, `encoder_segments`
and `encoder_positions`. Where few tokens are predicted, `targets` and `weights`
hold those alone, and `target_positions` holds their positions.
"""

from collections.abc import Generator
from collections.abc import Iterator
from collections.abc import Sequence
import hashlib
from typing import Any
from typing import Protocol
from typing import SupportsIndex

import grain
import numpy as np

from t2x.data import batches as batches_lib
from t2x.data import config as config_lib
from t2x.data import corpus as corpus_lib
from t2x.data import history
from t2x.data import mixing
from t2x.data import text_files
from t2x.data import tokenizer_loading
from t2x.objectives import batch_keys
from t2x.objectives import mixture
from t2x.objectives import span_corruption
from t2x.objectives import ul2

_FOREVER = 2**48  # Steps; Grain wants a length.
_PREFETCH = 8  # Batches prepared ahead of the one that is used.


def check(config: config_lib.DataConfig) -> None:
  """Raises a ValueError if the settings cannot work; builds nothing."""
  in_order = isinstance(config.batching, config_lib.Stream)
  if isinstance(config.objective, mixture.Mixture):
    if in_order:
      raise ValueError(
        'data.batching=stream reads one text from start to end, and the rows '
        'of data.objective=mixture are of several. Set data.batching=pack.'
      )
    if config_lib.buckets(config) != (config.length,):
      raise ValueError(
        f'data.batching.buckets={config_lib.buckets(config)}: the rows of a '
        'mixture are all as long. Set data.batching without buckets.'
      )
    for name, part in config_lib.parts(config).items():
      try:
        check(part)
      except ValueError as error:
        raise ValueError(
          f'Task {name!r} of data.objective.tasks: {error}'
        ) from error
    return
  corpus_lib.check_source(config)
  if config.source == 'text_files':
    text_files.find(config.files)
  if (
    config.duplicates == 'near' and config.source not in corpus_lib.OWN_SOURCES
  ):
    raise ValueError(
      f'data.duplicates=near: {config.source} is taken as TFDS has it, with '
      'splits of its own. Leave data.duplicates out, or use text_files.'
    )
  if config.objective.paired != (config.target_field is not None):
    needs = 'needs' if config.objective.paired else 'reads one text and has no'
    raise ValueError(
      f'data.target_field={config.target_field!r}: objective '
      f'{config.objective.kind!r} {needs} a target field (the label, for '
      'classification). Set data.target_field and an objective of pairs '
      '(source_target, classification), or neither.'
    )
  if config.source == 'installed_docs' and config.target_field is not None:
    raise ValueError(
      f'data.target_field={config.target_field!r}: installed_docs holds no '
      'pairs. Set data.source=text_files with .jsonl files, or a TFDS name.'
    )
  if in_order and not config.objective.follows_text:
    raise ValueError(
      'data.batching=stream reads a text from start to end, and data.'
      f'objective={config.objective.kind} has other rows. Set data.batching='
      'pack.'
    )
  lengths = config_lib.buckets(config)
  if lengths[-1] > config.length:
    raise ValueError(
      f'The largest of data.batching.buckets={lengths} exceeds data.length='
      f'{config.length}. Raise data.length or leave that bucket out.'
    )
  if isinstance(config.objective, config_lib.CHECKED):
    config.objective.check(lengths[0])
  plain = config_lib.Pad()
  one_a_row = isinstance(config.objective, config_lib.ONE_A_ROW)
  if one_a_row and config.batching != plain:
    raise ValueError(
      f'data.objective={config.objective.kind} puts one text into a row of '
      f'data.length, and data.batching={config.batching}. Set data.batching='
      'pad, without buckets.'
    )
  _check_sentinels(config)


def train_batches(
  corpus: corpus_lib.Corpus,
  config: config_lib.DataConfig,
  *,
  seed: int,
  start_step: int = 0,
  rows: slice | np.ndarray | None = None,
  segments: Sequence[history.Segment] = (),
) -> Generator[batches_lib.Batch, None, None]:
  """Returns an endless iterator over the training batches.

  Close the iterator (or delete it) to stop its threads.

  Args:
    corpus: the tokenised corpus.
    config: the settings that the corpus was prepared with.
    seed: seed of the order of rows and of every random draw.
    start_step: step of the first batch.
    rows: rows of each batch of `config.batch_size` to make, a slice or their
      numbers; None for all.
    segments: segments of the run so far (see `history`), if its batch size has
      changed; the last segment is that of the first batch.

  Raises:
    ValueError: if the corpus has less than a batch of rows, or `rows` does not
      lie in the batch.
  """
  segments = history.of_one_order(segments) if segments else []
  batches = _training(corpus, config, seed=seed, rows=rows, segments=segments)
  return _iterate(_From(batches, start_step), config)


def eval_batches(
  corpus: corpus_lib.Corpus,
  config: config_lib.DataConfig,
  split: str,
  *,
  task: str = '',
  rows: slice | np.ndarray | None = None,
  max_batches: int | None = None,
) -> Generator[batches_lib.Batch, None, None]:
  """Returns batches that hold each row of a split once, in order.

  Empty rows fill the last batch. With data.batching=stream row b continues row
  b of the batch before. Random draws are the same at each call.

  Args:
    corpus: the tokenised corpus.
    config: the settings that the corpus was prepared with.
    split: name of the split.
    task: name of the task to evaluate of a mixture, empty without one.
    rows: rows of each batch to make, as for `train_batches`.
    max_batches: largest number of batches; None for the whole split.
  """
  if task:
    batches = mixing.TaskBatches(corpus, config, split, task, rows=rows)
  else:
    batches = batches_lib.EvalBatches(corpus, config, split, rows=rows)
  num = len(batches) if max_batches is None else max_batches
  return _iterate(_From(batches, 0, min(num, len(batches))), config)


def eval_sets(
  corpus: corpus_lib.Corpus,
  config: config_lib.DataConfig,
  *,
  rows: slice | np.ndarray | None = None,
  max_batches: int | None = None,
) -> Iterator[tuple[str, str, Generator[batches_lib.Batch, None, None]]]:
  """Yields the title, the split and the batches of every evaluation set.

  The title is the name of the split, or SPLIT.TASK for a task of a mixture.

  Args:
    corpus: the tokenised corpus.
    config: the settings that the corpus was prepared with.
    rows: rows of each batch to make, as for `train_batches`.
    max_batches: largest number of batches of each set; None for all.
  """
  for split in config.eval_splits:
    for task in config_lib.parts(config):
      title = f'{split}.{task}' if task else split
      batches = eval_batches(
        corpus, config, split, task=task, rows=rows, max_batches=max_batches
      )
      yield title, split, batches


def steps_per_epoch(
  corpus: corpus_lib.Corpus, config: config_lib.DataConfig
) -> int:
  """Returns the number of steps in which every training row is read once.

  With several buckets the number is exact up to half a batch of each. For a
  mixture the steps read as many rows as the tasks have, in the proportions of
  the tasks' rates.
  """
  return _training(corpus, config, seed=0).steps_per_epoch


def segment(
  corpus: corpus_lib.Corpus,
  config: config_lib.DataConfig,
  *,
  seed: int,
  step: int = 0,
) -> history.Segment:
  """Returns the segment of a run that begins at `step`; see `history`."""
  batches = _training(corpus, config, seed=seed)
  facts = seed, corpus.fingerprint, config.train_split, batches.order
  return history.Segment(
    step=step,
    batch_size=config.batch_size,
    order=hashlib.sha256(repr(facts).encode()).hexdigest()[:16],
    epoch=batches.steps_per_epoch,
    tokens=float(config.batch_size * batches.tokens_a_row),
  )


def token_summary(
  corpus: corpus_lib.Corpus, config: config_lib.DataConfig
) -> str:
  """Returns lines that say how many tokens a training epoch reads and cuts."""
  lines = []
  for task, part in config_lib.parts(config).items():
    source, split = corpus.tasks[task] if task else corpus, part.train_split
    examples = batches_lib.BatchMaker(source, part, split, None, task=task)
    title = f'{split}.{task}' if task else split
    line = f'{title}: {examples.layout.count().text}'
    lost = examples.share_lost()
    if lost > 0.0005:
      line += (
        f'; about {lost:.1%} of them find no place in their rows beside the '
        'ends and sentinels of short documents'
      )
    lines.append(line)
  return '\n'.join(lines)


def _training(
  corpus: corpus_lib.Corpus, config: config_lib.DataConfig, **kwargs: Any
) -> batches_lib.TrainBatches | mixing.MixedBatches:
  if isinstance(config.objective, mixture.Mixture):
    return mixing.MixedBatches(corpus, config, **kwargs)
  return batches_lib.TrainBatches(corpus, config, **kwargs)


def batch_spec(
  config: config_lib.DataConfig,
) -> dict[str, tuple[tuple[int, int], np.dtype]]:
  """Returns shape and dtype of each array in a batch of the largest bucket."""
  length = config_lib.buckets(config)[-1]
  lengths = config.objective.lengths(length)
  if isinstance(config.batching, config_lib.Stream):
    lengths = lengths | {batch_keys.CONTINUES: 1}
  return {
    name: ((config.batch_size, num), batch_keys.of(name).dtype)
    for name, num in lengths.items()
  }


class _Indexed(Protocol):
  """Batches by number."""

  def __getitem__(self, index: int, /) -> batches_lib.Batch: ...


class _From:
  """The batches from number `start` on, as a data source for Grain."""

  def __init__(self, batches: _Indexed, start: int, num: int = _FOREVER):
    self._batches = batches
    self._start = start
    self._num = num

  def __len__(self) -> int:
    return self._num

  def __getitem__(self, index: SupportsIndex) -> batches_lib.Batch:
    return self._batches[self._start + int(index)]


def _iterate(
  batches: _From, config: config_lib.DataConfig
) -> Generator[batches_lib.Batch, None, None]:
  """Yields batches that threads (and processes) prepare ahead of time."""
  options = grain.ReadOptions(
    num_threads=config.num_threads,
    prefetch_buffer_size=_PREFETCH if config.num_threads else 0,
  )
  dataset = grain.MapDataset.source(batches).to_iter_dataset(options)
  if config.num_workers:
    dataset = dataset.mp_prefetch(
      grain.MultiprocessingOptions(num_workers=config.num_workers)
    )
  iterator = iter(dataset)
  try:
    yield from iterator
  finally:
    iterator.close()


def _check_sentinels(config: config_lib.DataConfig) -> None:
  objective = config.objective
  if not isinstance(objective, ul2.UL2 | span_corruption.SpanCorruption):
    return
  num_sentinels = tokenizer_loading.num_sentinels(config.tokenizer)
  if num_sentinels is None:
    return
  if isinstance(objective, ul2.UL2):
    needed = objective.num_spans(config_lib.buckets(config)[-1])
    needed += len(ul2.MODES)
    if needed > num_sentinels:
      raise ValueError(
        f'data.length={config.length} with the denoisers of ul2 needs {needed} '
        f'sentinels, its {len(ul2.MODES)} modes included, but data.tokenizer.'
        f'num_sentinels={num_sentinels}. Raise it, or lower '
        'data.length.'
      )
  if not isinstance(objective, span_corruption.SpanCorruption):
    return
  _, spans = objective.num_noise(
    objective.source_length(config_lib.buckets(config)[-1])
  )
  if spans > num_sentinels:
    raise ValueError(
      f'data.length={config.length} with data.objective.rate='
      f'{objective.rate} and mean_span={objective.mean_span} drops {spans} '
      'spans, but data.tokenizer.num_sentinels='
      f'{num_sentinels}. Raise it or mean_span, or lower '
      'data.length.'
    )

"""A run in progress: what each step reads, writes and keeps."""

from collections.abc import Generator
import contextlib
import dataclasses
import logging
import time
from typing import Any

import jax
import numpy as np

from t2x.compilation import executables
from t2x.compilation import program as program_lib
from t2x.config import experiment
from t2x.config import overrides
from t2x.data import corpus as corpus_lib
from t2x.data import history
from t2x.data import input_pipeline
from t2x.models import flops
from t2x.models import segment_memory
from t2x.multihost import processes
from t2x.multihost import stragglers
from t2x.objectives import batch_keys
from t2x.tracking import metrics as metrics_lib
from t2x.tracking import run_report
from t2x.tracking import trackers
from t2x.trainer import checkpointer
from t2x.trainer import workdir as workdir_lib
from t2x.training import evaluate
from t2x.training import train_state

_log = logging.getLogger(__name__)

_MEMORY = f'carried.{segment_memory.NAME}.'  # Its arrays have a batch's rows.


class NonFiniteError(RuntimeError):
  """A loss or gradient was not finite too many times in a row."""


class Run:
  """The pieces of a run, and the state that moves through them.

  Attributes:
    mesh: the device mesh.
    step: updates so far.
    state: the train state, on the devices.
  """

  def __init__(
    self,
    config: experiment.Experiment,
    workdir: str,
    mesh: jax.sharding.Mesh,
    corpus: corpus_lib.Corpus,
    executable: str | None = None,
  ):
    """Compiles nothing yet; arguments are those of `train.train`.

    Args:
      config: the experiment.
      workdir: directory of the run, local or gs://.
      mesh: the mesh of the run's devices.
      corpus: the prepared text that it reads.
      executable: file of programs made ahead of time, or None.
    """
    self.config = config
    self.workdir = workdir
    self.corpus = corpus
    self.mesh = mesh
    self._executable = executable
    self.step = 0
    self.history = [self._segment()]
    self._compile()
    self.saved = checkpointer.Checkpoints(
      workdir,
      keep_last=config.train.keep_last,
      keep_every=config.train.keep_every,
    )
    kind = jax.devices()[0].device_kind
    self._peak = flops.peak_flops(kind, config.model.dtype)
    self._pending = None
    self._stragglers = stragglers.Stragglers(mesh, config.train.log_every)

  def _compile(self) -> None:
    """Makes the programs of a run as long as its history says."""
    self.num_steps = self._num_steps()
    self.program = program_lib.Program(
      self.config, self.mesh, num_steps=self.num_steps
    )
    if self._executable is not None:
      own = executables.load(self._executable, self.program)
      self.program.replace(own)

  def _num_steps(self) -> int:
    num_steps = experiment.num_steps(self.config, self.history)
    assert num_steps is not None  # The corpus is there.
    return num_steps

  def _segment(self, **changes: Any) -> history.Segment:
    """Returns how the run reads from its step on."""
    data = dataclasses.replace(self.config.data, **changes)
    seed = self.config.train.seed
    return input_pipeline.segment(self.corpus, data, seed=seed, step=self.step)

  def restore(self, changes: workdir_lib.Changes | None = None) -> None:
    """Restores the newest checkpoint, or draws the weights.

    Args:
      changes: settings that changed since the last start.
    """
    restored = self.saved.restore(self.program.shapes, fresh=_MEMORY)
    if restored is None:
      self.state = self.program.init_state()
      return
    before = self._before(restored[2], changes or {})
    self.step, self.state, _ = restored
    _log.info('Going on from the checkpoint of step %d.', self.step)
    self.history = history.continued(before, self._segment())
    changed = history.change(before, self.history)
    if changed:
      _log.warning(changed)
    if self._num_steps() != self.num_steps:
      self._compile()
    self.state = self.program.with_memory(self.state)

  def _before(
    self, position: dict[str, Any], changes: workdir_lib.Changes
  ) -> list[history.Segment]:
    """Returns the segments of a checkpoint."""
    found = history.from_json(position)
    if found:
      return found
    # Saved when positions were steps alone.
    step = position.get('step', 0)  # Of weights that came with no data.
    size = workdir_lib.batch_size_at(self.workdir, step)
    own = self._segment(batch_size=size or self.config.data.batch_size)
    if any(_moves_rows(name) for name in changes):
      own = dataclasses.replace(own, order='')
    return [own]

  def open(self, show: bool) -> None:
    """Opens what is written to and read from in each step."""
    self.writer = metrics_lib.MetricsWriter(
      self.workdir,
      start_step=self.step,
      num_steps=self.num_steps,
      primary=processes.is_primary(),
      show=show,
      header=self._header(),
      trackers=self._trackers() if processes.is_primary() else (),
    )
    self.batches = self._global(
      input_pipeline.train_batches(
        self.corpus,
        self.config.data,
        seed=self.config.train.seed,
        start_step=self.step,
        rows=self.program.rows,
        segments=self.history,
      )
    )
    self._time = time.perf_counter()

  def _trackers(self) -> list[trackers.Background]:
    return trackers.open_all(
      self.config.train.trackers,
      self.workdir,
      project=self.config.train.tracker_project,
      config=overrides.flatten(overrides.to_json(self.config)),
      start_step=self.step,
      num_steps=self.num_steps,
    )

  def advance(self, step: int) -> None:
    """Dispatches one step, then reads the metrics of the one before."""
    start = time.perf_counter()
    batch, num_tokens = next(self.batches)
    self._stragglers.add(step, time.perf_counter() - start)
    self.state, metrics = self.program.step(self.state, batch)
    self.step = step
    # The device works on this step while the host waits for the last one.
    self.finish_row()
    shapes = {name: array.shape for name, array in batch.items()}
    self._pending = step, metrics, num_tokens, shapes

  def finish_row(self, evaluate_now: bool = False) -> None:
    """Writes the row of the last step, with its evaluation if asked."""
    if self._pending is None:
      return
    (step, metrics, num_tokens, shapes), self._pending = self._pending, None
    metrics = {k: v.tolist() for k, v in jax.device_get(metrics).items()}
    now = time.perf_counter()
    seconds, self._time = now - self._time, now
    stopped = metrics['num_skipped'] >= self.config.train.max_skipped
    if step % self.config.train.log_every and not (evaluate_now or stopped):
      return
    # Skipped updates are not counted, so the step would say too much.
    rate = self.program.learning_rate(metrics.pop('num_updates'))
    step_flops = flops.train_flops(*flops.arguments(self.config.model, shapes))
    row = {
      'step': step,
      **metrics,
      'learning_rate': rate,
      'tokens_per_second': num_tokens / seconds,
      'step_seconds': seconds,
      'mfu': flops.mfu(step_flops, seconds, self.mesh.size, self._peak),
    }
    if evaluate_now:
      row.update(self.evaluate())
    self.writer.write(row)
    if stopped:
      self._stop_non_finite(step, metrics)

  def evaluate(self) -> dict[str, float]:
    """Returns `eval/NAME/...` of every evaluation split."""
    config = self.config
    row = {}
    model = train_state.averaged_model(self.state, config.step_config)
    sets = input_pipeline.eval_sets(
      self.corpus,
      config.data,
      rows=self.program.rows,
      max_batches=config.train.eval_batches,
    )
    for title, split, batches in sets:
      batches = (batch for batch, _ in self._global(batches))
      metrics = evaluate.evaluate(self.program.evaluate, model, batches)
      if config.train.eval_batches is None:
        metrics |= evaluate.bits_per_byte(
          metrics, self.corpus, config.data, split
        )
      row |= {f'eval/{title}/{name}': v for name, v in metrics.items()}
    self._time = time.perf_counter()
    return row

  def save(self) -> None:
    """Saves the state; the rows up to its step are on disk first."""
    self.finish_row()
    flushed = self.writer.flush()
    if processes.all_agree(flushed, f'rows of step {self.step}'):
      with jax.transfer_guard('allow'):  # Orbax copies to the host here.
        position = history.to_json(self.history, self.step)
        self.saved.save(self.step, self.state, position)

  def check_saved(self) -> None:
    """Raises CheckpointError if the state is not on disk by now."""
    self.saved.wait()
    latest = self.saved.latest_step()
    if latest != self.step:
      raise checkpointer.CheckpointError(
        f'The state of step {self.step} could not be saved; the last complete '
        f'checkpoint in {self.workdir} is that of step {latest}. Free space '
        'or make the directory writable, and give the same command again: it '
        'goes on from there.'
      )

  def where(self) -> str:
    """Returns how far the run is, for the message of one that is lost."""
    latest = self.saved.latest_step()
    saved = (
      'no checkpoint was saved yet'
      if latest is None
      else f'the last checkpoint in {self.workdir} is that of step {latest}'
    )
    return f' after step {self.step}; {saved}.'

  def close(self) -> None:
    """Ends the threads of data and checkpoints, and writes the report."""
    self.batches.close()
    self.saved.wait()
    self.saved.close()
    try:
      self.writer.close()
      if processes.is_primary():
        run_report.write(self.workdir)
    except OSError as error:
      _log.error('%s could not be written in full: %s', self.workdir, error)

  def _global(self, batches: Generator) -> Generator:
    """Yields (global batch, tokens in it) from this host's rows."""
    rows = self.program.rows
    # Processes may hold the same rows, or different ones.
    share = len(rows) / self.config.data.batch_size
    with contextlib.closing(batches):
      for batch in batches:
        num_tokens = batch_keys.num_tokens(batch)
        yield self.program.place(batch), num_tokens / share

  def _stop_non_finite(self, step: int, metrics: dict[str, float]) -> None:
    names = [f'{k}={v}' for k, v in metrics.items() if not np.isfinite(v).all()]
    skipped = int(metrics['num_skipped'])
    raise NonFiniteError(
      f'Step {step}: {", ".join(names)}. {skipped} updates in a row were '
      f'skipped for values that are not finite (train.max_skipped='
      f'{self.config.train.max_skipped}); the weights are those of step '
      f'{step - skipped}. Lower optim.learning_rate, or look at the data of '
      'these steps.'
    )

  def _header(self) -> str:
    """Returns a line on the data to come, and the formula of the MFU."""
    config = self.config
    read = input_pipeline.token_summary(self.corpus, config.data)
    epoch = self.history[-1].epoch
    spec = input_pipeline.batch_spec(config.data)
    shape = flops.arguments(config.model, {n: s for n, (s, _) in spec.items()})
    return (
      f'{read}, {epoch:,} steps an epoch\n'
      f'{flops.formula(*shape, peak=self._peak)}'
    )


def _moves_rows(name: str) -> bool:
  """Whether a changed setting may change the order of rows."""
  keeps = name in experiment.OUTER_SETTINGS or name == 'data.batch_size'
  return name == 'train.seed' or (name.startswith('data.') and not keeps)

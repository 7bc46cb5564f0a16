"""Evaluates a trained run on splits of its data."""

from collections.abc import Sequence
import dataclasses
import logging

from t2x.compilation import program as program_lib
from t2x.config import consistency
from t2x.config import layout_advice
from t2x.data import corpus as corpus_lib
from t2x.data import input_pipeline
from t2x.inference import trained_model
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding
from t2x.training import evaluate

_log = logging.getLogger(__name__)


def evaluate_splits(
  trained: trained_model.Trained,
  splits: Sequence[str] = (),
  max_batches: int | None = None,
) -> dict[str, float]:
  """Returns the metrics of a run on splits of its data.

  Args:
    trained: run to evaluate, with the data that its config names.
    splits: names of splits; empty for data.eval_splits.
    max_batches: greatest number of batches of a split; None for all, and then
      metrics such as bits per byte are added where they are known.

  Returns:
    Values by `eval/NAME/METRIC`, as in metrics.jsonl.
  """
  config = trained.config
  if splits:
    data = dataclasses.replace(config.data, eval_splits=tuple(splits))
    config = dataclasses.replace(config, data=data)
  devices = trained.mesh.devices.ravel().tolist()
  layout_advice.check(
    config, len(devices), num_slices=mesh_lib.num_slices(devices)
  )
  consistency.check_vocabulary(config, trained.tokenizer.vocab_size)
  corpus = corpus_lib.prepare(config.data, trained.tokenizer)
  _warn_of_other_text(trained, corpus.fingerprint)
  program = program_lib.Program(config, trained.mesh, num_steps=1)
  result = {}
  with sharding.use(trained.mesh, config.rules):
    sets = input_pipeline.eval_sets(
      corpus, config.data, rows=program.rows, max_batches=max_batches
    )
    for title, split, batches in sets:
      batches = map(program.place, batches)
      metrics = evaluate.evaluate(program.evaluate, trained.model, batches)
      if max_batches is None:
        metrics |= evaluate.bits_per_byte(metrics, corpus, config.data, split)
      result |= {f'eval/{title}/{k}': v for k, v in metrics.items()}
  return result


def _warn_of_other_text(
  trained: trained_model.Trained, fingerprint: str
) -> None:
  if trained.corpus not in (None, fingerprint):
    _log.warning(
      'The text is another one than the run was trained on (%s, and it was '
      '%s): what is held out of it may have been trained on.',
      fingerprint,
      trained.corpus,
    )

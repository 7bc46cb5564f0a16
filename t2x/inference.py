"""Using a trained run: load it, generate text, evaluate it.

trained = inference.load('runs/quickstart')
inference.generate_text(trained, ['The function'], num_tokens=20)
"""

from collections.abc import Sequence
import dataclasses
import logging
import math
from typing import Any

import jax

from t2x import checkpoint
from t2x import config as config_lib
from t2x import consistency
from t2x import evaluate
from t2x import experiment
from t2x import layouts
from t2x import mesh as mesh_lib
from t2x import paths
from t2x import program as program_lib
from t2x import run_dir
from t2x import sharding
from t2x import streaming
from t2x import train_state
from t2x import trained as trained_lib
from t2x.data import corpus as corpus_lib
from t2x.data import pipeline
from t2x.data import tokenizers
from t2x.data import words
from t2x.decode import beams as beams_lib
from t2x.decode import controlled
from t2x.decode import generate as generate_lib
from t2x.decode import sampling as sampling_lib
from t2x.decode import texts as texts_lib
from t2x.interop import generation as generation_lib
from t2x.interop import huggingface
from t2x.interop import labels as labels_lib

_log = logging.getLogger(__name__)

Sampling = sampling_lib.SamplingConfig
Trained = trained_lib.Trained


def load(
  workdir: str, *, step: int | None = None, settings: Sequence[str] = ()
) -> Trained:
  """Restores a run's model, by default onto one device.

  Args:
    workdir: of the run, or the directory of a checkpoint of Hugging Face.
    step: of the checkpoint; default the newest.
    settings: as for --set; `mesh.tensor=8` spreads the model.

  Raises:
    ValueError: no run, no such checkpoint, or a setting that cannot be.
  """
  workdir = str(paths.path(workdir))
  if huggingface.is_one(workdir):
    found = huggingface.read(workdir)
    config = huggingface.experiment_of(found, workdir)
    config, mesh, shapes = _placed(config, settings)
    model = jax.device_put(
      found.build(config.model),
      jax.tree.map(lambda x: x.sharding, shapes.model),
    )
    own = {'config': config, 'mesh': mesh, 'labels': found.labels}
    own['generation'] = _told(workdir, found.generation)
    own['problem'] = labels_lib.problem(found.hf)
    return Trained(model=model, tokenizer=found.tokenizer, step=0, **own)
  config, mesh, shapes = _placed(run_dir.read_config(workdir), settings)
  wanted = dataclasses.replace(
    shapes, step=None, opt_state=None, num_skipped=None, carried={}
  )
  saved = checkpoint.Checkpoints(workdir)
  restored = saved.restore(wanted, step, partial=True)
  saved.close()
  if restored is None:
    raise ValueError(
      f'{workdir} has no checkpoint yet. Let the experiment run on: it saves '
      f'at the end and at train.checkpoint_every='
      f'{config.train.checkpoint_every} steps.'
    )
  step, state, _ = restored
  tokenizer = tokenizers.load(paths.path(workdir) / 'tokenizer')
  model = train_state.averaged_model(state, config.step_config)
  hf = run_dir.read_huggingface(workdir) or {}
  # Training on classes means one of them, whatever the head was before.
  trains = words.has_classes(config.data)
  return Trained(
    config=config,
    model=model,
    tokenizer=tokenizer,
    step=step,
    mesh=mesh,
    labels=run_dir.read_labels(workdir),
    temperature=run_dir.read_temperature(workdir),
    generation=_told(workdir, _generation(workdir, config)),
    corpus=run_dir.read_corpus(workdir),
    problem=labels_lib.SINGLE if trains else labels_lib.problem(hf),
  )


def _generation(workdir: str, config: experiment.Experiment):
  """Returns how the texts of a run that came from elsewhere are written."""
  return huggingface.generation_of(
    config.model,
    run_dir.read_huggingface(workdir) or {},
    run_dir.read_generation(workdir),
    workdir,
  )


def _told(workdir: str, found: generation_lib.Generation):
  """Returns what is asked for, after telling what of it is not done."""
  if found.ignored:
    _log.warning(
      '%s: settings of its texts that are not honoured: %s.',
      workdir,
      ', '.join(found.ignored),
    )
  return found


def _placed(config: experiment.Experiment, settings: Sequence[str]):
  """Returns the config with its settings, its mesh, and the state's shapes."""
  config = dataclasses.replace(config, mesh=mesh_lib.MeshConfig(data=1))
  config = config_lib.override(config, config_lib.parse_settings(settings))
  devices = _devices(config.mesh)
  # Rows that training deals to microbatches matter to nobody here.
  train = dataclasses.replace(config.train, accumulate=1)
  layouts.check(
    dataclasses.replace(config, train=train),
    len(devices),
    num_slices=mesh_lib.num_slices(devices),
  )
  mesh = mesh_lib.make(config.mesh, devices)
  shapes, _ = program_lib.shapes_of(config, mesh)
  return config, mesh, shapes


def generate_text(
  trained: Trained,
  prompts: Sequence[str],
  *,
  num_tokens: int,
  sampling: Sampling | Sequence[Sampling] | None = None,
  seed: int = 0,
  ignore_end: bool = False,
  max_length: int | None = None,
  control: texts_lib.Control | None = None,
  stop: Sequence[str] = (),
) -> list[str]:
  """Returns the text that follows each prompt (or answers it).

  Args:
    trained: what `load` returned.
    prompts: texts; an encoder-decoder takes them as sources, in which
      <extra_id_0>, <extra_id_1>, ... stand for its sentinels.
    num_tokens: the most new tokens of each.
    sampling: temperature, top-k, penalties, ..., for all prompts or for each;
      None for what the checkpoint says.
    seed: of what is drawn.
    ignore_end: go on past the end token.
    max_length: the most tokens of a sequence, new ones included; default the
      length that the model was trained on.
    control: what each text of a decoder is held to, at its beginning; see
      `control.Controls`.
    stop: a text ends before the first of these.

  Raises:
    ValueError: a prompt longer than the context, a model that is an encoder,
      a control that cannot be followed, or one beside ignore_end.
  """
  streaming.check_stop(stop)
  result = generation(
    trained,
    prompts,
    num_tokens=num_tokens,
    sampling=sampling,
    seed=seed,
    ignore_end=ignore_end,
    max_length=max_length,
    control=control,
  )
  texts = trained.texts(prompts, result.tokens)
  return [streaming.cut(text, stop) for text in texts]


def generation(
  trained: Trained,
  prompts: Sequence[str],
  *,
  num_tokens: int,
  sampling: Sampling | Sequence[Sampling] | None = None,
  seed: int = 0,
  ignore_end: bool = False,
  max_length: int | None = None,
  control: texts_lib.Control | None = None,
) -> generate_lib.Generation:
  """As `generate_text`, with its arguments and errors; returns tokens.

  Returns:
    The tokens of each text, with their log-probabilities.
  """
  if control is not None and ignore_end:
    raise ValueError('ignore_end: a text that is held to a rule ends with it.')
  rows = trained.prompt_ids(prompts)
  sampling = _calibrated(trained, sampling)
  options = trained.decode_options(ignore_end=ignore_end, max_length=max_length)
  common = {'num_tokens': num_tokens, 'sampling': sampling, 'seed': seed}
  with trained.decoding():
    if control is None:
      return generate_lib.generate(trained.writer, rows, **common, **options)
    return controlled.write(
      trained.writer, rows, control=control, **common, **options
    )


def search_text(
  trained: Trained,
  prompts: Sequence[str],
  *,
  num_tokens: int,
  beams: beams_lib.BeamConfig | None = None,
  num_best: int = 1,
  sampling: Sampling | None = None,
  keywords: Sequence[str] = (),
  max_length: int | None = None,
) -> list[list[tuple[str, float]]]:
  """Returns the best texts of each prompt with their scores, by beam search.

  Args:
    trained: what `load` returned.
    prompts: as for `generate_text`.
    num_tokens: the most new tokens of each.
    beams: how many, and when the search ends; None for what the checkpoint
      says of the end.
    num_best: texts of each prompt.
    sampling: penalties, banned words and least length; None likewise.
    keywords: words that each text must hold.
    max_length: as for `generate_text`.

  Raises:
    ValueError: as `generate.beam_search`.
  """
  own = trained.generation
  with trained.decoding():
    result = generate_lib.beam_search(
      trained.writer,
      trained.prompt_ids(prompts),
      num_tokens=num_tokens,
      beams=beams or beams_lib.BeamConfig(**own.search),
      num_best=num_best,
      sampling=trained.calibrated(sampling or Sampling(**own.searching)),
      words=trained.keyword_ids(keywords),
      texts=trained.keyword_texts(keywords),
      **trained.decode_options(max_length=max_length),
    )
  found = []
  for prompt, tokens, scores in zip(prompts, result.tokens, result.scores):
    texts = trained.texts([prompt] * len(tokens), tokens)
    found.append(list(zip(texts, scores)))
  return found


def _calibrated(trained: Trained, sampling: Any) -> Any:
  if isinstance(sampling, Sequence):
    return [trained.calibrated(config) for config in sampling]
  return trained.calibrated(sampling)


def evaluate_splits(
  trained: Trained, splits: Sequence[str] = (), max_batches: int | None = None
) -> dict[str, float]:
  """Returns `eval/NAME/METRIC` for each split, default data.eval_splits."""
  config = trained.config
  if splits:
    data = dataclasses.replace(config.data, eval_splits=tuple(splits))
    config = dataclasses.replace(config, data=data)
  devices = trained.mesh.devices.ravel().tolist()
  layouts.check(config, len(devices), num_slices=mesh_lib.num_slices(devices))
  consistency.check_vocabulary(config, trained.tokenizer.vocab_size)
  corpus = corpus_lib.prepare(config.data, trained.tokenizer)
  _warn_of_other_text(trained, corpus.fingerprint)
  program = program_lib.Program(config, trained.mesh, num_steps=1)
  result = {}
  with sharding.use(trained.mesh, config.rules):
    sets = pipeline.eval_sets(
      corpus, config.data, rows=program.rows, max_batches=max_batches
    )
    for title, split, batches in sets:
      batches = map(program.place, batches)
      metrics = evaluate.evaluate(program.evaluate, trained.model, batches)
      if max_batches is None:
        metrics |= evaluate.bits_per_byte(metrics, corpus, config.data, split)
      result |= {f'eval/{title}/{k}': v for k, v in metrics.items()}
  return result


def _warn_of_other_text(trained: Trained, fingerprint: str) -> None:
  if trained.corpus not in (None, fingerprint):
    _log.warning(
      'The text is another one than the run was trained on (%s, and it was '
      '%s): what is held out of it may have been trained on.',
      fingerprint,
      trained.corpus,
    )


def _devices(config: mesh_lib.MeshConfig) -> list[Any]:
  """Returns as many devices as the mesh asks for; -1 takes them all."""
  sizes = [getattr(config, axis) for axis in mesh_lib.AXES]
  devices = jax.devices()
  return devices if -1 in sizes else devices[: math.prod(sizes)]

"""Using a trained run: load it, generate text, evaluate it.

trained = inference.load('runs/quickstart')
inference.generate_text(trained, ['The function'], num_tokens=20)
"""

from collections.abc import Sequence
import dataclasses
import functools
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t2x import checkpoint
from t2x import config as config_lib
from t2x import evaluate
from t2x import experiment
from t2x import layouts
from t2x import mesh as mesh_lib
from t2x import paths
from t2x import program as program_lib
from t2x import run_dir
from t2x import sharding
from t2x import train_state
from t2x.data import corpus as corpus_lib
from t2x.data import pipeline
from t2x.data import tokenizers
from t2x.decode import generate as generate_lib
from t2x.decode import prepared
from t2x.decode import prompts as prompts_lib
from t2x.decode import sampling as sampling_lib
from t2x.interop import huggingface
from t2x.models import decoder
from t2x.models import encoder_decoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
  """A model restored from a run, on its mesh.

  Attributes:
    config: of the run, with the settings given to `load`.
    model: its weights; the moving average where the run kept one.
    tokenizer: the run's own.
    step: of the checkpoint.
    mesh: where the model is.
    labels: of each class head, in the order of its classes, by the name of its
      term.
  """

  config: experiment.Experiment
  model: Any
  tokenizer: tokenizers.Tokenizer
  step: int
  mesh: jax.sharding.Mesh
  labels: dict[str, list[str]]

  @functools.cached_property
  def writer(self) -> Any:
    """The model in the form that writes token by token the fastest."""
    return prepared.prepare(self.model)


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
      found.model, jax.tree.map(lambda x: x.sharding, shapes.model)
    )
    own = {'config': config, 'mesh': mesh, 'labels': {}}
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
  return Trained(
    config=config,
    model=model,
    tokenizer=tokenizer,
    step=step,
    mesh=mesh,
    labels=run_dir.read_labels(workdir),
  )


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
  sampling: sampling_lib.SamplingConfig | None = None,
  seed: int = 0,
  ignore_end: bool = False,
  max_length: int | None = None,
) -> list[str]:
  """Returns the text that follows each prompt (or answers it).

  Args:
    trained: what `load` returned.
    prompts: texts; an encoder-decoder takes them as sources, in which
      <extra_id_0>, <extra_id_1>, ... stand for its sentinels.
    num_tokens: the most new tokens of each.
    sampling: temperature, top-k and top-p.
    seed: of what is drawn.
    ignore_end: go on past the end token.
    max_length: the most tokens of a sequence, new ones included; default the
      length that the model was trained on.

  Raises:
    ValueError: a prompt longer than the context, or a model that is an
      encoder.
  """
  if max_length is None:
    max_length = trained.config.data.length
  tokenizer = trained.tokenizer
  answers = isinstance(
    trained.config.model, encoder_decoder.EncoderDecoderConfig
  )
  # As in training: a decoder's text begins with BOS, a source ends with EOS.
  if answers:
    ids = [[*tokenizer.encode_marked(p), tokenizer.eos_id] for p in prompts]
  else:
    before = tokenizer.prefix_ids
    ids = [[*before, *p] for p in tokenizer.encode_batch(prompts)]
  # One token at a time: there is no length to split.
  rules = dataclasses.replace(
    trained.config.rules, length=None, norm_length=None
  )
  with sharding.use(trained.mesh, rules):
    result = generate_lib.generate(
      trained.writer,
      ids,
      num_tokens=num_tokens,
      max_length=max_length,
      sampling=sampling,
      seed=seed,
      eos_id=None if ignore_end else tokenizer.eos_id,
      pad_id=tokenizer.pad_id,
    )
  decode = tokenizer.decode_marked if answers else tokenizer.decode
  return [decode(tokens) for tokens in result.tokens]


def embed(trained: Trained, texts: Sequence[str]) -> np.ndarray:
  """Returns a vector for each text: the mean over its tokens, of length 1.

  As Sentence-BERT has it (Reimers and Gurevych, 2019): the encoder's output
  over all tokens, those before and after the text included.

  Args:
    trained: an encoder, or an encoder-decoder.
    texts: cut to the length that the model was trained on.

  Returns:
    float32 (number of texts, D).

  Raises:
    ValueError: no texts, or the model is a decoder.
  """
  model = trained.model
  if isinstance(model, decoder.Decoder):
    raise ValueError(
      'A decoder has no vector of a whole text, since only its last token sees '
      'all of it. Embed with an encoder or an encoder-decoder.'
    )
  if not texts:
    raise ValueError('There is no text to embed: give one at least.')
  tokenizer, length = trained.tokenizer, trained.config.data.length
  before, after = tokenizer.prefix_ids, tokenizer.suffix_ids
  if isinstance(model, encoder_decoder.EncoderDecoder):
    before, after = (), (tokenizer.eos_id,)
  room = length - len(before) - len(after)
  encoded = tokenizer.encode_batch(texts)
  rows = [[*before, *ids[:room], *after] for ids in encoded]
  found = np.zeros((len(rows), trained.config.model.embed_dim), np.float32)
  # Rows of one length run together; few lengths, so few programs.
  sizes = [min(prompts_lib.power_of_two(max(len(r), 16)), length) for r in rows]
  for size in sorted(set(sizes)):
    numbers = [i for i, own in enumerate(sizes) if own == size]
    for start in range(0, len(numbers), _EMBEDDED):
      part = numbers[start : start + _EMBEDDED]
      shape = prompts_lib.power_of_two(len(part)), size
      ids_BT = prompts_lib.pad([rows[i] for i in part], shape, 0)
      ones = [[1] * len(rows[i]) for i in part]
      segments_BT = prompts_lib.pad(ones, shape, 0)
      with sharding.use(trained.mesh, trained.config.rules):
        vectors_BD = _mean_vectors(model, ids_BT, segments_BT)
      found[part] = jax.device_get(vectors_BD)[: len(part)]
  return found


_EMBEDDED = 32  # Texts at a time.


@jax.jit
def _mean_vectors(model, ids_BT, segments_BT) -> jax.Array:
  x_BTD = model.encode(ids_BT, segments=segments_BT).astype(jnp.float32)
  mean_BD = (x_BTD * segments_BT[..., None]).sum(1)
  norm_B1 = jnp.linalg.norm(mean_BD, axis=-1, keepdims=True)
  return mean_BD / jnp.maximum(norm_B1, 1e-12)


def classify(
  trained: Trained, texts: Sequence[str], *, head: int = 0
) -> list[dict[str, float]]:
  """Returns the probability of each label of each text.

  Args:
    trained: an encoder with `model.classes`.
    texts: cut to the length that the model was trained on.
    head: which of `model.classes`.

  Raises:
    ValueError: no head, or none that was trained.
  """
  labels = trained.labels.get(f'class{head}')
  if labels is None:
    raise ValueError(
      f'The run has labels for {sorted(trained.labels)}, and none for head '
      f'{head}. Train one with data.objective=classification.'
    )
  tokenizer, data = trained.tokenizer, trained.config.data
  size, found = data.batch_size, []
  for start in range(0, len(texts), size):
    ids_BT = np.full((size, data.length), tokenizer.pad_id, np.int32)
    encoded = tokenizer.encode_batch(texts[start : start + size])
    for row, ids in zip(ids_BT, encoded):
      ids = [*tokenizer.prefix_ids, *ids, *tokenizer.suffix_ids]
      ids = ids[: data.length]
      row[: len(ids)] = ids
    with sharding.use(trained.mesh, trained.config.rules):
      chances_BE = _chances(trained.model, ids_BT, head, tokenizer.pad_id)
    found += jax.device_get(chances_BE)[: len(encoded)].tolist()
  return [dict(zip(labels, row)) for row in found]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _chances(model, ids_BT, head: int, pad_id: int) -> jax.Array:
  """Returns the probabilities of the classes of a head (B, E)."""
  segments_BT = (ids_BT != pad_id).astype(jnp.int32)
  pooled_BD = model.pool(model.encode(ids_BT, segments=segments_BT))
  logits_B1E = model.classes[head](pooled_BD[:, None])
  return jax.nn.softmax(logits_B1E[:, 0].astype(jnp.float32))


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
  corpus = corpus_lib.prepare(config.data, trained.tokenizer)
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


def read_lines(given: Sequence[str], file: str | None, flag: str) -> list[str]:
  """Returns the texts of --FLAG and those of --FLAG_file, one a line.

  Raises:
    ValueError: there is none, or no such file.
  """
  result = list(given)
  if file is not None:
    path = paths.path(file)
    if not path.exists():
      raise ValueError(f'--{flag}_file={file}: there is no such file.')
    result += [line for line in path.read_text().splitlines() if line]
  if not result:
    raise ValueError(
      f"There is no {flag}: give --{flag}='...' or --{flag}_file."
    )
  return result


def write_samples(
  file: str, prompts: Sequence[str], texts: Sequence[str]
) -> None:
  """Writes prompts and texts as the JSON that the report shows."""
  samples = [{'prompt': p, 'text': t} for p, t in zip(prompts, texts)]
  paths.path(file).write_text(json.dumps(samples, indent=1))


def _devices(config: mesh_lib.MeshConfig) -> list[Any]:
  """Returns as many devices as the mesh asks for; -1 takes them all."""
  sizes = [getattr(config, axis) for axis in mesh_lib.AXES]
  devices = jax.devices()
  return devices if -1 in sizes else devices[: math.prod(sizes)]

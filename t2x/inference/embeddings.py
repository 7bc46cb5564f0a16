"""Texts as an encoder sees them: their vectors, classes, and their tokens'.

trained = inference.load('runs/bert')
encoding.embed(trained, ['One text.', 'Another.'])
"""

from collections.abc import Iterator
from collections.abc import Sequence
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t2x.data import pretrained
from t2x.data import words
from t2x.decode import prefill
from t2x.decode import prompts as prompts_lib
from t2x.inference import trained_model
from t2x.interop import labels as labels_lib
from t2x.models import decoder
from t2x.models import encoder_inputs
from t2x.parallel import sharding

_EMBEDDED = 32  # Texts at a time.


def embed(trained: trained_model.Trained, texts: Sequence[str]) -> np.ndarray:
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
  before, after = trained.frame.before, trained.frame.after
  room = length - len(before) - len(after)
  encoded = tokenizer.encode_batch(texts)
  rows = [[*before, *ids[:room], *after] for ids in encoded]
  trained.check_rows(rows)
  found = np.zeros((len(rows), trained.config.model.embed_dim), np.float32)
  with trained.decoding():
    for part, shape in _batches(rows, length):
      ids_BT = prompts_lib.pad([rows[i] for i in part], shape, 0)
      ones = [[1] * len(rows[i]) for i in part]
      segments_BT = prompts_lib.pad(ones, shape, 0)
      vectors_BD = _mean_vectors(model, ids_BT, segments_BT)
      found[part] = jax.device_get(vectors_BD)[: len(part)]
  return found


def _batches(
  rows: Sequence[Sequence[int]], length: int
) -> Iterator[tuple[list[int], tuple[int, int]]]:
  """Yields numbers of rows that run together, and the shape of their batch.

  Of one length each; few lengths, so few programs.
  """
  sizes = [min(prompts_lib.power_of_two(max(len(r), 16)), length) for r in rows]
  for size in sorted(set(sizes)):
    numbers = [i for i, own in enumerate(sizes) if own == size]
    for start in range(0, len(numbers), _EMBEDDED):
      part = numbers[start : start + _EMBEDDED]
      yield (
        part,
        (prompts_lib.num_rows(None, len(part), prefill.row_parts()), size),
      )


@jax.jit
def _mean_vectors(model, ids_BT, segments_BT) -> jax.Array:
  x_BTD = model.encode(ids_BT, segments=segments_BT).astype(jnp.float32)
  mean_BD = (x_BTD * segments_BT[..., None]).sum(1)
  norm_B1 = jnp.linalg.norm(mean_BD, axis=-1, keepdims=True)
  return mean_BD / jnp.maximum(norm_B1, 1e-12)


def classify(
  trained: trained_model.Trained,
  texts: Sequence[str | tuple[str, str]],
  *,
  head: int = 0,
) -> list[dict[str, float]]:
  """Returns the probability of each label of each text.

  By a sigmoid each where several labels may hold, and for a regression the
  values themselves; see `Trained.problem`.

  Args:
    trained: an encoder with `model.classes`.
    texts: cut to the length that the model was trained on; pairs for a
      checkpoint of Hugging Face.
    head: which of `model.classes`.

  Raises:
    ValueError: no head, none that was trained, or pairs for a run that was
      trained on single texts.
  """
  labels = trained.labels.get(f'class{head}')
  if labels is None:
    raise ValueError(
      f'The run has labels for {sorted(trained.labels)}, and none for head '
      f'{head}. Train one with data.objective=classification.'
    )
  logits_NE = np.zeros((len(texts), len(labels)), np.float32)
  fn = _own_logits if _reads_as_trained(trained) else _logits
  for part, found in fn(trained, texts, head):
    logits_NE[part] = found
  values = {
    labels_lib.SINGLE: functools.partial(jax.nn.softmax, axis=-1),
    labels_lib.MULTI: jax.nn.sigmoid,
    labels_lib.VALUES: np.asarray,
  }[trained.problem](logits_NE)
  return [dict(zip(labels, row)) for row in np.asarray(values).tolist()]


class Tag(NamedTuple):
  """What a head of token classes says of one token.

  Attributes:
    start: where the token begins in its text, in characters.
    end: where it ends.
    text: what stands there.
    label: the likeliest.
    probability: of that label.
  """

  start: int
  end: int
  text: str
  label: str
  probability: float


def tag(
  trained: trained_model.Trained, texts: Sequence[str]
) -> list[list[Tag]]:
  """Returns the likeliest label of each token of each text.

  Args:
    trained: an encoder with `model.token_classes` and a tokenizer of Hugging
      Face.
    texts: of no more tokens than the model reads.

  Raises:
    ValueError: no such head, another tokenizer, or a text that is too long.
  """
  labels, tokenizer = trained.labels.get(labels_lib.TOKENS), trained.tokenizer
  theirs = isinstance(tokenizer, pretrained.PretrainedTokenizer)
  if labels is None or not theirs:
    raise ValueError(
      f'The run has labels for {sorted(trained.labels)} and '
      f'{"none for tokens" if theirs else "a tokenizer of its own"}. Tokens '
      'are labelled by a checkpoint of Hugging Face for token classification.'
    )
  assert isinstance(tokenizer, pretrained.PretrainedTokenizer)
  length = trained.config.data.length
  rows = tokenizer.encode_whole(texts, 2**20)
  for i, row in enumerate(rows):
    if len(row.ids) > length:
      raise ValueError(
        f'Text {i} has {len(row.ids)} tokens, and the model reads {length}. '
        'Cut it into several.'
      )
  found: list[list[Tag]] = [[] for _ in texts]
  for part, logits_BTE in _logits(trained, texts, None):
    chances_BTE = np.asarray(jax.nn.softmax(logits_BTE, axis=-1))
    for i, chances_TE in zip(part, chances_BTE):
      found[i] = _tags(texts[i], rows[i], chances_TE, labels)
  return found


def _tags(text, row, chances_TE, labels) -> list[Tag]:
  best_T = chances_TE.argmax(-1)
  return [
    Tag(
      start=start,
      end=end,
      text=text[start:end],
      label=labels[best_T[t]],
      probability=float(chances_TE[t].max()),
    )
    for t, (start, end) in enumerate(row.spans)
    if row.is_text[t]
  ]


def labelled(
  trained: trained_model.Trained,
  texts: Sequence[str],
  second: Sequence[str] = (),
) -> list[Any]:
  """Returns what `classify` or `tag` does, by the head that there is, for JSON.

  Args:
    trained: an encoder with a head of classes.
    texts: of which it is asked.
    second: what goes with each of them, or nothing.

  Raises:
    ValueError: as many texts on each side are needed; and as of the two.
  """
  tags = labels_lib.TOKENS in trained.labels
  if second and (tags or len(second) != len(texts)):
    raise ValueError(
      f'--second has {len(second)} texts for {len(texts)}'
      + (
        ', and tokens are labelled in single ones.'
        if tags
        else '; give one for each, in their order.'
      )
    )
  if tags:
    found = tag(trained, texts)
    return [[one._asdict() for one in tokens] for tokens in found]
  return classify(trained, list(zip(texts, second)) if second else texts)


def _reads_as_trained(trained: trained_model.Trained) -> bool:
  """Whether its rows are those of `objectives.classification`."""
  theirs = isinstance(trained.tokenizer, pretrained.PretrainedTokenizer)
  return not theirs or words.has_classes(trained.config.data)


def _own_logits(trained, texts, head: int):
  """Yields numbers of texts and their logits, as in training."""
  if not all(isinstance(text, str) for text in texts):
    raise ValueError('Pairs of texts, and the run was trained on single ones.')
  tokenizer, data = trained.tokenizer, trained.config.data
  size, shape = data.batch_size, (data.batch_size, data.length)
  for start in range(0, len(texts), size):
    encoded = tokenizer.encode_batch(texts[start : start + size])
    before, after = tokenizer.bos_id, tokenizer.eos_id
    rows = [[before, *ids, after][: data.length] for ids in encoded]
    trained.check_rows(rows)
    ids_BT = prompts_lib.pad(rows, shape, trained.pad_id)
    segments_BT = prompts_lib.pad([[1] * len(row) for row in rows], shape, 0)
    with sharding.use(trained.mesh, trained.config.rules):
      logits = _of_head(trained.model, ids_BT, segments_BT, None, head)
    part = [*range(start, start + len(rows))]
    yield part, jax.device_get(logits)[: len(rows)]


def _logits(trained, texts, head: int | None):
  """Yields numbers of texts and their logits, as `transformers` reads them."""
  config, tokenizer = trained.config, trained.tokenizer
  rows = tokenizer.encode_whole(texts, config.data.length)
  trained.check_rows([row.ids for row in rows])
  typed = encoder_inputs.tells_types(config.model)
  with trained.decoding():
    for part, shape in _batches([row.ids for row in rows], config.data.length):
      own = [rows[i] for i in part]
      pad = functools.partial(prompts_lib.pad, shape=shape)
      ids_BT = pad([row.ids for row in own], fill=trained.pad_id)
      segments_BT = pad([[1] * len(row.ids) for row in own], fill=0)
      types_BT = pad([row.types for row in own], fill=0) if typed else None
      logits = _of_head(trained.model, ids_BT, segments_BT, types_BT, head)
      yield part, jax.device_get(logits)[: len(part)]


@functools.partial(jax.jit, static_argnums=4)
def _of_head(
  model: Any, ids_BT, segments_BT, types_BT, head: int | None
) -> jax.Array:
  """Returns float32 logits of a head of classes (B, E), of tokens (B, T, E)."""
  x_BTD = model.encode(ids_BT, segments=segments_BT, token_types=types_BT)
  if head is None:
    return model.token_classes(x_BTD).astype(jnp.float32)
  pooled_B1D = model.pool(x_BTD)[:, None]
  return model.classes[head](pooled_B1D)[:, 0].astype(jnp.float32)

"""Embeddings, classes and token labels of texts, by a trained encoder.

trained = loading.load('runs/bert')
embeddings.embed(trained, ['One text.', 'Another.'])

Shape suffixes: N texts, B batch, T position, D embed, E classes.
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
from t2x.data import tokenizer_backends
from t2x.data import words
from t2x.decode import prefill
from t2x.decode import prompts as prompts_lib
from t2x.inference import trained_model
from t2x.interop import labels as labels_lib
from t2x.models import decoder
from t2x.models import encoder
from t2x.models import encoder_decoder
from t2x.models import encoder_inputs
from t2x.parallel import sharding

_EMBEDDED = 32  # Texts in a batch.


def embed(trained: trained_model.Trained, texts: Sequence[str]) -> np.ndarray:
  """Returns a unit vector for each text: the mean of the encoder's outputs.

  The mean is over all tokens, special tokens included, as in Sentence-BERT
  (Reimers and Gurevych, 2019).

  Args:
    trained: an encoder or an encoder-decoder.
    texts: texts to embed, each cut to the length that the model was trained on.

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
  vectors_ND = np.zeros((len(rows), trained.config.model.embed_dim), np.float32)
  with trained.decoding():
    for part, shape in _batches(rows, length):
      ids_BT = prompts_lib.pad([rows[i] for i in part], shape, 0)
      ones = [[1] * len(rows[i]) for i in part]
      segments_BT = prompts_lib.pad(ones, shape, 0)
      vectors_BD = _mean_vectors(model, ids_BT, segments_BT)
      vectors_ND[part] = jax.device_get(vectors_BD)[: len(part)]
  return vectors_ND


def _batches(
  rows: Sequence[Sequence[int]], length: int
) -> Iterator[tuple[list[int], tuple[int, int]]]:
  """Yields the numbers of rows that run together, and the shape of their batch.

  Rows are padded to powers of two, so that few shapes have to be compiled.
  """
  sizes = [min(prompts_lib.power_of_two(max(len(r), 16)), length) for r in rows]
  for size in sorted(set(sizes)):
    numbers = [i for i, other in enumerate(sizes) if other == size]
    for start in range(0, len(numbers), _EMBEDDED):
      part = numbers[start : start + _EMBEDDED]
      yield (
        part,
        (prompts_lib.num_rows(None, len(part), prefill.row_parts()), size),
      )


@jax.jit
def _mean_vectors(
  model: encoder.Encoder | encoder_decoder.EncoderDecoder,
  ids_BT: jax.Array,
  segments_BT: jax.Array,
) -> jax.Array:
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

  The probabilities are a softmax over the labels, or a sigmoid of each where
  several labels may hold. For a regression the outputs themselves are
  returned. `Trained.problem` says which of these it is.

  Args:
    trained: an encoder with `model.classes`.
    texts: texts to classify, each cut to the length that the model was trained
      on; pairs of texts only for a checkpoint of Hugging Face.
    head: index of the head among `model.classes`.

  Returns:
    For each text, the value of each label.

  Raises:
    ValueError: the model has no such head or it was not trained, or pairs are
      given to a run that was trained on single texts.
  """
  labels = trained.labels.get(f'class{head}')
  if labels is None:
    raise ValueError(
      f'The run has labels for {sorted(trained.labels)}, and none for head '
      f'{head}. Train one with data.objective=classification.'
    )
  logits_NE = np.zeros((len(texts), len(labels)), np.float32)
  fn = _training_logits if _reads_as_trained(trained) else _logits
  for part, logits_BE in fn(trained, texts, head):
    logits_NE[part] = logits_BE
  values = {
    labels_lib.SINGLE: functools.partial(jax.nn.softmax, axis=-1),
    labels_lib.MULTI: jax.nn.sigmoid,
    labels_lib.VALUES: np.asarray,
  }[trained.problem](logits_NE)
  return [dict(zip(labels, row)) for row in np.asarray(values).tolist()]


class Tag(NamedTuple):
  """The label of one token.

  Attributes:
    start: offset of the token's first character in its text.
    end: offset after the token's last character.
    text: characters from `start` to `end`.
    label: likeliest label of the token.
    probability: probability of `label`.
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
    texts: texts to label, each of no more tokens than the model reads.

  Returns:
    For each text, the labels of its tokens, special tokens left out.

  Raises:
    ValueError: the model has no such head or another tokenizer, or a text is
      too long.
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
  tags: list[list[Tag]] = [[] for _ in texts]
  for part, logits_BTE in _logits(trained, texts, None):
    chances_BTE = np.asarray(jax.nn.softmax(logits_BTE, axis=-1))
    for i, chances_TE in zip(part, chances_BTE):
      tags[i] = _tags(texts[i], rows[i], chances_TE, labels)
  return tags


def _tags(
  text: str,
  row: tokenizer_backends.Whole,
  chances_TE: np.ndarray,
  labels: Sequence[str],
) -> list[Tag]:
  best_T = chances_TE.argmax(-1)
  return [
    Tag(
      start=start,
      end=end,
      text=text[start:end],
      label=labels[int(best_T[t])],
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
  """Returns the labels of texts, or of their tokens, as JSON values.

  Calls `tag` for a model that labels tokens, else `classify`.

  Args:
    trained: an encoder with a head of classes.
    texts: texts to label, or the first texts of pairs.
    second: second text of each pair; empty for single texts.

  Raises:
    ValueError: `texts` and `second` differ in number, tokens of pairs should be
      labelled, or `classify` or `tag` raises it.
  """
  labels_tokens = labels_lib.TOKENS in trained.labels
  if second and (labels_tokens or len(second) != len(texts)):
    raise ValueError(
      f'--second has {len(second)} texts for {len(texts)}'
      + (
        ', and tokens are labelled in single ones.'
        if labels_tokens
        else '; give one for each, in their order.'
      )
    )
  if labels_tokens:
    return [[one._asdict() for one in tags] for tags in tag(trained, texts)]
  return classify(trained, list(zip(texts, second)) if second else texts)


def _reads_as_trained(trained: trained_model.Trained) -> bool:
  """Whether the model reads rows as `objectives.classification` makes them."""
  theirs = isinstance(trained.tokenizer, pretrained.PretrainedTokenizer)
  return not theirs or words.has_classes(trained.config.data)


def _training_logits(
  trained: trained_model.Trained,
  texts: Sequence[str | tuple[str, str]],
  head: int | None,
) -> Iterator[tuple[list[int], np.ndarray]]:
  """Yields numbers of texts and their logits, on rows as in training.

  Raises:
    ValueError: there are pairs of texts.
  """
  singles = [text for text in texts if isinstance(text, str)]
  if len(singles) < len(texts):
    raise ValueError('Pairs of texts, and the run was trained on single ones.')
  tokenizer, data = trained.tokenizer, trained.config.data
  size, shape = data.batch_size, (data.batch_size, data.length)
  for start in range(0, len(singles), size):
    encoded = tokenizer.encode_batch(singles[start : start + size])
    before, after = tokenizer.bos_id, tokenizer.eos_id
    rows = [[before, *ids, after][: data.length] for ids in encoded]
    trained.check_rows(rows)
    ids_BT = prompts_lib.pad(rows, shape, trained.pad_id)
    segments_BT = prompts_lib.pad([[1] * len(row) for row in rows], shape, 0)
    with sharding.use(trained.mesh, trained.config.rules):
      logits = _of_head(trained.model, ids_BT, segments_BT, None, head)
    part = [*range(start, start + len(rows))]
    yield part, jax.device_get(logits)[: len(rows)]


def _logits(
  trained: trained_model.Trained,
  texts: Sequence[str | tuple[str, str]],
  head: int | None,
) -> Iterator[tuple[list[int], np.ndarray]]:
  """Yields numbers of texts and their logits, on rows as in `transformers`.

  Args:
    trained: an encoder with a tokenizer of Hugging Face.
    texts: texts, or pairs of them.
    head: index of the head among `model.classes`; None for that of tokens.
  """
  config, tokenizer = trained.config, trained.tokenizer
  assert isinstance(tokenizer, pretrained.PretrainedTokenizer)
  rows = tokenizer.encode_whole(texts, config.data.length)
  trained.check_rows([row.ids for row in rows])
  assert isinstance(config.model, encoder.EncoderConfig)
  typed = encoder_inputs.tells_types(config.model)
  with trained.decoding():
    for part, shape in _batches([row.ids for row in rows], config.data.length):
      batch = [rows[i] for i in part]
      pad = functools.partial(prompts_lib.pad, shape=shape)
      ids_BT = pad([row.ids for row in batch], fill=trained.pad_id)
      segments_BT = pad([[1] * len(row.ids) for row in batch], fill=0)
      types_BT = pad([row.types for row in batch], fill=0) if typed else None
      logits = _of_head(trained.model, ids_BT, segments_BT, types_BT, head)
      yield part, jax.device_get(logits)[: len(part)]


@functools.partial(jax.jit, static_argnums=4)
def _of_head(
  model: encoder.Encoder,
  ids_BT: jax.Array,
  segments_BT: jax.Array,
  types_BT: jax.Array | None,
  head: int | None,
) -> jax.Array:
  """Returns float32 logits: (B, E) of texts, or (B, T, E) of tokens.

  Args:
    model: an encoder.
    ids_BT: token ids.
    segments_BT: 1 for tokens and 0 for padding.
    types_BT: token types; None if the model has none.
    head: index of the head among `model.classes`; None for that of tokens.
  """
  x_BTD = model.encode(ids_BT, segments=segments_BT, token_types=types_BT)
  if head is None:
    assert model.token_classes is not None
    return model.token_classes(x_BTD).astype(jnp.float32)
  pooled_B1D = model.pool(x_BTD)[:, None]
  return model.classes[head](pooled_B1D)[:, 0].astype(jnp.float32)

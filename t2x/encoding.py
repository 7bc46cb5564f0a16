"""Texts as an encoder sees them: their vectors, and their classes.

trained = inference.load('runs/bert')
encoding.embed(trained, ['One text.', 'Another.'])
"""

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np

from t2x import sharding
from t2x import trained as trained_lib
from t2x.decode import begin as begin_lib
from t2x.decode import prompts as prompts_lib
from t2x.models import decoder
from t2x.models import encoder_decoder

_EMBEDDED = 32  # Texts at a time.


def embed(trained: trained_lib.Trained, texts: Sequence[str]) -> np.ndarray:
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
  trained.check_rows(rows)
  found = np.zeros((len(rows), trained.config.model.embed_dim), np.float32)
  # Rows of one length run together; few lengths, so few programs.
  sizes = [min(prompts_lib.power_of_two(max(len(r), 16)), length) for r in rows]
  for size in sorted(set(sizes)):
    numbers = [i for i, own in enumerate(sizes) if own == size]
    for start in range(0, len(numbers), _EMBEDDED):
      part = numbers[start : start + _EMBEDDED]
      with trained.decoding():
        num = prompts_lib.num_rows(None, len(part), begin_lib.row_parts())
        ids_BT = prompts_lib.pad([rows[i] for i in part], (num, size), 0)
        ones = [[1] * len(rows[i]) for i in part]
        segments_BT = prompts_lib.pad(ones, (num, size), 0)
        vectors_BD = _mean_vectors(model, ids_BT, segments_BT)
      found[part] = jax.device_get(vectors_BD)[: len(part)]
  return found


@jax.jit
def _mean_vectors(model, ids_BT, segments_BT) -> jax.Array:
  x_BTD = model.encode(ids_BT, segments=segments_BT).astype(jnp.float32)
  mean_BD = (x_BTD * segments_BT[..., None]).sum(1)
  norm_B1 = jnp.linalg.norm(mean_BD, axis=-1, keepdims=True)
  return mean_BD / jnp.maximum(norm_B1, 1e-12)


def classify(
  trained: trained_lib.Trained, texts: Sequence[str], *, head: int = 0
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
    encoded = tokenizer.encode_batch(texts[start : start + size])
    # As in training.
    before, after = tokenizer.bos_id, tokenizer.eos_id
    rows = [[before, *ids, after][: data.length] for ids in encoded]
    trained.check_rows(rows)
    shape = size, data.length
    ids_BT = prompts_lib.pad(rows, shape, trained.pad_id)
    segments_BT = prompts_lib.pad([[1] * len(row) for row in rows], shape, 0)
    with sharding.use(trained.mesh, trained.config.rules):
      chances_BE = _chances(trained.model, ids_BT, segments_BT, head)
    found += jax.device_get(chances_BE)[: len(encoded)].tolist()
  return [dict(zip(labels, row)) for row in found]


@functools.partial(jax.jit, static_argnums=3)
def _chances(model, ids_BT, segments_BT, head: int) -> jax.Array:
  """Returns the probabilities of the classes of a head (B, E)."""
  pooled_BD = model.pool(model.encode(ids_BT, segments=segments_BT))
  logits_B1E = model.classes[head](pooled_BD[:, None])
  return jax.nn.softmax(logits_B1E[:, 0].astype(jnp.float32))

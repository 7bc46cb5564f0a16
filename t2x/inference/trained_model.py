"""A trained model with what it reads and writes in: texts to ids and back."""

from collections.abc import Sequence
import contextlib
import dataclasses
import functools
from typing import Any

import jax

from t2x.config import experiment
from t2x.data import tokenizers
from t2x.decode import banned as banned_lib
from t2x.decode import decoding_weights
from t2x.decode import pieces as pieces_lib
from t2x.decode import sampling as sampling_lib
from t2x.decode import word_starts
from t2x.inference import text_stream
from t2x.interop import framing
from t2x.interop import generation_config
from t2x.models import encoder_decoder
from t2x.parallel import sharding

Sampling = sampling_lib.SamplingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
  """A model restored from a run, on its mesh; `loading.load` makes it.

  Attributes:
    config: of the run, with the settings given to `load`.
    model: its weights; the moving average where the run kept one.
    tokenizer: the run's own.
    step: of the checkpoint.
    mesh: where the model is.
    labels: of each class head, in the order of its classes, by the name of its
      term.
    temperature: that makes its probabilities true; see `calibration`.
    generation: how its texts are written, where a checkpoint's files say.
    corpus: fingerprint of the text that it was trained on, if that is known.
    problem: what the outputs of its head of classes are; see `interop.labels`.
  """

  config: experiment.Experiment
  model: Any
  tokenizer: tokenizers.Tokenizer
  step: int
  mesh: jax.sharding.Mesh
  labels: dict[str, list[str]]
  temperature: float = 1.0
  generation: generation_config.Generation = generation_config.Generation()
  corpus: str | None = None
  problem: str = 'single_label_classification'

  @property
  def end_ids(self) -> tuple[int, ...]:
    """The tokens that end a text."""
    return self.generation.ends or (self.tokenizer.eos_id,)

  @property
  def start_id(self) -> int:
    """What an answer goes on from, or a text without a prompt."""
    if self._answers:
      # As training's targets begin, whatever the tokenizer pads with.
      return self.tokenizer.vocab.start
    bos = self.generation.bos
    return self.tokenizer.bos_id if bos is None else bos

  @property
  def frame(self) -> framing.Frame:
    """What stands around the texts that the model reads."""
    return framing.of(self.config.model, self.tokenizer)

  @functools.cached_property
  def token_bytes(self) -> list[bytes]:
    """What each token of the model adds to a text; nothing if special."""
    found, size = self.tokenizer.token_bytes(), self.config.model.vocab_size
    return found[:size] + [b''] * (size - len(found))

  @property
  def pad_id(self) -> int:
    """A token to fill rows up with, which the model has a row for."""
    pad = self.tokenizer.pad_id
    return pad if pad < self.config.model.vocab_size else 0

  @functools.cached_property
  def pieces(self) -> pieces_lib.Pieces:
    """The bytes of tokens, sentinels as `texts` writes them."""
    found = list(self.token_bytes)
    if self._answers:
      for number, token in enumerate(self.tokenizer.sentinel_ids):
        found[token] = f'<extra_id_{number}>'.encode()
    return pieces_lib.Pieces(found)

  @functools.cached_property
  def writer(self) -> Any:
    """The model in the form that writes token by token the fastest."""
    return decoding_weights.prepare(self.model)

  def decoding(self) -> contextlib.AbstractContextManager[Any]:
    """Returns the context in which the model writes on its mesh."""
    # One token at a time: there is no length to split.
    rules = self.config.rules
    rules = dataclasses.replace(rules, length=None, norm_length=None)
    return sharding.use(self.mesh, rules)

  def decode_options(
    self, *, ignore_end: bool = False, max_length: int | None = None
  ) -> dict[str, Any]:
    """Returns what the tokenizer and the training say to `decode.generate`.

    Args:
      ignore_end: texts go on past their end.
      max_length: of a sequence; default that of training.
    """
    return {
      'eos_id': None if ignore_end else self.end_ids,
      'pad_id': self.pad_id,
      'start_id': self.start_id,
      'max_length': max_length or self.config.data.length,
    }

  def calibrated(self, sampling: Sampling | None = None) -> Sampling:
    """Returns settings under which the model's probabilities are true.

    Nothing is written then that its checkpoint forbids. None asks for what the
    checkpoint says.
    """
    sampling = sampling or Sampling(**self.generation.sampling)
    sampling = dataclasses.replace(sampling, calibration=self.temperature)
    return self.generation.constrain(sampling)

  def prompt_ids(self, prompts: Sequence[str]) -> list[list[int]]:
    """Returns what the model reads; see `framing`.

    Args:
      prompts: texts; in sources <extra_id_N> is the N-th sentinel.

    Raises:
      ValueError: there is no such sentinel, or no row for a token.
    """
    rows = self.frame.ids(self.tokenizer, prompts)
    self.check_rows(rows)
    return rows

  def check_rows(self, rows: Sequence[Sequence[int]]) -> None:
    """Raises ValueError for a token that the model has no row for."""
    size = self.config.model.vocab_size
    wrong = [(n, i) for n, ids in enumerate(rows) for i in ids if i >= size]
    if wrong:
      number, token = wrong[0]
      raise ValueError(
        f'Text {number} has the token id {token}, which the tokenizer adds, '
        f'and the model has {size} tokens, 0 to {size - 1}. Leave the added '
        'token out of the text.'
      )

  def texts(
    self, prompts: Sequence[str], tokens: Sequence[Sequence[int]]
  ) -> list[str]:
    """Returns the texts of tokens that the model wrote after prompts."""
    tokenizer = self.tokenizer
    if self._answers:
      return [tokenizer.decode_marked(ids) for ids in tokens]
    return [
      text_stream.after(tokenizer, before, ids)
      for before, ids in zip(self.prompt_ids(prompts), tokens)
    ]

  def banned(self, words: Sequence[str]) -> banned_lib.Banned | None:
    """Returns words that a text never holds: `SamplingConfig.banned_words`.

    A word is banned wherever its letters follow each other, within longer words
    too, whatever the tokens; upper and lower case are told apart. With the end
    of a prompt before it as well.

    Raises:
      ValueError: a word is empty or no text, or there are too many.
    """
    return banned_lib.Banned(words, self.pieces) if words else None

  def keyword_ids(self, words: Sequence[str]) -> list[list[tuple[int, ...]]]:
    """Returns the forms in which each word that a text must hold is written.

    With the space before it, so that it is no part of the word before, but
    where the word itself begins with a space or a mark.

    Raises:
      ValueError: a word is empty.
    """
    return [self._forms(word)[0] for word in words]

  def keyword_texts(self, words: Sequence[str]) -> word_starts.Words | None:
    """Returns by which texts words that a text must hold are there.

    Raises:
      ValueError: a word is empty.
    """
    if not words:
      return None
    from_start = [self._forms(word)[1] for word in words]
    return word_starts.Words(words, from_start, self.pieces)

  def _forms(self, word: str) -> tuple[list[tuple[int, ...]], bool]:
    """Returns the forms of a word, and whether it begins where a word does."""
    if not word:
      raise ValueError('A keyword is empty; give a letter or more.')
    if not pieces_lib.is_text(word):
      raise ValueError(f'The keyword {word!r} is no valid Unicode.')
    ids = self.tokenizer.encode_batch([word, f' {word}'])
    forms = list(dict.fromkeys(tuple(form) for form in ids if form))
    spaced = [f for f in forms if self.token_bytes[f[0]][:1].isspace()]
    if spaced and word[0].isalnum():
      return spaced, True
    return forms, False

  @property
  def _answers(self) -> bool:
    """Whether it reads a source and writes another text."""
    config = self.config.model
    return isinstance(config, encoder_decoder.EncoderDecoderConfig)

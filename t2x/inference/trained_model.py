"""A trained model with its tokenizer, mesh and generation settings."""

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
    config: config of the run, with the settings given to `load`.
    model: module with the weights; their moving average where the run kept one.
    tokenizer: tokenizer of the run.
    step: step of the checkpoint.
    mesh: device mesh that holds the model.
    labels: names of the classes of each class head, in order, by the name of
      the head's term in the loss.
    temperature: divisor of the logits that calibrates the probabilities; see
      `calibration`.
    generation: generation settings of a checkpoint of Hugging Face; the
      defaults for other runs.
    corpus: fingerprint of the training text; None if it is unknown.
    problem: meaning of the class heads' outputs, one of the constants of
      `interop.labels`: one label, several labels, or values.
  """

  config: experiment.Experiment
  model: Any
  tokenizer: tokenizers.Tokenizer
  step: int
  mesh: jax.sharding.Mesh
  labels: dict[str, list[str]]
  temperature: float = 1.0
  generation: generation_config.GenerationConfig = (
    generation_config.GenerationConfig()
  )
  corpus: str | None = None
  problem: str = 'single_label_classification'

  @property
  def end_ids(self) -> tuple[int, ...]:
    """Token ids that end a text."""
    return self.generation.ends or (self.tokenizer.eos_id,)

  @property
  def start_id(self) -> int:
    """Token id that an answer, or a text without a prompt, starts from."""
    if self._answers:
      # The token that targets begin with in training, whatever the pad token.
      return self.tokenizer.vocab.start
    bos = self.generation.bos
    return self.tokenizer.bos_id if bos is None else bos

  @property
  def frame(self) -> framing.Frame:
    """Special tokens around the texts that the model reads."""
    return framing.of(self.config.model, self.tokenizer)

  @functools.cached_property
  def token_bytes(self) -> list[bytes]:
    """Bytes that each token of the model adds to a text; b'' if special."""
    pieces, size = self.tokenizer.token_bytes(), self.config.model.vocab_size
    return pieces[:size] + [b''] * (size - len(pieces))

  @property
  def pad_id(self) -> int:
    """Token id of padding, which is in the model's vocabulary."""
    pad = self.tokenizer.pad_id
    return pad if pad < self.config.model.vocab_size else 0

  @functools.cached_property
  def pieces(self) -> pieces_lib.TokenBytes:
    """The bytes of tokens, those of sentinels as `detokenize` writes them."""
    pieces = list(self.token_bytes)
    if self._answers:
      for number, token in enumerate(self.tokenizer.sentinel_ids):
        pieces[token] = f'<extra_id_{number}>'.encode()
    return pieces_lib.TokenBytes(pieces)

  @functools.cached_property
  def decoding_model(self) -> Any:
    """The model in the form that decodes fastest; see `decoding_weights`."""
    return decoding_weights.prepare(self.model)

  def decoding(self) -> contextlib.AbstractContextManager[Any]:
    """Returns the context in which the model generates on its mesh."""
    # Decoding takes one token at a time, so that no length axis can be split.
    rules = self.config.rules
    rules = dataclasses.replace(rules, length=None, norm_length=None)
    return sharding.use(self.mesh, rules)

  def decode_options(
    self, *, ignore_end: bool = False, max_length: int | None = None
  ) -> dict[str, Any]:
    """Returns the `prefill.Options` of this model, as keyword arguments.

    Args:
      ignore_end: whether texts go on past their end token.
      max_length: greatest number of tokens of a sequence; None for the length
        that the model was trained on.
    """
    return {
      'eos_id': None if ignore_end else self.end_ids,
      'pad_id': self.pad_id,
      'start_id': self.start_id,
      'max_length': max_length or self.config.data.length,
    }

  def calibrated(self, sampling: Sampling | None = None) -> Sampling:
    """Returns sampling settings with the model's temperature and bans.

    The temperature is the one that calibrates the probabilities. The bans are
    those of the checkpoint, such as tokens that are never generated.

    Args:
      sampling: settings to complete; None for the checkpoint's own.
    """
    sampling = sampling or Sampling(**self.generation.sampling)
    sampling = dataclasses.replace(sampling, calibration=self.temperature)
    return self.generation.constrain(sampling)

  def prompt_ids(self, prompts: Sequence[str]) -> list[list[int]]:
    """Returns the token ids of prompts, special tokens included (`framing`).

    Args:
      prompts: texts; for an encoder-decoder <extra_id_N> in them is the N-th
        sentinel.

    Raises:
      ValueError: there is no such sentinel, or a token is outside the model's
        vocabulary.
    """
    rows = self.frame.ids(self.tokenizer, prompts)
    self.check_rows(rows)
    return rows

  def check_rows(self, rows: Sequence[Sequence[int]]) -> None:
    """Raises ValueError if a token id is outside the model's vocabulary."""
    size = self.config.model.vocab_size
    wrong = [(n, i) for n, ids in enumerate(rows) for i in ids if i >= size]
    if wrong:
      number, token = wrong[0]
      raise ValueError(
        f'Text {number} has the token id {token}, which the tokenizer adds, '
        f'and the model has {size} tokens, 0 to {size - 1}. Leave the added '
        'token out of the text.'
      )

  def detokenize(
    self, prompts: Sequence[str], tokens: Sequence[Sequence[int]]
  ) -> list[str]:
    """Returns the texts of generated tokens.

    Args:
      prompts: prompt of each text.
      tokens: token ids that were generated for each prompt.
    """
    tokenizer = self.tokenizer
    if self._answers:
      return [tokenizer.decode_marked(ids) for ids in tokens]
    return [
      text_stream.continuation(tokenizer, before, ids)
      for before, ids in zip(self.prompt_ids(prompts), tokens)
    ]

  def banned(self, words: Sequence[str]) -> banned_lib.Banned | None:
    """Returns the value of `SamplingConfig.banned_words` for words.

    A word is banned wherever its letters follow each other, in upper and lower
    case as given: within longer words too, whatever the tokens, and where it
    begins at the end of the prompt.

    Args:
      words: words that no text may contain; if there are none, the result is
        None.

    Raises:
      ValueError: a word is empty or no valid Unicode, or there are too many.
    """
    return banned_lib.Banned(words, self.pieces) if words else None

  def keyword_ids(self, words: Sequence[str]) -> list[list[tuple[int, ...]]]:
    """Returns the forms, as token ids, of each word that a text must contain.

    A form includes the space before the word, so that the word is not part of
    the word before. Words that begin with a space or a punctuation mark also
    have a form without it.

    Args:
      words: required words.

    Raises:
      ValueError: a word is empty.
    """
    return [self._forms(word)[0] for word in words]

  def keyword_texts(
    self, words: Sequence[str]
  ) -> word_starts.WordFinder | None:
    """Returns automata that find words in a text by characters; None for none.

    Args:
      words: required words.

    Raises:
      ValueError: a word is empty.
    """
    if not words:
      return None
    from_start = [self._forms(word)[1] for word in words]
    return word_starts.WordFinder(words, from_start, self.pieces)

  def _forms(self, word: str) -> tuple[list[tuple[int, ...]], bool]:
    """Returns the forms of a word, and whether it starts at a word boundary."""
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
    """Whether the model is an encoder-decoder."""
    config = self.config.model
    return isinstance(config, encoder_decoder.EncoderDecoderConfig)

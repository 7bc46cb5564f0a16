"""Constrained generation: regular expressions, JSON schemas and grammars.

control = Controls(trained).make(num_tokens=20, regex='[0-9]{4}')
generation.generate_text(
  trained, ['The year'], num_tokens=20, control=control)

The library llguidance follows the grammar and says which tokens may come next;
the engine bans the others. A text obeys its rule from its first token on, and
ends only where it is a complete match. A text that is cut at its number of
tokens is the beginning of a match.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import json
import types
from typing import Any

import numpy as np

from t2x.data import tokenizers
from t2x.inference import keyword_constraints
from t2x.inference import trained_model


class RuleCompiler:
  """Compiles rules for the texts of one tokenizer.

  Attributes:
    ends: token ids that end a text.

  >>> from t2x.data import tokenizers
  >>> bytes_ = tokenizers.BytesTokenizer(tokenizers.Bytes())
  >>> rule = RuleCompiler(bytes_, bytes_.vocab_size).regex('ab+')
  >>> [rule.allows(bytes_.encode(letter)[0]) for letter in 'abc']
  [True, False, False]
  """

  def __init__(
    self,
    tokenizer: tokenizers.Tokenizer,
    vocab_size: int,
    ends: Sequence[int] = (),
  ):
    """Prepares the vocabulary, in about a second for 50,000 tokens.

    Args:
      tokenizer: tokenizer of the model.
      vocab_size: number of tokens of the model, which may exceed that of the
        tokenizer.
      ends: token ids that end a text; empty for the tokenizer's EOS.

    Raises:
      ValueError: llguidance is not installed.
    """
    self._library = _library()
    self._size = vocab_size
    self.ends = tuple(ends) or (tokenizer.eos_id,)
    pieces = tokenizer.token_bytes()
    pieces = pieces[:vocab_size] + [b''] * (vocab_size - len(pieces))
    silent = {i for i, piece in enumerate(pieces) if not piece}
    wrapper = self._library.TokenizerWrapper(
      _Pieces(
        tokens=[
          # A token without text: these bytes occur in no text, so that no
          # rule allows it.
          b'\xff<%d>' % i if i in silent else piece
          for i, piece in enumerate(pieces)
        ],
        special_token_ids=sorted(silent),
        eos_token_id=self.ends[0],
        tokenizer=tokenizer,
      )
    )
    # Where no other token is possible, the library allows one of those without
    # text; this mask removes it.
    is_written_V = np.zeros(-(-vocab_size // 32) * 32, bool)
    is_written_V[[*set(range(vocab_size)) - silent, *self.ends]] = True
    written = np.packbits(is_written_V, bitorder='little').view(np.uint32)
    self._written_W: np.ndarray = written
    self._tokenizer = self._library.LLTokenizer(
      wrapper, n_vocab=vocab_size, eos_token=list(self.ends)
    )

  def regex(self, pattern: str) -> 'Rule':
    """Returns the rule that a regular expression matches the whole text.

    Args:
      pattern: regular expression in the syntax of Rust's crate `regex`.

    Raises:
      ValueError: the pattern is invalid, or no text of this vocabulary matches.
    """
    grammar = self._library.LLMatcher.grammar_from_regex(pattern)
    return self._rule(f'The regular expression {pattern!r}', grammar)

  def grammar(self, text: str) -> 'Rule':
    """Returns the rule that a context-free grammar derives the text.

    Args:
      text: grammar in llguidance's variant of Lark's syntax, with the start
        symbol `start`.

    Raises:
      ValueError: the grammar is invalid, or derives no text of this vocabulary.
    """
    grammar = self._library.LLMatcher.grammar_from_lark(text)
    return self._rule('The grammar', grammar)

  def json_schema(self, schema: Mapping[str, Any] | str) -> 'Rule':
    """Returns the rule that a text is JSON that a schema allows.

    Args:
      schema: JSON schema, as an object or as its JSON text.

    Raises:
      ValueError: the schema is invalid, or no text of this vocabulary fits it.
    """
    try:
      text = schema if isinstance(schema, str) else json.dumps(schema)
      grammar = self._library.LLMatcher.grammar_from_json_schema(
        text, overrides={'whitespace_flexible': False}
      )
    except ValueError as error:
      raise ValueError(f'The JSON schema cannot be read: {error}') from None
    return self._rule('The JSON schema', grammar)

  def _rule(self, name: str, grammar: str) -> 'Rule':
    matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0)
    rule = Rule(name, matcher, self._written_W, self.ends)
    rule.allowed()
    return rule


class Rule:
  """A rule and how far one text has followed it: a `requests.Control`."""

  def __init__(
    self, name: str, matcher: Any, written_W: np.ndarray, ends: Sequence[int]
  ):
    """Begins before the first token of a text; `RuleCompiler` makes it.

    Args:
      name: words for the rule in error messages.
      matcher: state of the grammar, an `llguidance.LLMatcher`.
      written_W: uint32 words with a bit for each token that has text or ends
        one.
      ends: token ids that end a text.
    """
    self._name, self._matcher, self._ends = name, matcher, ends
    self._written_W = written_W
    self._is_done = False
    self._check()

  def allowed(self) -> np.ndarray:
    """Returns uint32 words with a bit for each token that may be next.

    Raises:
      ValueError: no token may be next: the text can neither go on nor end.
    """
    words_W = np.zeros_like(self._written_W)
    self._matcher.unsafe_compute_mask_ptr(words_W.ctypes.data, words_W.nbytes)
    self._check()
    words_W &= self._written_W
    if not words_W.any():
      raise ValueError(
        f'{self._name} cannot be met: after this text it asks for something '
        'that no token of the vocabulary begins.'
      )
    return words_W

  def raised(self) -> dict[int, float]:
    """Returns no additions to logits: a rule only bans tokens."""
    return {}

  def allows(self, token: int) -> bool:
    """Whether a token may be next."""
    return bool(self.allowed()[token // 32] >> np.uint32(token % 32) & 1)

  def advance(self, token: int) -> None:
    """Appends a token to the text that is followed.

    Args:
      token: id of the token that came next.

    Raises:
      ValueError: the rule does not allow the token.
    """
    if token in self._ends and self._matcher.is_accepting():
      self._is_done = True
      return
    self._matcher.consume_token(token)
    self._check()
    self._is_done = self._matcher.is_stopped()

  @property
  def is_done(self) -> bool:
    """Whether the text is complete and nothing may follow but its end."""
    return self._is_done

  def copy(self) -> 'Rule':
    """Returns an independent copy, at the same place of the text."""
    matcher = self._matcher.deep_copy()
    return Rule(self._name, matcher, self._written_W, self._ends)

  def begin(self, prompt: Sequence[int]) -> 'Rule':
    """Returns a copy for the text after a prompt, which the rule ignores."""
    del prompt
    return self.copy()

  def _check(self) -> None:
    if self._matcher.is_error():
      error = ' '.join(self._matcher.get_error().split())
      if 'NoExtension' in error:
        error = 'no text of this vocabulary meets it'
      raise ValueError(f'{self._name} cannot be followed: {error[:300]}')


@dataclasses.dataclass
class _Pieces:
  """A tokenizer with the attributes that llguidance reads."""

  tokens: list[bytes]
  special_token_ids: list[int]
  eos_token_id: int
  tokenizer: tokenizers.Tokenizer
  bos_token_id: int | None = None

  def __call__(self, text: bytes | str) -> list[int]:
    text = text.decode() if isinstance(text, bytes) else text
    return self.tokenizer.encode(text)


def _library() -> types.ModuleType:
  try:
    import llguidance
  except ImportError:
    raise ValueError(
      'Rules for texts need the package llguidance, which is not installed: '
      "pip install '.[serve]'."
    ) from None
  return llguidance


class ConstraintFactory:
  """Makes the constraints of texts of one model."""

  def __init__(self, trained: trained_model.Trained):
    """Prepares constraints for texts of a model.

    Args:
      trained: model that generates the texts, a decoder.
    """
    self._trained = trained
    self._size = trained.config.model.vocab_size

  @functools.cached_property
  def rules(self) -> RuleCompiler:
    """Rules for the model's tokenizer, prepared at the first use."""
    return RuleCompiler(
      self._trained.tokenizer, self._size, self._trained.end_ids
    )

  def make(
    self,
    *,
    num_tokens: int,
    regex: str | None = None,
    grammar: str | None = None,
    json_schema: Mapping[str, Any] | str | None = None,
    keywords: Sequence[str] = (),
  ) -> Rule | keyword_constraints.Keywords | None:
    """Returns a constraint at the beginning of a text; None if none is given.

    Args:
      num_tokens: greatest number of new tokens of the text.
      regex: regular expression; see `RuleCompiler.regex`.
      grammar: context-free grammar; see `RuleCompiler.grammar`.
      json_schema: JSON schema; see `RuleCompiler.json_schema`.
      keywords: words that the text must contain; see `Keywords`.

    Raises:
      ValueError: more than one constraint is given, or one that no text meets.
    """
    given = {
      'regex': regex,
      'grammar': grammar,
      'json_schema': json_schema,
      'keywords': keywords or None,
    }
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
      raise ValueError(f'{" and ".join(names)} are given; a text has one rule.')
    if not names:
      return None
    if keywords:
      return keyword_constraints.Keywords(
        self._trained.keyword_ids(keywords),
        num_tokens=num_tokens,
        vocab_size=self._size,
        ends=self._trained.end_ids,
        texts=self._trained.keyword_texts(keywords),
      )
    return getattr(self.rules, names[0])(given[names[0]])

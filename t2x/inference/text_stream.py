"""Streaming detokenization: text of tokens as they come, up to a stop string.

Only whole characters are returned, and no part of a stop string.

>>> from t2x.data import tokenizers
>>> bytes_ = tokenizers.BytesTokenizer(tokenizers.Bytes())
>>> stream = TextStream(bytes_, stop=['end'])
>>> [stream.add([i]) for i in bytes_.encode('é en')]
['', 'é', ' ', '', '']
>>> stream.finish()
'en'
>>> [stream.place(number) for number in range(5)]
[0, 0, 1, 2, 3]
"""

from collections.abc import Iterable
from collections.abc import Sequence
import os

from t2x.data import tokenizers

_BROKEN = '\ufffd'  # What a decoder puts for a part of a character.
_NEAR = 16  # Most characters between tokens that a tokenizer may drop.


def check_stop(stop: Sequence[str]) -> None:
  """Raises ValueError if a stop string is empty."""
  if any(not end for end in stop):
    raise ValueError("stop holds '', which would end every text at once.")


def cut(text: str, stop: Sequence[str]) -> str:
  """Returns the text before the stop string that is complete first.

  If several are complete at one place, the longest counts. The result is the
  same whether a text is cut once it is complete or while it is generated.

  Args:
    text: text to cut.
    stop: stop strings, none of which is empty.
  """
  matches = [(text.find(end), len(end)) for end in stop if end in text]
  if not matches:
    return text
  return text[: min((at + size, at) for at, size in matches)[1]]


def continuation(
  tokenizer: tokenizers.Tokenizer, before: Sequence[int], ids: Iterable[int]
) -> str:
  """Returns the text that token ids add to the text of a prompt.

  Decoded alone, the ids may lack their first space, since some tokenizers drop
  it at the start of a text. A character whose first bytes are in the prompt is
  returned whole.

  Args:
    tokenizer: tokenizer of the model.
    before: token ids of the prompt.
    ids: token ids that follow the prompt.
  """
  start, whole = tokenizer.decode(before), tokenizer.decode([*before, *ids])
  return whole[_alike(start, whole) :]


class TextStream:
  """Turns the tokens of one text into characters, piece by piece.

  The results of `add` and `finish`, joined, are the result of `continuation`
  for all tokens, cut before the first stop string.

  Attributes:
    num_told: number of characters returned so far.
    stopped: whether a stop string was complete; nothing more is returned then.
  """

  def __init__(
    self,
    tokenizer: tokenizers.Tokenizer,
    before: Sequence[int] = (),
    stop: Sequence[str] = (),
  ):
    """Starts after a prompt.

    Args:
      tokenizer: tokenizer of the model.
      before: token ids of the prompt, on which it depends whether the text
        begins with a space.
      stop: strings before the first of which the text ends.

    Raises:
      ValueError: a stop string is empty.
    """
    check_stop(stop)
    self._tokenizer = tokenizer
    self._stop = tuple(stop)
    self._held = ''  # Certain text that may be the start of a stop string.
    self._prompt = ''  # The part of an echoed prompt that is not certain yet.
    self._free = 0  # Number of the next characters that belong to an echo.
    self._is_over = False
    self.num_told = 0
    self.stopped = False
    self._starts: list[int] = []  # Places of the tokens that have one.
    self._length = 0  # Number of characters that are certain.
    self._begin(before)

  def _begin(self, before: Sequence[int]) -> None:
    # The latest ids that have text. The ids before `_recent` are context: with
    # them the later ids decode as they do within the whole text.
    self._ids = self._tokenizer.shown(before)
    self._recent = len(self._ids)
    self._text = self._tokenizer.decode(self._ids)  # The part that is certain.
    self._is_open = self._may_change(self._text)
    # For each token whose text is not certain, the number of `_ids` before it.
    self._waiting: list[int] = []

  def echo(self, prompt: Sequence[int], text: str | None = None) -> str:
    """Begins the text with the prompt itself, and returns its certain part.

    Must be called before `add`. The prompt's tokens have places like those
    after it, and stop strings in it do not count.

    Args:
      prompt: token ids of the prompt.
      text: text that the ids were made of, which is returned as it is; None
        decodes the ids.
    """
    if text is None:
      stop, self._stop = self._stop, ()
      told, self._stop = self.add(prompt), stop
      self._prompt = self._tokenizer.decode(self._ids) if self._is_open else ''
      return told
    self._begin(prompt)
    self._starts = places(self._tokenizer, prompt, text)
    self._length = self.num_told = len(text)
    return text

  def add(self, tokens: Iterable[int]) -> str:
    """Appends tokens, and returns the text that is now certain."""
    return ''.join([self._add(int(token)) for token in tokens])

  def finish(self) -> str:
    """Returns the rest of the text; no more tokens may follow."""
    if self._is_over or self.stopped:
      return ''
    text = self._tokenizer.decode(self._ids)
    # Held text is returned too: it did not become a stop string.
    result = self._released(self._settle(text)) + self._held
    self._is_over, self._held = True, ''
    self.num_told += len(result)
    return result

  def place(self, number: int) -> int | None:
    """Returns the offset, in characters, where a token's text begins.

    The text of a token ends at the place of the next token. A character of
    several tokens belongs to the last of them.

    Args:
      number: index of the token from 0; tokens of `before` are not counted.

    Returns:
      The place, or None while it is not certain, or not in the returned text.
    """
    if number >= len(self._starts):
      return None
    start = self._starts[number]
    if self.stopped or self._is_over:
      return min(start, self.num_told)
    return start if start <= self.num_told else None

  def _add(self, token: int) -> str:
    if self.stopped:
      return ''
    if self._is_open:
      self._waiting.append(len(self._ids))
    else:
      self._starts.append(self._length)
    shown = self._tokenizer.shown([token])
    if not shown:
      return ''
    self._ids += shown
    text = self._tokenizer.decode(self._ids)
    self._is_open = self._may_change(text)
    if self._is_open:
      return ''
    new = self._settle(text)
    self._forget()
    released = self._released(new)
    self.num_told += len(released)
    return released

  def _may_change(self, text: str) -> bool:
    """Returns whether the next tokens may change the end of a text."""
    runs = self._tokenizer.run_ids
    return text.endswith(_BROKEN) or (bool(self._ids) and self._ids[-1] in runs)

  def _settle(self, text: str) -> str:
    """Returns the new part of a text that is certain, and places its tokens."""
    known = _alike(self._text, text)
    first = self._length - known
    for number in self._waiting:
      start = first + _alike(self._tokenizer.decode(self._ids[:number]), text)
      self._starts.append(max(start, *self._starts[-1:], 0))
    self._waiting = []
    self._free = max(_alike(self._prompt, text) - known, 0)
    self._prompt = ''
    self._length += len(text) - known
    self._text = text
    return text[known:]

  def _forget(self) -> None:
    """Drops the ids that the decoding of later ids does not need."""
    recent = self._ids[self._recent :]
    text = self._tokenizer.decode(recent)
    # Spaces alone give no context: a tokenizer may drop the next space.
    if text.strip(' '):
      self._ids, self._text, self._recent = recent, text, len(recent)

  def _released(self, text: str) -> str:
    """Returns the text but for an end that may begin a stop string."""
    echo, text = text[: self._free], self._held + text[self._free :]
    before = cut(text, self._stop)
    if before != text:
      self.stopped, self._held = True, ''
      return echo + before
    most = max(map(len, self._stop), default=1) - 1
    for size in range(min(most, len(text)), 0, -1):
      tail = text[-size:]
      if any(end.startswith(tail) for end in self._stop):
        self._held = tail
        return echo + text[:-size]
    self._held = ''
    return echo + text


def places(
  tokenizer: tokenizers.Tokenizer, ids: Sequence[int], text: str
) -> list[int]:
  """Returns the offset, in a text, of the part that each token was made of.

  The offsets are exact if decoding the ids gives the text. If the tokenizer
  changes or drops letters, the parts are searched for in order.

  Args:
    tokenizer: tokenizer of the model.
    ids: token ids of the text.
    text: text that the ids were made of.
  """
  stream = TextStream(tokenizer)
  decoded = stream.add(ids) + stream.finish()
  starts = [stream.place(number) or 0 for number in range(len(ids))]
  if decoded == text:
    return starts
  result, position, near = [], 0, _NEAR
  lower, lower_decoded = _lower(text), _lower(decoded)
  for start, end in zip(starts, [*starts[1:], len(decoded)]):
    part = lower_decoded[start:end]
    at = lower.find(part, position, position + len(part) + near)
    position = position if at < 0 else at
    result.append(position)
    position += 0 if at < 0 else len(part)
    near = near + len(part) if at < 0 else _NEAR
  return result


def _lower(text: str) -> str:
  """Returns a text in lower case if that has the same length."""
  lower = text.lower()
  return lower if len(lower) == len(text) else text


def _alike(first: str, second: str) -> int:
  """Returns the length of the longest common prefix."""
  return len(os.path.commonprefix([first, second]))

"""Text of tokens as they come: whole characters, and nothing of a stop string.

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

_BROKEN = '\ufffd'  # What stands for a part of a character.
_NEAR = 16  # Characters between tokens that a tokenizer may have dropped.


def check_stop(stop: Sequence[str]) -> None:
  """Raises ValueError if a stop string is empty."""
  if any(not end for end in stop):
    raise ValueError("stop holds '', which would end every text at once.")


def cut(text: str, stop: Sequence[str]) -> str:
  """Returns the text before the stop string that is whole first.

  Of those that end at one place, it is the longest. So the text is the same
  whether it is cut at its end or as it comes.
  """
  found = [(text.find(end), len(end)) for end in stop if end in text]
  if not found:
    return text
  return text[: min((at + size, at) for at, size in found)[1]]


def after(
  tokenizer: tokenizers.Tokenizer, before: Sequence[int], ids: Iterable[int]
) -> str:
  """Returns the text that ids add to a prompt's.

  By themselves they may lack their first space, which some tokenizers take for
  the start of a text. A character that the prompt has begun is told with its
  end.
  """
  start, whole = tokenizer.decode(before), tokenizer.decode([*before, *ids])
  return whole[_alike(start, whole) :]


class TextStream:
  """Turns one row's tokens into text piece by piece.

  What `add` and `finish` return, joined, is what `after` returns of all tokens,
  cut before the first stop string.

  Attributes:
    num_told: characters that were returned.
    stopped: whether a stop string was met; nothing more comes then.
  """

  def __init__(
    self,
    tokenizer: tokenizers.Tokenizer,
    before: Sequence[int] = (),
    stop: Sequence[str] = (),
  ):
    """Starts after a prompt.

    Args:
      tokenizer: of the model.
      before: the prompt's ids: they decide whether a space begins the text.
      stop: strings before which the text ends.

    Raises:
      ValueError: a stop string is empty.
    """
    check_stop(stop)
    self._tokenizer = tokenizer
    self._stop = tuple(stop)
    self._held = ''
    self._prompt = ''  # What an echo has of the text that is open.
    self._free = 0  # Characters that come next and are an echo's.
    self._is_over = False
    self.num_told = 0
    self.stopped = False
    self._starts: list[int] = []  # Of the tokens whose text has a place.
    self._length = 0  # Of the text that is certain.
    self._begin(before)

  def _begin(self, before: Sequence[int]) -> None:
    # The latest ids that have text, after some in whose company it is what it
    # is within the whole text; those from `_recent` on came last.
    self._ids = self._tokenizer.shown(before)
    self._recent = len(self._ids)
    self._text = self._tokenizer.decode(self._ids)  # That is told.
    self._is_open = self._may_change(self._text)
    self._waiting: list[int] = []  # Of tokens in an open text: ids before each.

  def echo(self, prompt: Sequence[int], text: str | None = None) -> str:
    """Returns what is told of a prompt with which the text begins.

    It comes before anything else. Its tokens have places like those after it,
    and stop strings do not count in it.

    Args:
      prompt: ids.
      text: what they were made of, told as it is; None tells their own text.
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
    """Returns the text that is certain once these tokens have come."""
    return ''.join([self._add(int(token)) for token in tokens])

  def finish(self) -> str:
    """Returns what was held back, when no more tokens come."""
    if self._is_over or self.stopped:
      return ''
    text = self._tokenizer.decode(self._ids)
    # What is held is told as well, if it is not of a stop string.
    result = self._released(self._settle(text)) + self._held
    self._is_over, self._held = True, ''
    self.num_told += len(result)
    return result

  def place(self, number: int) -> int | None:
    """Returns where in the text told so far a token's own text begins.

    What a token adds to the text lies between its place and the next one's; a
    character of several tokens comes with the last of them. None while the
    place is not certain or not told.

    Args:
      number: of the token, counted from 0; those of `before` have none.
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
    """Returns whether a text may become another one with what follows."""
    runs = self._tokenizer.run_ids
    return text.endswith(_BROKEN) or (bool(self._ids) and self._ids[-1] in runs)

  def _settle(self, text: str) -> str:
    """Returns what is new in a text that is certain, and places its tokens."""
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
    """Leaves of the ids what those that follow need before them."""
    recent = self._ids[self._recent :]
    text = self._tokenizer.decode(recent)
    # Spaces alone may be taken for the start of a text.
    if text.strip(' '):
      self._ids, self._text, self._recent = recent, text, len(recent)

  def _released(self, text: str) -> str:
    """Holds back what may be the start of a stop string."""
    own, text = text[: self._free], self._held + text[self._free :]
    before = cut(text, self._stop)
    if before != text:
      self.stopped, self._held = True, ''
      return own + before
    most = max(map(len, self._stop), default=1) - 1
    for size in range(min(most, len(text)), 0, -1):
      tail = text[-size:]
      if any(end.startswith(tail) for end in self._stop):
        self._held = tail
        return own + text[:-size]
    self._held = ''
    return own + text


def places(
  tokenizer: tokenizers.Tokenizer, ids: Sequence[int], text: str
) -> list[int]:
  """Returns where in the text that ids were made of each one's part begins.

  Exact where the tokenizer gives the text back; where it has changed letters
  or dropped some, the parts are looked for, in order.
  """
  stream = TextStream(tokenizer)
  own = stream.add(ids) + stream.finish()
  starts = [stream.place(number) or 0 for number in range(len(ids))]
  if own == text:
    return starts
  result, position, near = [], 0, _NEAR
  folded = [s.lower() if len(s.lower()) == len(s) else s for s in (text, own)]
  for start, end in zip(starts, [*starts[1:], len(own)]):
    part = folded[1][start:end]
    found = folded[0].find(part, position, position + len(part) + near)
    position = position if found < 0 else found
    result.append(position)
    position += 0 if found < 0 else len(part)
    near = near + len(part) if found < 0 else _NEAR
  return result


def _alike(first: str, second: str) -> int:
  """Returns with how many characters both begin."""
  return len(os.path.commonprefix([first, second]))

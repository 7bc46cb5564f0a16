"""Text of tokens as they come: whole characters, and nothing of a stop string.

>>> from t2x.data import tokenizers
>>> bytes_ = tokenizers.BytesTokenizer(tokenizers.Bytes())
>>> stream = TextStream(bytes_, stop=['end'])
>>> [stream.add([i]) for i in bytes_.encode('é en')]
['', 'é', ' ', '', '']
>>> stream.finish()
'en'
"""

from collections.abc import Iterable
from collections.abc import Sequence
import os

from t2x.data import tokenizers

_BROKEN = '\ufffd'  # What stands for a part of a character.


def check_stop(stop: Sequence[str]) -> None:
  """Raises ValueError if a stop string is empty."""
  if any(not end for end in stop):
    raise ValueError("stop holds '', which would end every text at once.")


def cut(text: str, stop: Sequence[str]) -> str:
  """Returns the text before the first of the stop strings."""
  places = [text.find(end) for end in stop if end in text]
  return text[: min(places)] if places else text


class TextStream:
  """Turns one row's tokens into text piece by piece.

  What `add` and `finish` return, joined, is the text of all tokens after what
  stood before, cut before the first stop string.

  Attributes:
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
    self._ids = list(before)
    # Tokens from `_from` on are decoded; those up to `_read` were told.
    self._from = max(len(self._ids) - 8, 0)
    self._read = len(self._ids)
    # A character that the prompt has begun is told with its end.
    while len(self._ids) - self._read < 4 and self._told().endswith(_BROKEN):
      self._read -= 1
    self._stop = tuple(stop)
    self._held = ''
    self.stopped = False

  def add(self, tokens: Iterable[int]) -> str:
    """Returns the text that is certain once these tokens have come."""
    self._ids += [int(token) for token in tokens]
    if self.stopped:
      return ''
    told = self._told()
    text = self._tokenizer.decode(self._ids[self._from :])
    # A part of a character may become another one with its rest.
    if text.endswith(_BROKEN) or not text.startswith(told):
      return ''
    self._from, self._read = self._read, len(self._ids)
    if self._read - self._from < 1:
      return ''
    return self._released(text[len(told) :])

  def finish(self) -> str:
    """Returns what was held back, when no more tokens come."""
    if self.stopped:
      return ''
    told = self._told()
    text = self._tokenizer.decode(self._ids[self._from :])
    rest = text[len(os.path.commonprefix([told, text])) :]
    self._read = len(self._ids)
    result = self._released(rest)
    if self.stopped:
      return result
    held, self._held = self._held, ''
    return result + held

  def _told(self) -> str:
    return self._tokenizer.decode(self._ids[self._from : self._read])

  def _released(self, text: str) -> str:
    """Holds back what may be the start of a stop string."""
    text = self._held + text
    before = cut(text, self._stop)
    if before != text:
      self.stopped, self._held = True, ''
      return before
    most = max(map(len, self._stop), default=1) - 1
    for size in range(min(most, len(text)), 0, -1):
      tail = text[-size:]
      if any(end.startswith(tail) for end in self._stop):
        self._held = tail
        return text[:-size]
    self._held = ''
    return text

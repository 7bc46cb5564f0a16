"""Words that a text must hold, while it is drawn.

Until all are there, the end is banned and the tokens that go on with one are
raised, the more the fewer tokens are left (after Pascual et al., 2021); where
only just enough are left, nothing else may come. A word is there as soon as its
text is, whatever the tokens (`word_starts`), or its tokens are, one after the
other, in one of its forms. Beam search has its own
(`t2x.decode.required_words`).
"""

from collections.abc import Sequence

import numpy as np

from t2x.decode import required_words
from t2x.decode import word_starts


class Keywords:
  """Follows one text; what `engine.Request.control` takes.

  >>> words = Keywords(
  ...   [[(5, 6)], [(7,)]], num_tokens=4, vocab_size=9, ends=(1,))
  >>> for token in (2, 7):
  ...   words.advance(token)
  >>> words.missing, np.flatnonzero(np.unpackbits(
  ...     words.allowed().view(np.uint8), bitorder='little'))
  ([0], array([5]))
  """

  is_done = False  # A text goes on after its last word, up to its end.

  def __init__(
    self,
    words: Sequence[required_words.Word],
    *,
    num_tokens: int,
    vocab_size: int,
    ends: Sequence[int],
    strength: float = 10.0,
    texts: word_starts.Words | None = None,
  ):
    """Begins before the first token.

    Args:
      words: each as token ids, in one form or several.
      num_tokens: of the text.
      vocab_size: of the model.
      ends: tokens that end a text.
      strength: what is added to the logit of a token that begins a word when
        as many tokens are left as the words need; 0 raises none.
      texts: of the words; without them tokens alone count.

    Raises:
      ValueError: a word without tokens, or more than the text has room for.
    """
    self._forms = [
      (number, tuple(form))
      for number, word in enumerate(words)
      for form in word
    ]
    required_words.check(words, num_tokens)
    self._shortest = [min(map(len, word)) for word in words]
    self._left, self._strength = num_tokens, strength
    self._ends = np.array(ends, int)
    self._size = vocab_size
    self._back = [required_words.borders(form) for _, form in self._forms]
    self._places = [0] * len(self._forms)
    self._texts = texts
    self._states = [] if texts is None else texts.start()
    self.missing = list(range(len(words)))

  def allowed(self) -> np.ndarray:
    """Returns uint32 words with a bit for each token that may be next."""
    is_allowed_V = np.ones(self._words * 32, bool)
    if self.missing:
      is_allowed_V[self._ends] = False
    whole = sum(self._shortest[number] for number in self.missing)
    if whole > self._left - 1:  # Any other token might lose what was begun.
      is_allowed_V[:] = False
      for token in self._next():
        places, _, missing = self._after(token)
        if self._needed(places, missing) <= self._left - 1:
          is_allowed_V[token] = True
    return np.packbits(is_allowed_V, bitorder='little').view(np.uint32)

  def raised(self) -> dict[int, float]:
    """Returns what is added to the logits of tokens."""
    if not self.missing or not self._strength:
      return {}
    needed = self._needed(self._places, self.missing)
    amount = self._strength * needed / max(self._left, 1)
    raised = dict.fromkeys(self._next(), amount)
    # What was begun is finished: half a word is of no use.
    begun = self._next(begun=True)
    return raised | dict.fromkeys(begun, max(amount, self._strength / 2))

  def advance(self, token: int) -> None:
    """Goes on with a token."""
    self._places, self._states, self.missing = self._after(token)
    self._left -= 1

  def copy(self) -> 'Keywords':
    """Returns the same after the same text, to be followed apart."""
    result = object.__new__(Keywords)
    result.__dict__.update(self.__dict__)
    return result

  def begin(self, prompt: Sequence[int]) -> 'Keywords':
    """Returns the same at the beginning of a text that follows a prompt."""
    result = self.copy()
    if self._texts is not None:
      result._states = self._texts.start(prompt)
    return result

  @property
  def _words(self) -> int:
    return -(-self._size // 32)

  def _next(self, begun: bool = False) -> set[int]:
    """Returns tokens that go on with a missing word, or that begin one."""
    return {
      token
      for (number, form), place in zip(self._forms, self._places)
      if number in self.missing and (place or not begun)
      for token in ({form[place]} if begun else {form[0], form[place]})
    }

  def _after(self, token: int) -> tuple[list[int], list[int], list[int]]:
    """Returns where forms and texts stand after a token; what is missing."""
    places, found = [], set()
    for (number, form), back, place in zip(
      self._forms, self._back, self._places
    ):
      place = required_words.after(form, back, place, token)
      if place == len(form):
        found.add(number)
        place = 0
      places.append(place)
    states = self._states
    if self._texts is not None:
      states = self._texts.after(states, token)
      found |= self._texts.found(states)
    missing = [number for number in self.missing if number not in found]
    return places, states, missing

  def _needed(self, places: list[int], missing: list[int]) -> int:
    """Returns the tokens of the missing words, the one that is begun first."""
    saved = 0
    for (number, form), place in zip(self._forms, places):
      if number in missing and place:
        saved = max(saved, self._shortest[number] - (len(form) - place))
    return sum(self._shortest[number] for number in missing) - saved

"""Keyword constraints: words that a sampled text must contain.

Until the text contains all words, the end token is banned and the logits of
tokens that begin or continue a missing word are raised, the more the fewer
tokens are left (after Pascual et al., 2021). Where only just enough tokens are
left, all others are banned. The text contains a word as soon as its characters
do, whatever the tokens (`word_starts`), or as soon as the tokens of one of its
forms have come one after the other. Beam search has constraints of its own
(`t2x.decode.required_words`).
"""

from collections.abc import Sequence

import numpy as np

from t2x.decode import required_words
from t2x.decode import word_starts


class Keywords:
  """Required words and how far one text has them: a `requests.Control`.

  >>> words = Keywords(
  ...   [[(5, 6)], [(7,)]], num_tokens=4, vocab_size=9, ends=(1,))
  >>> for token in (2, 7):
  ...   words.advance(token)
  >>> words.missing, np.flatnonzero(np.unpackbits(
  ...     words.allowed().view(np.uint8), bitorder='little'))
  ([0], array([5]))

  Attributes:
    missing: indices of the words that the text does not contain yet.
    is_done: False: a text goes on after its last word, up to its end.
  """

  is_done = False

  def __init__(
    self,
    words: Sequence[required_words.Word],
    *,
    num_tokens: int,
    vocab_size: int,
    ends: Sequence[int],
    strength: float = 10.0,
    texts: word_starts.WordFinder | None = None,
  ):
    """Begins before the first token of a text.

    Args:
      words: forms of each word, such as with and without a space before it,
        as token ids.
      num_tokens: greatest number of tokens of the text.
      vocab_size: number of tokens of the model.
      ends: token ids that end a text.
      strength: addition to the logit of a token that begins a word, when as
        many tokens are left as the words need; 0 raises no logits.
      texts: automata of the words' characters; None finds words by their tokens
        alone.

    Raises:
      ValueError: a word has no tokens, or the words have more than num_tokens.
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
    # Another token might break off a begun word, for which no room is left.
    if whole > self._left - 1:
      is_allowed_V[:] = False
      for token in self._next():
        places, _, missing = self._after(token)
        if self._needed(places, missing) <= self._left - 1:
          is_allowed_V[token] = True
    return np.packbits(is_allowed_V, bitorder='little').view(np.uint32)

  def raised(self) -> dict[int, float]:
    """Returns the additions to logits by token id."""
    if not self.missing or not self._strength:
      return {}
    needed = self._needed(self._places, self.missing)
    amount = self._strength * needed / max(self._left, 1)
    raised = dict.fromkeys(self._next(), amount)
    # Words that are begun come first: half a word is of no use.
    begun = self._next(begun=True)
    return raised | dict.fromkeys(begun, max(amount, self._strength / 2))

  def advance(self, token: int) -> None:
    """Appends a token to the text that is followed."""
    self._places, self._states, self.missing = self._after(token)
    self._left -= 1

  def copy(self) -> 'Keywords':
    """Returns an independent copy, at the same place of the text."""
    result = object.__new__(Keywords)
    result.__dict__.update(self.__dict__)
    return result

  def begin(self, prompt: Sequence[int]) -> 'Keywords':
    """Returns a copy for a text that follows a prompt of these token ids."""
    result = self.copy()
    if self._texts is not None:
      result._states = self._texts.start(prompt)
    return result

  @property
  def _words(self) -> int:
    return -(-self._size // 32)

  def _next(self, begun: bool = False) -> set[int]:
    """Returns tokens that continue or, unless `begun`, start a missing word."""
    return {
      token
      for (number, form), place in zip(self._forms, self._places)
      if number in self.missing and (place or not begun)
      for token in ({form[place]} if begun else {form[0], form[place]})
    }

  def _after(self, token: int) -> tuple[list[int], list[int], list[int]]:
    """Returns the state after a token.

    Returns:
      The place in each form, the states of `texts`, and the missing words.
    """
    places, complete = [], set()
    for (number, form), back, place in zip(
      self._forms, self._back, self._places
    ):
      place = required_words.after(form, back, place, token)
      if place == len(form):
        complete.add(number)
        place = 0
      places.append(place)
    states = self._states
    if self._texts is not None:
      states = self._texts.after(states, token)
      complete |= self._texts.found(states)
    missing = [number for number in self.missing if number not in complete]
    return places, states, missing

  def _needed(self, places: list[int], missing: list[int]) -> int:
    """Returns the number of tokens that the missing words still need.

    Of the words that are begun, the one that saves the most is continued.
    """
    saved = 0
    for (number, form), place in zip(self._forms, places):
      if number in missing and place:
        saved = max(saved, self._shortest[number] - (len(form) - place))
    return sum(self._shortest[number] for number in missing) - saved

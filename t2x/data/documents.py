"""Documents, and how they are split so that nothing held out is trained on.

Whole documents go to training or validation by a hash of their id. What is
taken for a copy is a setting: `exact`, byte-equal documents (of pairs, both
sides equal); `near`, those too that are equal but for blanks or share many runs
of words (`near_copies`); `none`, nothing.
"""

from collections.abc import Sequence
import hashlib
from typing import Any
from typing import Literal
from typing import NamedTuple

import numpy as np

from t2x.data import near_copies

Duplicates = Literal['exact', 'near', 'none']
VALIDATION_SHARE = 0.05
# Why a document is dropped.
EMPTY = 'empty'  # It has no text, or a pair no target.
COPY = 'copy'  # Another one of its side is byte-equal.
NEAR_COPY = 'near_copy'  # Another one of its side says nearly the same.
HELD_OUT = 'held_out'  # It would be trained on, and its text is held out.
TRAINED_ON = 'trained_on'  # It would be held out, and its text is trained on.


class Document(NamedTuple):
  """One example of a corpus.

  Attributes:
    id: its name, the same on every machine.
    text: the text; for pairs, the source.
    target: for pairs, the target.
  """

  id: str
  text: str
  target: str = ''


class Dropped(NamedTuple):
  """The id of a document that is left out, why, and because of which other."""

  id: str
  reason: str
  other: str | None = None


class Split(NamedTuple):
  """Documents on both sides, and which were left out and why."""

  train: list[Document]
  validation: list[Document]
  dropped: list[Dropped]

  @property
  def counts(self) -> dict[str, Any]:
    """How many documents there are, and how many were dropped by reason."""
    reasons = [d.reason for d in self.dropped]
    sides = {'train': len(self.train), 'validation': len(self.validation)}
    return {
      'read': sum(sides.values()) + len(reasons),
      **sides,
      'dropped': {r: reasons.count(r) for r in dict.fromkeys(reasons)},
    }


def split(
  documents: Sequence[Document],
  duplicates: Duplicates = 'exact',
  paired: bool = False,
) -> Split:
  """Splits documents into training and validation without leaks.

  Of documents that are copies one is kept: where any of them is held out, the
  first of those, so that training loses it. With `near` a training document
  also goes if more than a fifth of its runs are held out, then a held-out one
  if more than a fifth of its own are in what is left of training (a short text
  quoted in a long one), then of two on one side that are alike the second.
  With `none` all stay, and equal ones stand where the first does.

  Args:
    documents: in an order that is always the same.
    duplicates: what counts as a copy.
    paired: they need a target too.
  """
  dropped: list[Dropped] = []
  full = []
  for document in documents:
    if document.text.strip() and (not paired or document.target.strip()):
      full.append(document)
    else:
      dropped.append(Dropped(document.id, EMPTY))
  runs, keys = near_copies.Runs(), [document[1:] for document in full]
  if duplicates == 'near':
    keys = [runs.add(*key) for key in keys]
  first = _first_equal(keys)
  draws = np.array([_hash(document.id) for document in full])
  is_held = _held_out(draws, first, duplicates)
  kept = np.arange(len(full))
  if duplicates != 'none':
    own = draws < VALIDATION_SHARE
    kept = _without_copies(full, first, own, is_held, dropped)
  if duplicates == 'near':
    kept = _without_near_copies(full, kept, is_held, runs, dropped)
  return Split(
    [full[i] for i in kept[~is_held[kept]]],
    [full[i] for i in kept[is_held[kept]]],
    dropped,
  )


def fingerprint(documents: Sequence[Document]) -> str:
  """Returns a hash of the documents in their order."""
  digest = hashlib.sha256()
  for document in documents:
    digest.update(repr(tuple(document)).encode('utf-8', 'surrogatepass'))
  return digest.hexdigest()[:16]


def summary(counts: dict[str, Any]) -> str:
  """Returns what became of the documents, in words."""
  reasons = ', '.join(f'{n:,} {r}' for r, n in counts['dropped'].items())
  return (
    f'{counts["read"]:,} documents, {counts["train"]:,} to train on, '
    f'{counts["validation"]:,} held out, '
    f'{sum(counts["dropped"].values()):,} dropped'
    + (f' ({reasons})' if reasons else '')
  )


def _first_equal(keys: Sequence[Any]) -> np.ndarray:
  """Returns for each key the place of the first that equals it."""
  places: dict[Any, int] = {}
  return np.array([places.setdefault(k, i) for i, k in enumerate(keys)], int)


def _held_out(draws, first: np.ndarray, duplicates: str) -> np.ndarray:
  """Returns which documents are on the side of validation, copies together."""
  is_held = draws < VALIDATION_SHARE
  if duplicates == 'none':  # Else a text would be held out for being frequent.
    is_held = is_held[first]
  else:
    is_held[first[is_held]] = True
    is_held = is_held[first]
  distinct = np.unique(first)
  if len(distinct) > 1 and is_held.all():
    is_held[first == distinct[0]] = False
  if len(distinct) > 1 and not is_held.any():
    is_held[first == distinct[np.argmin(draws[distinct])]] = True
  return is_held


def _without_copies(documents, first, own, is_held, dropped) -> np.ndarray:
  """Returns one document of each group of copies, and names the others.

  `own` is the side that each would be on by itself.
  """
  places = np.arange(len(documents))
  keeper = places.copy()
  by_rank = np.lexsort((places, own != is_held))[::-1]
  keeper[first[by_rank]] = by_rank  # The last one written is the first.
  keeper = keeper[first]
  for i in np.flatnonzero(keeper != places):
    document, other = documents[i], documents[keeper[i]]
    reason = COPY if document[1:] == other[1:] else NEAR_COPY
    if is_held[i] and not own[i]:
      reason = HELD_OUT
    dropped.append(Dropped(document.id, reason, other.id))
  return np.flatnonzero(keeper == places)


def _without_near_copies(documents, kept, is_held, runs, dropped) -> np.ndarray:
  """Returns which of the kept documents are no near copies of others."""
  index = runs.index(kept)
  held = is_held[kept]
  train = ~held

  def drop(i: int, reason: str, other: int) -> None:
    ids = [documents[kept[place]].id for place in (i, other)]
    dropped.append(Dropped(ids[0], reason, ids[1]))

  leaks = train & (index.shared(held) > near_copies.MAX_SHARED)
  for i in np.flatnonzero(leaks).tolist():
    drop(i, HELD_OUT, index.closest(i, held))
  train &= ~leaks
  leaks = held & (index.shared(train) > near_copies.MAX_SHARED)
  for i in np.flatnonzero(leaks).tolist():
    drop(i, TRAINED_ON, index.closest(i, train))
  held &= ~leaks
  is_kept = train | held
  for one, two in index.alike(np.where(is_kept, held.astype(int), -1)):
    if is_kept[one] and is_kept[two]:
      is_kept[two] = False
      drop(two, NEAR_COPY, one)
  return kept[is_kept]


def _hash(name: str) -> float:
  """Returns a number in [0, 1) that depends on nothing but `name`."""
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6]) / 2**48

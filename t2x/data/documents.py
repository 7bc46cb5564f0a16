"""Splitting documents so that no held-out text is trained on.

Whole documents go to training or validation by a hash of their id. A setting
says which documents count as copies: `exact`, byte-equal documents (of pairs,
both sides equal); `near`, also those that differ only in blanks or share many
runs of words (`near_copies`); `none`, none at all.
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
# Reasons for which a document is dropped.
EMPTY = 'empty'  # It has no text, or as a pair no target.
COPY = 'copy'  # A document of the same split is byte-equal.
NEAR_COPY = 'near_copy'  # One of the same split has nearly the same text.
HELD_OUT = 'held_out'  # It would be trained on, and its text is held out.
TRAINED_ON = 'trained_on'  # It would be held out, and its text is trained on.


class Document(NamedTuple):
  """One example of a corpus.

  Attributes:
    id: a name, the same on every machine.
    text: the text; of a pair, the source.
    target: the target text of a pair, else empty.
  """

  id: str
  text: str
  target: str = ''


class Dropped(NamedTuple):
  """A document that is left out.

  Attributes:
    id: id of the document.
    reason: one of the reasons above, such as `COPY`.
    other: id of the document that it is a copy of; None if it is empty.
  """

  id: str
  reason: str
  other: str | None = None


class Split(NamedTuple):
  """The documents of a corpus after splitting.

  Attributes:
    train: documents to train on.
    validation: documents that are held out.
    dropped: documents that are left out of both.
  """

  train: list[Document]
  validation: list[Document]
  dropped: list[Dropped]

  @property
  def counts(self) -> dict[str, Any]:
    """Numbers of documents: read, of each split, and dropped by reason."""
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

  One document of each group of copies is kept. If any of the group is held out,
  it is the first of those, so that the text is not trained on. With `near`,
  three more rules apply in turn. A training document is dropped if more than a
  fifth of its runs of words occur in held-out documents. A held-out document is
  dropped if more than a fifth of its runs occur in the training documents that
  remain (a short text that a long one quotes). Of two documents of the same
  split that are near copies, the second is dropped. With `none` all documents
  are kept, and equal documents go to the split of the first of them.

  Args:
    documents: the documents, in an order that is always the same.
    duplicates: rule by which documents count as copies.
    paired: whether a document needs a target too.
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
    was_held = draws < VALIDATION_SHARE
    kept = _without_copies(full, first, was_held, is_held, dropped)
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
  """Returns a phrase that says how many documents were kept and dropped."""
  reasons = ', '.join(f'{n:,} {r}' for r, n in counts['dropped'].items())
  return (
    f'{counts["read"]:,} documents, {counts["train"]:,} to train on, '
    f'{counts["validation"]:,} held out, '
    f'{sum(counts["dropped"].values()):,} dropped'
    + (f' ({reasons})' if reasons else '')
  )


def _first_equal(keys: Sequence[Any]) -> np.ndarray:
  """Returns for each key the index of the first key that equals it."""
  places: dict[Any, int] = {}
  return np.array([places.setdefault(k, i) for i, k in enumerate(keys)], int)


def _held_out(
  draws: np.ndarray, first: np.ndarray, duplicates: str
) -> np.ndarray:
  """Returns a mask of the held-out documents; copies are held out together.

  Args:
    draws: (documents,) a number in [0, 1) for each document.
    first: (documents,) index of the first document that each is a copy of.
    duplicates: rule by which documents count as copies.
  """
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


def _without_copies(
  documents: Sequence[Document],
  first: np.ndarray,
  was_held: np.ndarray,
  is_held: np.ndarray,
  dropped: list[Dropped],
) -> np.ndarray:
  """Returns the index of one document of each group of copies.

  Args:
    documents: the documents.
    first: (documents,) index of the first document that each is a copy of.
    was_held: (documents,) whether a document would be held out if it had no
      copies.
    is_held: (documents,) whether it is held out.
    dropped: list to which the other documents of each group are added.
  """
  places = np.arange(len(documents))
  keeper = places.copy()
  by_rank = np.lexsort((places, was_held != is_held))[::-1]
  keeper[first[by_rank]] = by_rank  # The last one written is the first.
  keeper = keeper[first]
  for i in np.flatnonzero(keeper != places).tolist():
    document, other = documents[i], documents[int(keeper[i])]
    reason = COPY if document[1:] == other[1:] else NEAR_COPY
    if is_held[i] and not was_held[i]:
      reason = HELD_OUT
    dropped.append(Dropped(document.id, reason, other.id))
  return np.flatnonzero(keeper == places)


def _without_near_copies(
  documents: Sequence[Document],
  kept: np.ndarray,
  is_held: np.ndarray,
  runs: near_copies.Runs,
  dropped: list[Dropped],
) -> np.ndarray:
  """Returns the kept documents that are no near copies of others."""
  index = runs.index(kept)
  validation = is_held[kept]
  train = ~validation

  def drop(i: int, reason: str, other: int) -> None:
    ids = [documents[kept[place]].id for place in (i, other)]
    dropped.append(Dropped(ids[0], reason, ids[1]))

  leaks = train & (index.shared(validation) > near_copies.MAX_SHARED)
  for i in np.flatnonzero(leaks).tolist():
    drop(i, HELD_OUT, index.closest(i, validation))
  train &= ~leaks
  leaks = validation & (index.shared(train) > near_copies.MAX_SHARED)
  for i in np.flatnonzero(leaks).tolist():
    drop(i, TRAINED_ON, index.closest(i, train))
  validation &= ~leaks
  is_kept = train | validation
  for one, two in index.alike(np.where(is_kept, validation.astype(int), -1)):
    if is_kept[one] and is_kept[two]:
      is_kept[two] = False
      drop(two, NEAR_COPY, one)
  return kept[is_kept]


def _hash(name: str) -> float:
  """Returns a number in [0, 1) that depends on nothing but `name`."""
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6]) / 2**48

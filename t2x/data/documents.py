"""Documents, and how they are split so that nothing held out is trained on.

Whole documents go to training or validation by a hash of their id. Exact copies
are removed first. A near-copy is measured by shingles: of all runs of eight
words in a document, the share that also occurs on the other side (Broder,
1997; used on training data by Lee et al., 2022).
"""

from collections.abc import Sequence
import hashlib
import re
from typing import NamedTuple

import numpy as np

VALIDATION_SHARE = 0.05
MAX_SHARED = 0.2
_SHINGLE = 8
_WORD = re.compile(r'\w+')


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


class Split(NamedTuple):
  """Documents on both sides, and how many were left out and why."""

  train: list[Document]
  validation: list[Document]
  counts: dict[str, int]


def split(documents: Sequence[Document]) -> Split:
  """Splits documents into training and validation without leaks.

  A training document is dropped if more than `MAX_SHARED` of its shingles
  occur in the validation documents; then a validation document is dropped if
  more than that share of its own occur in what is left of training (a short
  document quoted in a long one).
  """
  unique = _drop_copies(documents)
  held_out = np.array([_hash(d.id) < VALIDATION_SHARE for d in unique], bool)
  if len(unique) > 1 and held_out.all():
    held_out[0] = False
  if len(unique) > 1 and not held_out.any():
    held_out[np.argmin([_hash(d.id) for d in unique])] = True

  shingles = _Shingles(unique)
  train = np.flatnonzero(~held_out)
  validation = np.flatnonzero(held_out)
  keep_train = train[shingles.shared(train, validation) <= MAX_SHARED]
  keep_val = validation[shingles.shared(validation, keep_train) <= MAX_SHARED]
  counts = {
    'train': len(keep_train),
    'validation': len(keep_val),
    'copies': len(documents) - len(unique),
    'near_copies_train': len(train) - len(keep_train),
    'near_copies_validation': len(validation) - len(keep_val),
  }
  return Split(
    [unique[i] for i in keep_train], [unique[i] for i in keep_val], counts
  )


def fingerprint(documents: Sequence[Document]) -> str:
  """Returns a hash of the documents in their order."""
  digest = hashlib.sha256()
  for document in documents:
    digest.update(repr(tuple(document)).encode('utf-8', 'surrogatepass'))
  return digest.hexdigest()[:16]


def normalize(text: str) -> str:
  """Returns the words alone, in lower case: what makes two texts copies."""
  return ' '.join(_WORD.findall(text.lower()))


def _drop_copies(documents: Sequence[Document]) -> list[Document]:
  """Keeps the first of documents whose words are the same."""
  first = {}
  for document in documents:
    words = normalize(document.text), normalize(document.target)
    first.setdefault(words, document)
  return list(first.values())


def _hash(name: str) -> float:
  """Returns a number in [0, 1) that depends on nothing but `name`."""
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6]) / 2**48


class _Shingles:
  """The set of 64-bit shingle hashes of each document."""

  def __init__(self, documents: Sequence[Document]):
    ids = {}
    self._sets = []
    for document in documents:
      words = _WORD.findall(f'{document.text} {document.target}'.lower())
      word_ids = [ids.setdefault(word, len(ids) + 1) for word in words]
      self._sets.append(_shingle_hashes(np.array(word_ids, np.uint64)))

  def shared(self, of: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The share of each document's shingles that any of `others` has."""
    if not len(of) or not len(others):
      return np.zeros(len(of))
    known = np.unique(np.concatenate([self._sets[i] for i in others]))
    hashes = np.concatenate([self._sets[i] for i in of])
    place = np.searchsorted(known, hashes).clip(max=len(known) - 1)
    lengths = np.array([len(self._sets[i]) for i in of])
    starts = np.cumsum(lengths) - lengths
    return np.add.reduceat(known[place] == hashes, starts, dtype=int) / lengths


def _shingle_hashes(word_ids: np.ndarray) -> np.ndarray:
  """Returns the distinct hashes of all runs of eight words; one at least."""
  short = max(_SHINGLE - len(word_ids), 0)
  word_ids = np.pad(word_ids, (0, short))
  num = len(word_ids) - _SHINGLE + 1
  hashes = np.zeros(num, np.uint64)
  for i in range(_SHINGLE):
    mixed = (hashes ^ word_ids[i : i + num]) * np.uint64(0x9E3779B97F4A7C15)
    hashes = mixed ^ (mixed >> np.uint64(29))
  return np.unique(hashes)

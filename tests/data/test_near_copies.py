"""Near copies, against sets of tuples of words that are compared one by one."""

import collections
import time

import numpy as np
import pytest

from t2x.data import documents as documents_lib
from t2x.data import near_copies

Document = documents_lib.Document

THAI = ''.join(map(chr, range(0x0E01, 0x0E2F)))
HAN = ''.join(map(chr, range(0x4E00, 0x4E00 + 800)))


def _words(seed, num=200):
  rng = np.random.default_rng(seed)
  return [f'w{i}' for i in rng.integers(0, 5000, num)]


def _corpus(num=300):
  return [Document(f'doc{i}', ' '.join(_words(i))) for i in range(num)]


def _ids(documents):
  return {d.id for d in documents}


def _train_names(num):
  names = (f'name{i}' for i in range(10_000))
  limit = documents_lib.VALIDATION_SHARE
  return [n for n in names if documents_lib._hash(n) >= limit][:num]


def _split(documents):
  return documents_lib.split(documents, 'near')


def test_planted_near_copies_never_train():
  corpus = _corpus()
  held_out = _split(corpus).validation[0]
  words = held_out.text.split()
  edited = [*words]
  edited[::40] = ['edited'] * len(edited[::40])
  planted = {
    'one_word_less': words[1:],
    'some_words_changed': edited,
    'half_of_it_in_other_text': words[:100] + _words(998, 100),
    'twice': words + words,
  }
  # Ids that would go to training.
  documents = [Document(k, ' '.join(v)) for k, v in planted.items()]
  assert all(documents_lib._hash(d.id) > 0.05 for d in documents)
  split = _split([*corpus, *documents])
  assert not _ids(split.train) & set(planted)
  assert held_out.id in _ids(split.validation)
  assert split.dropped == [(k, 'held_out', held_out.id) for k in planted]
  assert _ids(documents_lib.split([*corpus, *documents]).train) >= set(planted)


def test_blanks_make_no_other_document():
  corpus = _corpus(20)
  copy = Document('copy', '\n' + corpus[3].text.replace(' ', '\u3000\n'))
  split = _split([*corpus, copy])
  assert split.dropped == [('copy', 'near_copy', 'doc3')]


def test_document_quoted_in_a_long_training_document_is_not_held_out():
  corpus = _corpus()
  held_out = _split(corpus).validation[0]
  quoting = ' '.join([*_words(1001, 5000), held_out.text])
  split = _split([*corpus, Document('quoting', quoting)])
  assert 'quoting' in _ids(split.train)
  assert split.dropped == [(held_out.id, 'trained_on', 'quoting')]


@pytest.mark.parametrize('script', ['words', 'Thai', 'Chinese', 'Japanese'])
def test_a_copy_with_few_changes_goes_in_any_script(script):
  rng = np.random.default_rng(3)
  letters = {
    'Thai': THAI,
    'Chinese': HAN,
    'Japanese': HAN[:200] + '\u3042' * 99,
  }
  num = 600 if script in letters else 200

  def draw():
    if script == 'words':
      return list(_words(rng.integers(1 << 30), num))
    return [
      letters[script][i] for i in rng.integers(0, len(letters[script]), num)
    ]

  def write(parts):
    return (' ' if script == 'words' else '').join(parts)

  names = _train_names(40)
  texts = [draw() for _ in range(20)]
  changed = [list(text) for text in texts]
  for text in changed:
    text[num // 3], text[num // 2] = 'X', 'Y'
  documents = [Document(n, write(t)) for n, t in zip(names, texts + changed)]
  split = _split(documents)
  near = [d for d in split.dropped if d.reason in ('near_copy', 'held_out')]
  assert _ids(near) == set(names[20:])
  # Half of each replaced: other documents.
  for text in changed:
    text[: num // 2] = draw()[: num // 2]
  documents = [Document(n, write(t)) for n, t in zip(names, texts + changed)]
  assert not [d for d in _split(documents).dropped if d.reason == 'near_copy']


@pytest.mark.parametrize('num, body', [(18, 1), (18, 100), (150, 100)])
def test_a_preamble_of_many_documents_costs_none(num, body):
  preamble = ' '.join(_words(0, num))
  rng = np.random.default_rng(1)
  lengths = rng.integers(1, body + 1, 1000)
  documents = [
    Document(f'd{i}', f'{preamble} unique{i} ' + ' '.join(_words(i + 1, n)))
    for i, n in enumerate(lengths)
  ]
  split = _split(documents)
  assert not split.dropped
  assert len(split.train) + len(split.validation) == 1000


@pytest.mark.parametrize('num', [5, 10, 11, 60, 300])
def test_all_copies_of_a_long_text_are_found(num):
  """However many: that they share it makes it no preamble."""
  rng = np.random.default_rng(num)
  words = _words(777, 100)
  names, documents = _train_names(num), []
  for i, name in enumerate(names):
    own = [*words]
    own[rng.integers(0, 100)] = f'changed{i}'
    documents.append(Document(name, ' '.join(own)))
  split = _split([*documents, *_corpus(40)])
  assert {d.reason for d in split.dropped} == {'near_copy'}
  assert len(split.dropped) >= 0.95 * (num - 1)
  assert names[0] not in _ids(split.dropped)


def test_forms_of_many_documents_are_no_copies():
  """Short passages: at most ten may be copies, eleven are a form."""
  words = ' '.join(_words(777, 30))
  names = _train_names(near_copies.COMMON + 1)
  documents = [Document(n, f'{words} {n}') for n in names]
  few = _split([*documents[:-1], *_corpus(40)])
  assert _ids(few.dropped) == set(names[1:-1])
  assert not _split([*documents, *_corpus(40)]).dropped


def _runs(document):
  """Returns the runs of a document that is written in words."""
  words = document.text.split()
  if len(words) < 8:
    return {tuple(words)}
  return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}


def _naive(documents):
  """The rules of near copies, in sets; `documents` are all distinct."""
  runs = {d.id: _runs(d) for d in documents}
  counts = collections.Counter(run for own in runs.values() for run in own)
  used = collections.Counter()
  for own in runs.values():
    common = sum(counts[run] > 5 for run in own)
    if common <= 50 or common <= 1.4 / 1.7 * len(own):
      used.update(own)
  runs = {i: {r for r in own if used[r] <= 10} for i, own in runs.items()}
  held = {i for i in runs if documents_lib._hash(i) < 0.05}
  train = [i for i in runs if i not in held]
  held = [i for i in runs if i in held]

  def leaks(name, others):
    known = set().union(*(runs[i] for i in others))
    return len(runs[name] & known) > 0.2 * len(runs[name])

  train = [i for i in train if not leaks(i, held)]
  held = [i for i in held if not leaks(i, train)]
  return [_unlike(side, runs) for side in (train, held)]


def _unlike(side, runs):
  """Returns who is like nobody before; a run tells of its first ten owners."""
  owners = collections.defaultdict(list)
  for name in side:
    for run in runs[name]:
      owners[run].append(name)
  kept = []
  for name in side:
    both = collections.Counter(
      other for run in runs[name] for other in owners[run][:10]
    )
    size = len(runs[name])
    alike = (both[i] > 0.7 * (size + len(runs[i]) - both[i]) for i in kept)
    if not any(alike):
      kept.append(name)
  return set(kept)


def test_near_copies_against_sets_compared_one_by_one():
  dropped = collections.Counter()
  for seed in range(20):
    rng = np.random.default_rng(seed)
    base = [_words(1000 * seed + i, 200) for i in range(30)]
    documents = []
    for i in range(150):  # They overlap in all degrees, copies included.
      source = base[rng.integers(0, 30)]
      start, num = rng.integers(0, 150), rng.integers(0, 120)
      own = _words(1000 * seed + 100 + i, rng.choice([0, 1, 3, 10, 60]))
      text = ' '.join([*source[start : start + num], *own, f'own{i}'])
      documents.append(Document(f'{seed}-{i}', text))
      if i < 12:  # A preamble, and one text many times over.
        preamble = [*base[0], *own, f'own{i}']
        documents.append(Document(f'{seed}-p{i}', ' '.join(preamble)))
        copy = [*base[1], f'own{i}']
        documents.append(Document(f'{seed}-c{i}', ' '.join(copy)))
      if rng.random() < 0.3:  # A few of its words changed.
        words = text.split()
        words[rng.integers(0, len(words))] = f'changed{i}'
        documents.append(Document(f'{seed}-{i}b', ' '.join(words)))
    split = _split(documents)
    expected = _naive(documents)
    assert [_ids(split.train), _ids(split.validation)] == expected
    dropped.update(d.reason for d in split.dropped)
    runs = {d.id: _runs(d) for d in documents}
    for d in split.dropped:  # The other one that is named has some of it.
      assert runs[d.id] & runs[d.other]
  assert set(dropped) == {'near_copy', 'held_out', 'trained_on'}
  assert min(dropped.values()) > 5


def test_runs_of_characters_against_plain_strings():
  """Of a script without blanks a run is 24 characters, of a mix as counted."""
  runs = near_copies.Runs()
  text = 'one ' + HAN[:30] + ' two three'
  runs.add(text, '')
  units = ['one', *HAN[:30], 'two', 'three']
  found = set()
  for i in range(len(units)):
    size, run = 0, []
    for unit in units[i:]:
      size += 1 if unit in HAN else 3
      run.append(unit)
      if size >= 24:
        found.add(tuple(run))
        break
  assert len(runs._hashes[0]) == len(found)
  assert len(set(runs._hashes[0].tolist())) == len(found)


def test_many_documents_take_little_time():
  """The comparison is no product of documents by documents."""
  corpus = _corpus(4000)
  start = time.perf_counter()
  assert not _split(corpus).dropped
  assert time.perf_counter() - start < 20

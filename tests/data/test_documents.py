"""Which documents are kept, on which side, and which are dropped and why."""

import numpy as np
import pytest

from t2x.data import documents as documents_lib

Document = documents_lib.Document

# Pairs of texts that differ in what a comparison of words alone leaves out.
DISTINCT = {
  'operators': ('a+b', 'a-b'),
  'faces': ('Good :)', 'Good :('),
  'decimals': ('1.23', '1 23'),
  'case': ('us', 'US'),
  'signs': ('temperature -5', 'temperature 5'),
  'Hindi': ('\u0915\u093f\u0924\u093e\u092c', '\u0915\u0940\u0924\u0947\u092c'),
  'Hindi virama': ('\u0915\u094d\u0937', '\u0915\u0937'),
  'Thai': ('\u0e1b\u0e48\u0e32', '\u0e1b\u0e49\u0e32'),
  'Arabic': (
    '\u0643\u064e\u062a\u064e\u0628',
    '\u0643\u064f\u062a\u0650\u0628',
  ),
  'decomposed': ('re\u0301sume\u0301', 'resume'),
  'composed': ('caf\u00e9', 'cafe\u0301'),
  'emoji': ('\U0001f600', '\U0001f622'),
  'skin': ('\U0001f44d\U0001f3fb', '\U0001f44d\U0001f3ff'),
  'symbols': ('\u20ac 5', '\u00a3 5'),
  'code': (
    'def f(a, b):\n  return a + b\n',
    'def f(a, b):\n  return a - b\n',
  ),
  'comparison': ('if (x <= y) swap(x, y);', 'if (x >= y) swap(x, y);'),
  'marks only': ('\u0301\u0301', '\u0300\u0300'),
  'Chinese': ('\u6211\u4e0d\u53bb\u3002', '\u6211\u4e0d\u53bb\uff1f'),
}


def _words(seed, num=200):
  rng = np.random.default_rng(seed)
  return [f'w{i}' for i in rng.integers(0, 5000, num)]


def _corpus(num=300):
  return [Document(f'doc{i}', ' '.join(_words(i))) for i in range(num)]


def _ids(documents):
  return {d.id for d in documents}


def _names(held_out, num, start='name'):
  """Returns ids that go to one side."""
  found = (f'{start}{i}' for i in range(100_000))
  limit = documents_lib.VALIDATION_SHARE
  chosen = (n for n in found if (documents_lib._hash(n) < limit) == held_out)
  return [next(chosen) for _ in range(num)]


@pytest.mark.parametrize('duplicates', ['exact', 'near', 'none'])
def test_every_document_is_on_one_side(duplicates):
  split = documents_lib.split(_corpus(), duplicates)
  assert not _ids(split.train) & _ids(split.validation)
  assert len(split.train) + len(split.validation) == 300
  assert 5 <= len(split.validation) <= 30  # 15 expected.
  assert not split.dropped and not split.counts['dropped']


def test_side_depends_on_the_id_alone():
  whole = documents_lib.split(_corpus())
  part = documents_lib.split(_corpus()[::2])
  assert _ids(part.validation) <= _ids(whole.validation)
  reversed_ = documents_lib.split(_corpus()[::-1])
  assert _ids(reversed_.validation) == _ids(whole.validation)


@pytest.mark.parametrize('duplicates', ['exact', 'near', 'none'])
@pytest.mark.parametrize('kind', DISTINCT)
def test_distinct_documents_are_no_copies(duplicates, kind):
  one, two = DISTINCT[kind]
  for sides in ((False, False), (False, True), (True, True)):
    names = [_names(side, 2)[i] for i, side in enumerate(sides)]
    both = [Document(names[0], one), Document(names[1], two)]
    split = documents_lib.split([*_corpus(20), *both], duplicates)
    assert set(names) <= _ids(split.train) | _ids(split.validation)
    assert not split.dropped


@pytest.mark.parametrize('duplicates', ['exact', 'near'])
def test_byte_equal_documents_go_and_are_named(duplicates):
  corpus = _corpus(20)
  train, held = _names(False, 3), _names(True, 2)
  documents = [
    Document(train[0], 'one'),
    Document(train[1], 'one'),
    Document(train[2], 'two'),  # It is held out below.
    *corpus,
    Document(held[0], 'two'),
    Document(held[1], 'two'),
    Document('blank', ' \n\u2028'),
  ]
  split = documents_lib.split(documents, duplicates)
  assert sorted(split.dropped) == sorted(
    [
      ('blank', 'empty', None),
      (train[1], 'copy', train[0]),
      (train[2], 'held_out', held[0]),
      (held[1], 'copy', held[0]),
    ]
  )
  assert train[0] in _ids(split.train) and held[0] in _ids(split.validation)
  counts = split.counts
  assert counts['dropped'] == {'empty': 1, 'copy': 2, 'held_out': 1}
  assert counts['read'] == 26
  assert counts['train'] + counts['validation'] == 22
  assert '26 documents' in documents_lib.summary(counts)
  assert '4 dropped (1 empty, 2 copy, 1 held_out)' in documents_lib.summary(
    counts
  )


def test_with_none_all_stay_and_equal_ones_stand_together():
  train, held = _names(False, 2), _names(True, 2)
  documents = [
    Document(train[0], 'one'),
    Document(held[0], 'one'),
    Document(held[1], 'two'),
    Document(train[1], 'two'),
    *_corpus(20),
  ]
  split = documents_lib.split(documents, 'none')
  assert len(split.train) + len(split.validation) == len(documents)
  assert {train[0], held[0]} <= _ids(split.train)
  assert {train[1], held[1]} <= _ids(split.validation)
  texts = [{d.text for d in side} for side in split[:2]]
  assert not texts[0] & texts[1]


@pytest.mark.parametrize('duplicates', ['exact', 'near'])
def test_pairs_are_copies_where_both_sides_are(duplicates):
  pairs = [
    Document('a', 'yes', 'ja'),
    Document('b', 'yes', 'doch'),  # The same source with another target.
    Document('c', 'yes', 'ja'),
    Document('d', 'jawohl', 'ja'),
    Document('e', 'yes ja', 'x'),  # The sides are cut elsewhere.
    Document('f', 'yes', 'ja x'),
    Document('g', 'no', ' '),
  ]
  split = documents_lib.split(pairs, duplicates, paired=True)
  kept = _ids(split.train) | _ids(split.validation)
  assert kept == {'a', 'b', 'd', 'e', 'f'}
  assert sorted(d[:2] for d in split.dropped) == [('c', 'copy'), ('g', 'empty')]


@pytest.mark.parametrize('duplicates', ['exact', 'near', 'none'])
def test_two_documents_give_one_to_each_side(duplicates):
  for i in range(20):
    two = [Document(f'{i}-{j}', ' '.join(_words(j))) for j in (0, 1)]
    split = documents_lib.split(two, duplicates)
    assert len(split.train) == len(split.validation) == 1


@pytest.mark.parametrize('duplicates', ['exact', 'near', 'none'])
def test_few_or_no_documents(duplicates):
  assert documents_lib.split([], duplicates).counts['read'] == 0
  same = [Document(f'{i}', 'same') for i in range(5)]
  split = documents_lib.split(same, duplicates)
  assert min(len(split.train), len(split.validation)) == 0
  odd = [Document('a', '\u200b'), Document('b', '\u200b\u200b x')]
  assert len(documents_lib.split(odd, duplicates).dropped) == 0


def _naive_exact(documents, limit):
  """Groups texts; a group is held out where any member is."""
  groups = {}
  for document in documents:
    groups.setdefault(document[1:], []).append(document)
  train, validation = [], []
  for group in groups.values():
    held = [d for d in group if documents_lib._hash(d.id) < limit]
    (validation if held else train).append((held or group)[0])
  return _ids(train), _ids(validation)


def test_exact_against_groups_of_equal_texts():
  rng = np.random.default_rng(0)
  for trial in range(200):
    documents = [
      Document(f'{trial}-{i}', f'text {rng.integers(0, 30)}')
      for i in range(rng.integers(40, 80))
    ]
    split = documents_lib.split(documents)
    expected = _naive_exact(documents, documents_lib.VALIDATION_SHARE)
    if all(expected):  # Else one is moved to the empty side.
      assert (_ids(split.train), _ids(split.validation)) == expected
    text_of = {d.id: d.text for d in documents}
    for dropped in split.dropped:
      assert text_of[dropped.id] == text_of[dropped.other]
    kept = _ids(split.train) | _ids(split.validation)
    assert kept | _ids(split.dropped) == set(text_of)
    assert {d.other for d in split.dropped} <= kept


def test_fingerprint_sees_every_change():
  corpus = _corpus(3)
  changed = [corpus[0]._replace(text=corpus[0].text + '.'), *corpus[1:]]
  renamed = [corpus[0]._replace(id='other'), *corpus[1:]]
  prints = {documents_lib.fingerprint(c) for c in (corpus, changed, renamed)}
  assert len(prints) == 3
  assert documents_lib.fingerprint(_corpus(3)) in prints

import numpy as np

from t2x.data import documents as documents_lib


def _words(seed, num=200):
  rng = np.random.default_rng(seed)
  return [f'w{i}' for i in rng.integers(0, 5000, num)]


def _corpus(num=300):
  return [
    documents_lib.Document(f'doc{i}', ' '.join(_words(i))) for i in range(num)
  ]


def _ids(documents):
  return {d.id for d in documents}


def test_every_document_is_on_one_side():
  split = documents_lib.split(_corpus())
  assert not _ids(split.train) & _ids(split.validation)
  assert len(split.train) + len(split.validation) == 300
  assert 5 <= len(split.validation) <= 30  # 15 expected.


def test_side_depends_on_the_id_alone():
  whole = documents_lib.split(_corpus())
  part = documents_lib.split(_corpus()[::2])
  assert _ids(part.validation) <= _ids(whole.validation)
  reversed_ = documents_lib.split(_corpus()[::-1])
  assert _ids(reversed_.validation) == _ids(whole.validation)


def test_copies_are_dropped_whatever_their_case_and_spacing():
  corpus = _corpus(20)
  copy = documents_lib.Document(
    'copy', corpus[3].text.upper().replace(' ', '\n')
  )
  split = documents_lib.split([*corpus, copy])
  assert split.counts['copies'] == 1
  assert 'copy' not in _ids(split.train) | _ids(split.validation)


def test_planted_near_copies_never_train():
  corpus = _corpus()
  held_out = documents_lib.split(corpus).validation[0]
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
  documents = [
    documents_lib.Document(k, ' '.join(v)) for k, v in planted.items()
  ]
  assert all(documents_lib._hash(d.id) > 0.05 for d in documents)
  split = documents_lib.split([*corpus, *documents])
  assert not _ids(split.train) & set(planted)
  assert split.counts['near_copies_train'] == len(planted)
  assert held_out.id in _ids(split.validation)


def test_document_quoted_in_a_long_training_document_is_not_held_out():
  corpus = _corpus()
  held_out = documents_lib.split(corpus).validation[0]
  quoting = ' '.join([*_words(1001, 5000), held_out.text])
  split = documents_lib.split(
    [*corpus, documents_lib.Document('quoting', quoting)]
  )
  assert 'quoting' in _ids(split.train)
  assert held_out.id not in _ids(split.validation)
  assert split.counts['near_copies_validation'] == 1


def test_no_shingle_share_above_the_limit_remains():
  base = _words(5, 400)
  rng = np.random.default_rng(0)
  corpus = []
  for i in range(200):  # Documents that overlap in all degrees.
    start, num = rng.integers(0, 300), rng.integers(1, 100)
    text = ' '.join(_words(i, 100) + base[start : start + num])
    corpus.append(documents_lib.Document(f'doc{i}', text))
  split = documents_lib.split(corpus)

  def shingles(document):
    words = document.text.split()
    return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}

  for ours, others in (split[:2], split[1::-1]):
    known = set().union(*map(shingles, others))
    for document in ours:
      own = shingles(document)
      assert len(own & known) <= 0.2 * len(own)
  assert split.counts['near_copies_train'] > 0


def test_two_documents_give_one_to_each_side():
  for i in range(20):
    two = [
      documents_lib.Document(f'{i}-{j}', ' '.join(_words(j))) for j in (0, 1)
    ]
    split = documents_lib.split(two)
    assert len(split.train) == len(split.validation) == 1


def test_fingerprint_sees_every_change():
  corpus = _corpus(3)
  changed = [corpus[0]._replace(text=corpus[0].text + '.'), *corpus[1:]]
  renamed = [corpus[0]._replace(id='other'), *corpus[1:]]
  prints = {documents_lib.fingerprint(c) for c in (corpus, changed, renamed)}
  assert len(prints) == 3
  assert documents_lib.fingerprint(_corpus(3)) in prints

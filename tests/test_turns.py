"""Tests that take long take turns, and none is left out for ever."""

import collections
import random

import pytest
import turns

SECONDS = {f'file.py::test[{i}]': 0.3 * i for i in range(200)}
LONG = {name for name, each in SECONDS.items() if each >= turns.LONG}


def test_each_long_test_has_its_turn_and_others_run_always():
  runs = collections.Counter()
  for turn in range(turns.NUM_SHARES):
    waiting = turns.waiting(SECONDS, f'abc{turn:x}')
    assert waiting <= LONG
    runs.update(SECONDS.keys() - waiting)
  assert len(LONG) > 100
  for name in SECONDS:
    assert runs[name] == (1 if name in LONG else turns.NUM_SHARES), name


def test_a_commit_always_runs_the_same():
  names = list(SECONDS)
  random.Random(0).shuffle(names)
  other = {name: SECONDS[name] for name in names}
  assert turns.waiting(other, 'c0ffee') == turns.waiting(SECONDS, 'c0ffee')


def test_shares_take_about_as_long():
  shares = turns.deal(SECONDS, 4)
  sums = [
    sum(SECONDS[name] for name, share in shares.items() if share == i)
    for i in range(4)
  ]
  assert max(sums) - min(sums) <= max(SECONDS.values())


def test_what_is_left_does_not_depend_on_the_order_of_a_set():
  files = {'file.py': 1000.0, 'other.py': 1.0}
  seconds = {name: each + 0.1 for name, each in SECONDS.items()}
  names = list(seconds)
  expected = turns.left(files, seconds, names)
  assert expected['other.py'] == 1.0
  assert expected['file.py'] == pytest.approx(1000 - sum(seconds.values()))
  for seed in range(5):
    random.Random(seed).shuffle(names)
    assert turns.left(files, seconds, names) == expected


def test_what_is_no_commit():
  with pytest.raises(ValueError, match='--turn=main is no hash of a commit'):
    turns.waiting(SECONDS, 'main')

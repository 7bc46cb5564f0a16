"""Spaces and case of what was written."""

import pytest

from t2x.inference import detokenize


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    (
      "hello , world ! ( yes ) it 's 3 @.@ 5 % .",
      "hello, world! (yes) it's 3.5%.",
    ),
    ('he said " no way " and left .', 'he said "no way" and left.'),
    ('costs $ 5 and 3 - 4 , well @-@ known', 'costs $5 and 3 - 4, well-known'),
    ("don 't , ca n't , they 've", "don't, can't, they've"),
    ('a [ 1 ] b\n  next { x } ;', 'a [1] b\n  next {x};'),
    ('1 @,@ 000 people', '1,000 people'),
    ('nothing to do here.', 'nothing to do here.'),
  ],
)
def test_detokenize(text, expected):
  assert detokenize.detokenize(text) == expected
  assert detokenize.detokenize(expected) == expected


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('i am here. so are you? yes! "ok."', 'I am here. So are you? Yes! "Ok."'),
    ("well, i'm not. 3.5 is it", "Well, I'm not. 3.5 is it"),
    ('NASA said. eins\nzwei', 'NASA said. Eins\nZwei'),
    ('', ''),
  ],
)
def test_sentence_case(text, expected):
  assert detokenize.sentence_case(text) == expected


def test_steps_follow_each_other():
  steps = ['strip', 'lower', 'sentence_case']
  assert detokenize.apply(steps, '  Some TEXT. MORE ') == 'Some text. More'
  with pytest.raises(ValueError, match="no step 'upper'"):
    detokenize.apply(['upper'], 'a')

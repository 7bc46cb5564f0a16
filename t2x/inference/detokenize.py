"""Cleans generated texts for display: spaces around punctuation, and case.

Models write as their training texts are written: in some of these, spaces
separate words from punctuation, or all letters are lower case (WikiText, the
output of Moses' tokenizer, uncased WordPiece).

>>> apply(['detokenize', 'sentence_case'], 'i do n\\'t know , he said . so ?')
"I don't know, he said. So?"
"""

from collections.abc import Callable
from collections.abc import Sequence
import re

# Replacements, applied in this order: after the detokenizer of Moses (Koehn et
# al., 2007), and for WikiText's marks within words.
_RULES = (
  (r' ?@([-,.])@ ?', r'\1'),
  (r" n ?['’] ?t\b", "n't"),
  (r" ?(['’]) ?(s|m|d|t|re|ve|ll)\b", r'\1\2'),
  (r'\s+([.,;:!?%)\]}…]+)', r'\1'),
  (r'([(\[{$£€#])\s+', r'\1'),
)
_QUOTES = re.compile(r'(["“”])\s*([^"“”]*?)\s*(["“”])')


def detokenize(text: str) -> str:
  """Removes spaces between punctuation marks and the words they belong to.

  The rules are those of English. Line breaks are kept.
  """
  return '\n'.join(_line(line) for line in text.split('\n'))


def _line(line: str) -> str:
  for pattern, replacement in _RULES:
    line = re.sub(pattern, replacement, line)
  line = _QUOTES.sub(r'\1\2\3', line)
  return re.sub(r'(?<=\S) {2,}', ' ', line)


def sentence_case(text: str) -> str:
  """Capitalises the first letter of each sentence, and the word "i".

  Other letters are kept.
  """
  first = re.compile(r'(^|[.!?]["”)]?\s+|\n\s*)(["“(]?)(\w)')
  text = first.sub(lambda m: m[1] + m[2] + m[3].upper(), text)
  return re.sub(r"\bi(?=[ ,.;:!?'’]|$)", 'I', text)


STEPS: dict[str, Callable[[str], str]] = {
  'detokenize': detokenize,
  'lower': str.lower,
  'sentence_case': sentence_case,
  'strip': str.strip,
}


def apply(names: Sequence[str], text: str) -> str:
  """Returns a text after the named steps, in their order.

  Args:
    names: names of steps, of `STEPS`.
    text: text to change.

  Raises:
    ValueError: there is no step of a name.
  """
  for name in names:
    if name not in STEPS:
      raise ValueError(f'There is no step {name!r}; it is of {list(STEPS)}.')
    text = STEPS[name](text)
  return text

"""From what a model wrote to what is shown: spaces and case.

Models of texts whose words and marks stand apart (WikiText, the output of
Moses' tokenizer, uncased WordPiece) write in that form.

>>> apply(['detokenize', 'sentence_case'], 'i do n\\'t know , he said . so ?')
"I don't know, he said. So?"
"""

from collections.abc import Callable
from collections.abc import Sequence
import re

# In this order; Koehn et al., 2007 (Moses), and WikiText's marks within words.
_RULES = (
  (r' ?@([-,.])@ ?', r'\1'),
  (r" n ?['’] ?t\b", "n't"),
  (r" ?(['’]) ?(s|m|d|t|re|ve|ll)\b", r'\1\2'),
  (r'\s+([.,;:!?%)\]}…]+)', r'\1'),
  (r'([(\[{$£€#])\s+', r'\1'),
)
_QUOTES = re.compile(r'(["“”])\s*([^"“”]*?)\s*(["“”])')


def detokenize(text: str) -> str:
  """Returns a text whose marks join the words that they belong to.

  Of English and its like; lines stay lines.
  """
  return '\n'.join(_line(line) for line in text.split('\n'))


def _line(line: str) -> str:
  for pattern, replacement in _RULES:
    line = re.sub(pattern, replacement, line)
  line = _QUOTES.sub(r'\1\2\3', line)
  return re.sub(r'(?<=\S) {2,}', ' ', line)


def sentence_case(text: str) -> str:
  """Returns a text with a capital at each sentence's start, and I for i.

  Letters that are capitals stay so.
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
  """Returns a text after some of `STEPS`, in their order.

  Raises:
    ValueError: there is no such step.
  """
  for name in names:
    if name not in STEPS:
      raise ValueError(f'There is no step {name!r}; it is of {list(STEPS)}.')
    text = STEPS[name](text)
  return text

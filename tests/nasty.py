"""Texts that tokenizers trip over, drawn at random."""

import random

import hf_files

# Names of special tokens, and what nearly is one.
NAMES = (
  '<s>', '</s>', '<pad>', '<unk>', '<mask>', '<extra_id_0>', '<extra_id_3>',
  '<extra_id_99>', '[CLS]', '[SEP]', '[MASK]', '[PAD]', '[UNK]',
  '<|endoftext|>',
  '<extra_id_007>', '<extra_id_>', '<extra_id_\u0663>', '<s', '/s>', '<<s>>',
  '<0x41>', '<0xE2>', '##', '##s', '<S>', '< s >', 'special_3',
)  # fmt: skip
BLANKS = (
  ' ', '  ', ' ' * 3, ' ' * 7, ' ' * 40, '\t', '\n', '\r\n', '\r', '\n\n\n',
  '\v', '\f', '\x85', '\xa0', '\u2003', '\u2028', '\u3000', '\u200b', '\ufeff',
)  # fmt: skip
ODD = (
  '\u2581', '\u2581\u2581', '\u2581the', '\u0120the', '\u010a', '\x00', '\x01',
  '\x1b[0m', '\x7f', '\x80', '\x9f', '\ufffd', '\uffff', '\ue000', 'e\u0301',
  '\u0301', '\u0915\u094d\u0937', '\u200d', '\ufe0f', '\U0001f642',
  '\U0001f468\u200d\U0001f469', '\U0001f1e6', '\u6f22\u5b57', '\ufb01',
  '\u0130', '\u1e9e', '\u00df', '\u212b', '\u05d0', '\u0627\u0644',
  '\u0e01\u0e33', '\U0010ffff', 'a' * 9, 'aba' * 5,
  '-' * 13, '=' * 30, '.' * 5, '#' * 4, '->',
)  # fmt: skip
_WORDS = sorted({word for text in hf_files.TEXTS for word in text.split(' ')})


def texts(num, seed=0):
  """Returns `num` texts, and first each of the parts by itself."""
  draw = random.Random(seed)
  found = ['', *NAMES, *BLANKS, *ODD]
  while len(found) < num:
    parts = []
    for _ in range(draw.randint(1, 9)):
      kind = draw.choice((NAMES, BLANKS, ODD, _WORDS, _WORDS, 'letters'))
      if kind == 'letters':
        kind = [
          chr(draw.choice((draw.randrange(1, 256), draw.randrange(1, 0xD800))))
        ]
      parts.append(draw.choice(kind) * draw.choice((1, 1, 1, 2, 5)))
    found.append(draw.choice(('', ' ')).join(parts))
  return found[:num]

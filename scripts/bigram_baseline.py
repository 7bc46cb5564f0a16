r"""Bits per byte of an add-0.1 bigram model of a run's own tokens.

python scripts/bigram_baseline.py --workdir=RUN [--split=validation] [--json]

Counts pairs of neighbouring tokens in the training split, adds 0.1 to every
count of a pair, and scores the held-out split: each token that a packed causal
model predicts, so all but the first of a document. The figure to beat for
`eval/NAME/bits_per_byte`.
"""

import argparse
import json

import numpy as np

from t2x import files
from t2x.data import corpus as corpus_lib
from t2x.data import tokenizer_loading
from t2x.trainer import workdir

ADDED = 0.1


def main() -> None:
  parser = argparse.ArgumentParser(description='A bigram model to beat')
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--split', default='validation')
  parser.add_argument('--json', action='store_true')
  args = parser.parse_args()
  data = workdir.read_config(args.workdir).data
  tokenizer = tokenizer_loading.load(files.path(args.workdir) / 'tokenizer')
  corpus = corpus_lib.prepare(data, tokenizer)
  bits = bigram_bits(
    stream(corpus, data.train_split),
    stream(corpus, args.split),
    tokenizer.vocab_size,
    tokenizer.bos_id,
  )
  value = bits / corpus.num_bytes(args.split)
  if args.json:
    print(json.dumps({'bits_per_byte': value}))
  else:
    print(f'add-{ADDED} bigram on {args.split}: {value:.4f} bits per byte')


def stream(corpus: corpus_lib.Corpus, split: str) -> np.ndarray:
  """Returns all tokens of a split in order, documents framed by BOS and EOS."""
  (tokens,) = corpus.streams(split)
  return np.asarray(tokens.tokens, np.int64)


def bigram_bits(
  train: np.ndarray, held_out: np.ndarray, vocab_size: int, bos_id: int
) -> float:
  """Returns the bits of all tokens of `held_out` but the BOS ones."""
  pairs = train[:-1] * vocab_size + train[1:]
  pairs, counts = np.unique(pairs, return_counts=True)
  before = np.bincount(train[:-1], minlength=vocab_size)
  wanted = held_out[:-1] * vocab_size + held_out[1:]
  wanted = wanted[held_out[1:] != bos_id]
  place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
  count = np.where(pairs[place] == wanted, counts[place], 0)
  total = before[wanted // vocab_size] + ADDED * vocab_size
  return float(-np.log2((count + ADDED) / total).sum())


if __name__ == '__main__':
  main()

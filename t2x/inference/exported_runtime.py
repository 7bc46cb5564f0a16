r"""Text from the programs of this directory; needs jax, numpy, flatbuffers.

python run.py --prompt='The function' --num_tokens=32 [--temperature=0.8]
    [--top_k=50] [--top_p=0.95] [--seed=0]
python run.py --ids=5,17,301

With the package tokenizers prompts may be text, without it token ids. From
Python: `Artefact(DIRECTORY).write([[5, 17, 301]], num_tokens=32)`.
"""

import argparse
import itertools
import json
import os
import sys

import jax
import jax.export
import numpy as np


class Artefact:
  """The programs of a model, with its weights."""

  def __init__(self, directory):
    """Reads them; compiled at the first call."""
    path = lambda name: os.path.join(directory, name)
    with open(path('artefact.json')) as file:
      self.manifest = json.load(file)
    with open(path('weights.json')) as file:
      index = json.load(file)
    self.weights = [
      jax.numpy.asarray(
        np.memmap(
          path('weights.bin'),
          dtype=jax.numpy.dtype(one['dtype']),
          mode='r',
          offset=one['offset'],
          shape=tuple(one['shape']),
        )
      )
      for one in index
    ]
    self._call = {}
    for name in ('read', 'write'):
      with open(path(f'{name}.jax'), 'rb') as file:
        exported = jax.export.deserialize(bytearray(file.read()))
      self._call[name] = jax.jit(exported.call)

  def write(
    self,
    prompts,
    num_tokens,
    temperature=1.0,
    top_k=None,
    top_p=1.0,
    seed=0,
    ignore_end=False,
  ):
    """Returns new token ids of each prompt, and their log-probabilities.

    Args:
      prompts: token ids of each.
      num_tokens: the most new ones.
      temperature: 0 takes the likeliest token.
      top_k: only so many of the likeliest are drawn from; None is all.
      top_p: only so much of the probability is drawn from.
      seed: of what is drawn.
      ignore_end: go on past the end token.

    Raises:
      ValueError: too many prompts, an empty or too long one, ids outside the
        vocabulary, a setting out of range.
    """
    info = self.manifest
    rows, num_read = info['rows'], info['num_read']
    answers = info['answers']
    for name, value, is_right in (
      ('temperature', temperature, 0 <= temperature < float('inf')),
      ('top_k', top_k, top_k is None or top_k >= 1),
      ('top_p', top_p, 0 < top_p <= 1),
    ):
      if not is_right:
        raise ValueError(f'{name}={value} is out of range.')
    if not 1 <= len(prompts) <= rows:
      raise ValueError(f'{len(prompts)} prompts; it takes 1 to {rows}.')
    for number, prompt in enumerate(prompts):
      length = max(len(prompt), num_tokens)
      length = length if answers else len(prompt) + num_tokens
      if not len(prompt) or num_tokens < 1 or length > info['max_length']:
        raise ValueError(
          f'Prompt {number} has {len(prompt)} tokens and num_tokens is '
          f'{num_tokens}; both are 1 or more, and there are '
          f'{info["max_length"]} positions.'
        )
      if not 0 <= min(prompt) <= max(prompt) < info['vocab_size']:
        raise ValueError(
          f'Prompt {number} has a token that is not among the '
          f'{info["vocab_size"]} of the vocabulary.'
        )
    tokens = np.full((rows, num_read), info['pad_id'], np.int32)
    counts = np.ones(rows, np.int32)
    for row, prompt in enumerate(prompts):
      tokens[row, : len(prompt)], counts[row] = prompt, len(prompt)
    caches = self._call['read'](self.weights, tokens, counts)
    last = np.zeros(rows, np.int32) if answers else counts - 1
    token = np.full(rows, info['start'], np.int32)
    token = token if answers else tokens[np.arange(rows), last]
    ends = np.full((rows, info['num_ends']), -1, np.int32)
    if not ignore_end:
      known = info['ends'][: info['num_ends']]
      ends[:, : len(known)] = known
    of_rows = lambda value, dtype: np.full(rows, value, dtype)
    drawn = {
      'temperature_B': of_rows(temperature, np.float32),
      'top_k_B': of_rows(top_k or info['vocab_size'], np.int32),
      'top_p_B': of_rows(top_p, np.float32),
      'calibration_B': of_rows(info['calibration'], np.float32),
      'seed': np.uint32(seed % 2**32),
      'num_tokens': np.int32(num_tokens),
      'ends_BE': ends,
    }
    is_real = np.arange(rows) < len(prompts)
    found = self._call['write'](
      self.weights, caches, token, last, is_real, counts, drawn
    )
    new, log_probs, counts, _ = (np.asarray(a) for a in found)
    cut = lambda array: [
      array[row, : counts[row]].tolist() for row in range(len(prompts))
    ]
    return cut(new), cut(log_probs)


def read_tokenizer(file, info):
  """Returns the tokenizer of a file, which takes texts of any length."""
  import tokenizers

  tokenizer = tokenizers.Tokenizer.from_file(file)
  tokenizer.no_truncation()
  tokenizer.no_padding()
  tokenizer.encode_special_tokens = info['split']
  return tokenizer


def ids_of(tokenizer, info, text):
  """Returns the token ids of a prompt."""
  ids = tokenizer.encode(text, add_special_tokens=False).ids
  return [*info['before'], *ids, *info['after']]


def text_of(tokenizer, info, prompt, ids):
  """Returns the text of what was written after a prompt, or as its answer."""
  if info['answers']:
    names = {i: f'<extra_id_{n}>' for n, i in enumerate(info['sentinels'])}
    parts = itertools.groupby(ids, lambda i: i in names)
    return ''.join(
      ''.join(names[i] for i in run) if is_name else tokenizer.decode([*run])
      for is_name, run in parts
    )
  # By itself a text may lack its first space; as t2x's `text_stream.after`.
  before, text = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
  return text[len(os.path.commonprefix([before, text])) :]


def main():
  parser = argparse.ArgumentParser(description='text from an artefact')
  parser.add_argument('--prompt', action='append', default=[])
  parser.add_argument('--ids', action='append', default=[])
  parser.add_argument('--num_tokens', type=int, default=32)
  parser.add_argument('--temperature', type=float, default=1.0)
  parser.add_argument('--top_k', type=int)
  parser.add_argument('--top_p', type=float, default=1.0)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  directory = os.path.dirname(os.path.abspath(__file__))
  artefact = Artefact(directory)
  info = artefact.manifest
  try:
    prompts = [[int(i) for i in ids.split(',')] for ids in args.ids]
  except ValueError:
    sys.exit('error: --ids are numbers with commas between, as in 5,17,301.')
  tokenizer = None
  if args.prompt:
    file = os.path.join(directory, 'tokenizer.json')
    if not os.path.exists(file):
      sys.exit('error: this artefact has no tokenizer.json; give --ids=5,17.')
    try:
      tokenizer = read_tokenizer(file, info)
    except ImportError:
      sys.exit('error: text needs the package tokenizers; or give --ids=5,17.')
    prompts += [ids_of(tokenizer, info, text) for text in args.prompt]
  try:
    found, _ = artefact.write(
      prompts,
      args.num_tokens,
      temperature=args.temperature,
      top_k=args.top_k,
      top_p=args.top_p,
      seed=args.seed,
    )
  except ValueError as error:
    sys.exit(f'error: {error}')
  for prompt, ids in zip(prompts, found):
    if tokenizer is None:
      print(','.join(map(str, ids)))
      continue
    text = text_of(tokenizer, info, prompt, ids)
    print(f'--- {tokenizer.decode(prompt)}\n{text}\n')


if __name__ == '__main__':
  main()

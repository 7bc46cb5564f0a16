r"""Generates text with an exported model; needs jax, numpy and flatbuffers.

python run.py --prompt='The function' --num_tokens=32 [--temperature=0.8]
    [--top_k=50] [--top_p=0.95] [--seed=0]
python run.py --ids=5,17,301

This file is run.py in the directory that `t2x.inference.export` writes, and
imports nothing of t2x. With the package tokenizers prompts may be text, without
it they are token ids. From Python:
`Artefact(DIRECTORY).write([[5, 17, 301]], num_tokens=32)`.
"""

import argparse
from collections.abc import Mapping
from collections.abc import Sequence
import itertools
import json
import os
import sys
from typing import Any

import jax
import jax.export
import numpy as np


class Artefact:
  """The exported programs of a model, with its weights.

  Attributes:
    manifest: contents of artefact.json.
    weights: arguments of the programs, in their order.
  """

  def __init__(self, directory: str):
    """Loads an artefact; its programs are compiled at their first call.

    Args:
      directory: path of the artefact.
    """
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
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    ignore_end: bool = False,
  ) -> tuple[list[list[int]], list[list[float]]]:
    """Returns new token ids for each prompt, and their log-probabilities.

    Args:
      prompts: token ids of each prompt.
      num_tokens: greatest number of new tokens of a prompt.
      temperature: divisor of the logits; 0 takes the likeliest token.
      top_k: number of likeliest tokens to sample from; None for all.
      top_p: probability of the smallest set of likeliest tokens to sample from.
      seed: seed of the sampling.
      ignore_end: whether a text goes on past its end token.

    Raises:
      ValueError: there are too many prompts, a prompt is empty or too long or
        has ids outside the vocabulary, or a setting is out of range.
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
    outputs = self._call['write'](
      self.weights, caches, token, last, is_real, counts, drawn
    )
    new, log_probs, counts, _ = (np.asarray(a) for a in outputs)
    cut = lambda array: [
      array[row, : counts[row]].tolist() for row in range(len(prompts))
    ]
    return cut(new), cut(log_probs)


def read_tokenizer(file: str, info: Mapping[str, Any]) -> Any:
  """Returns the tokenizer of a file, without truncation and padding.

  Args:
    file: path of a tokenizer.json.
    info: manifest of the artefact.

  Returns:
    A `tokenizers.Tokenizer`.

  Raises:
    ImportError: the package tokenizers is not installed.
  """
  import tokenizers

  tokenizer = tokenizers.Tokenizer.from_file(file)
  tokenizer.no_truncation()
  tokenizer.no_padding()
  tokenizer.encode_special_tokens = info['split']
  return tokenizer


def ids_of(tokenizer: Any, info: Mapping[str, Any], text: str) -> list[int]:
  """Returns the token ids of a prompt, special tokens around it included."""
  ids = tokenizer.encode(text, add_special_tokens=False).ids
  return [*info['before'], *ids, *info['after']]


def text_of(
  tokenizer: Any,
  info: Mapping[str, Any],
  prompt: Sequence[int],
  ids: Sequence[int],
) -> str:
  """Returns the text of generated tokens.

  Args:
    tokenizer: tokenizer from `read_tokenizer`.
    info: manifest of the artefact.
    prompt: token ids of the prompt.
    ids: token ids that were generated after it.
  """
  if info['answers']:
    names = {i: f'<extra_id_{n}>' for n, i in enumerate(info['sentinels'])}
    parts = itertools.groupby(ids, lambda i: i in names)
    return ''.join(
      ''.join(names[i] for i in run) if is_name else tokenizer.decode([*run])
      for is_name, run in parts
    )
  # Decoded alone, a text may lack its first space: see t2x's
  # `text_stream.continuation`.
  before, text = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
  return text[len(os.path.commonprefix([before, text])) :]


def main() -> None:
  """Runs the command line."""
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
    answers, _ = artefact.write(
      prompts,
      args.num_tokens,
      temperature=args.temperature,
      top_k=args.top_k,
      top_p=args.top_p,
      seed=args.seed,
    )
  except ValueError as error:
    sys.exit(f'error: {error}')
  for prompt, ids in zip(prompts, answers):
    if tokenizer is None:
      print(','.join(map(str, ids)))
      continue
    text = text_of(tokenizer, info, prompt, ids)
    print(f'--- {tokenizer.decode(prompt)}\n{text}\n')


if __name__ == '__main__':
  main()

"""Prompts as padded arrays of few shapes, checked before any compilation.

Shape suffixes: B batch (padded), S capacity.
"""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

# Smaller shapes save little time, and each costs a compilation.
_MIN_CHUNKS = 4
_MIN_ROWS = 4
_CACHE_DTYPES = ('float32', 'bfloat16', 'int8')


def check_settings(
  counts: Mapping[str, int | None],
  *,
  vocab_size: int,
  ids: Mapping[str, int | None],
) -> None:
  """Raises ValueError for a setting out of range.

  Args:
    counts: numbers that must be at least 1, by name; None is not checked.
    vocab_size: upper bound of ids.
    ids: token ids by name; None is not checked.
  """
  for name, value in counts.items():
    if value is not None and value < 1:
      raise ValueError(f'{name}={value}; it must be 1 or more.')
  for name, value in ids.items():
    if value is not None and not 0 <= value < vocab_size:
      raise ValueError(
        f'{name}={value} is not in the vocabulary of {vocab_size} tokens: '
        f'give an id from 0 to {vocab_size - 1}.'
      )


def ends(eos_id: int | Sequence[int] | None) -> list[int]:
  """Returns a list of the tokens that end a sequence."""
  if eos_id is None:
    return []
  return list(eos_id) if isinstance(eos_id, Sequence) else [eos_id]


def to_rows(
  prompts: Sequence[Sequence[int]], vocab_size: int, start_id: int | None
) -> list[np.ndarray]:
  """Returns the prompts as int32 arrays; an empty one becomes `start_id`.

  Raises:
    ValueError: there are no prompts, a prompt is empty without `start_id` or no
      sequence of integers, or an id is outside the vocabulary.
  """
  if isinstance(prompts, str) or not len(prompts):
    raise ValueError(
      f'prompts={prompts!r}; give a list with at least one prompt, each a '
      'list of token ids.'
    )
  return [
    _to_row(number, prompt, vocab_size, start_id)
    for number, prompt in enumerate(prompts)
  ]


def _to_row(
  number: int, prompt: Sequence[int], vocab_size: int, start_id: int | None
) -> np.ndarray:
  row = np.asarray(prompt)
  if row.ndim == 1 and not row.size:
    if start_id is None:
      raise ValueError(
        f'Prompt {number} is empty, so there is nothing to go on from. Give '
        'it a token, or give start_id, the token that begins a text.'
      )
    return np.array([start_id], np.int32)
  if row.ndim != 1 or row.dtype.kind not in 'iu':
    raise ValueError(
      f'Prompt {number} is {str(prompt)[:40]!r}, not a sequence of token '
      'ids; encode text with the tokenizer that the model was trained with.'
    )
  wrong = row[(row < 0) | (row >= vocab_size)]
  if wrong.size:
    raise ValueError(
      f'Prompt {number} has the token id {wrong[0]}, and the vocabulary has '
      f'{vocab_size} tokens, 0 to {vocab_size - 1}. Encode it with the '
      'tokenizer that the model was trained with.'
    )
  return row.astype(np.int32)


def limit(*limits: int | None) -> int | None:
  """Returns the least of some limits; None is no limit."""
  return min((n for n in limits if n is not None), default=None)


def check_text(
  lengths: Sequence[int], num_tokens: int, limit: int | None, more: str
) -> None:
  """Raises ValueError if a prompt and its new tokens exceed the limit.

  Args:
    lengths: number of tokens of each prompt.
    num_tokens: number of new tokens.
    limit: the most tokens of a sequence; None is no limit.
    more: advice on how to raise the limit, for the message.
  """
  longest = max(lengths)
  if limit is None or longest + num_tokens <= limit:
    return
  number = list(lengths).index(longest)
  ways_out = []
  if longest < limit:
    ways_out.append(f'lower num_tokens to at most {limit - longest}')
  if num_tokens < limit:
    ways_out.append(f'cut the prompt to at most {limit - num_tokens} tokens')
  ways_out.append(more)
  raise ValueError(
    f'Prompt {number} has {longest} tokens; with num_tokens={num_tokens} new '
    f'ones that makes {longest + num_tokens}, and a sequence may hold '
    f'{limit}. Either {", or ".join(ways_out)}.'
  )


def check_answer(
  lengths: Sequence[int], num_tokens: int, limit: int | None, more: str
) -> None:
  """Raises ValueError if a source or its answer exceeds the limit.

  Args:
    lengths: number of tokens of each source.
    num_tokens: number of tokens of an answer.
    limit: the most tokens of a source and of an answer; None is no limit.
    more: advice on how to raise the limit, for the message.
  """
  if limit is None:
    return
  longest = max(lengths)
  if longest > limit:
    raise ValueError(
      f'Prompt {list(lengths).index(longest)} has {longest} tokens, and a '
      f'source may hold {limit}. Cut the prompt, or {more}.'
    )
  if num_tokens > limit:
    raise ValueError(
      f'num_tokens={num_tokens}, and an answer may hold {limit} tokens. '
      f'Lower num_tokens, or {more}.'
    )


def capacity(
  given: int | None, needed: int, limit: int | None, chunk: int
) -> int:
  """Returns the capacity of a cache, a multiple of `chunk`.

  Args:
    given: capacity that the caller sets; None takes a number of chunks that is
      a power of two.
    needed: number of positions that are needed.
    limit: the most positions of the model, which the result exceeds by less
      than a chunk; None is no limit.
    chunk: number of tokens in a chunk of prefill.

  Raises:
    ValueError: `given` is less than `needed`.
  """
  if given is not None:
    if given < needed:
      raise ValueError(
        f'capacity={given}, and the longest prompt with its new tokens needs '
        f'{needed}. Give at least {needed}, or none to let it be chosen.'
      )
    return _whole(given, chunk)
  size = max(power_of_two(-(-needed // chunk)), _MIN_CHUNKS) * chunk
  return size if limit is None else min(size, _whole(limit, chunk))


def num_rows(given: int | None, needed: int, parts: int) -> int:
  """Returns the number of rows of a padded batch, a multiple of `parts`.

  Args:
    given: number that the caller sets; None takes a power of two.
    needed: number of prompts.
    parts: number of shards of the rows on the mesh.

  Raises:
    ValueError: `given` is less than `needed`.
  """
  if given is not None and given < needed:
    raise ValueError(
      f'num_rows={given}, and there are {needed} prompts. Give at least '
      f'{needed}, or none to let it be chosen.'
    )
  return _whole(given or max(power_of_two(needed), _MIN_ROWS), parts)


def check_cache_dtype(given: str | None) -> None:
  """Raises ValueError if a cache cannot have this dtype."""
  if given not in (None, *_CACHE_DTYPES):
    raise ValueError(
      f'cache_dtype={given!r}; it is one of {", ".join(_CACHE_DTYPES)}, or '
      "none for the model's own."
    )


def pad(rows: Sequence[Any], shape: tuple[int, int], fill: int) -> np.ndarray:
  """Returns rows as one int32 array, padded on the right and at the end.

  Args:
    rows: ids of each row.
    shape: number of rows and length of a row.
    fill: id of padding.
  """
  result_BS = np.full(shape, fill, np.int32)
  for row, values in zip(result_BS, rows):
    row[: len(values)] = values
  return result_BS


def power_of_two(number: int) -> int:
  """Returns the least power of two that is at least `number`."""
  return 1 << (number - 1).bit_length()


def _whole(number: int, multiple: int) -> int:
  return -(-number // multiple) * multiple

"""Prompts as arrays of few different shapes, checked before anything compiles.

Shape suffixes: B batch (padded), S capacity.
"""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

# Smaller shapes save little and cost a compilation each.
_MIN_CHUNKS = 4
_MIN_ROWS = 4
_CACHE_DTYPES = ('float32', 'bfloat16', 'int8')


def check_settings(
  counts: Mapping[str, int | None], *, vocab_size: int, ids: Mapping[str, Any]
) -> None:
  """Raises ValueError for a setting out of range.

  Args:
    counts: name -> number, at least 1, or None.
    vocab_size: what ids must stay below.
    ids: name -> token id or None.
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
  """Returns the tokens that end a row."""
  if eos_id is None:
    return []
  return list(eos_id) if isinstance(eos_id, Sequence) else [eos_id]


def to_rows(
  prompts: Sequence[Sequence[int]], vocab_size: int, start_id: int | None
) -> list[np.ndarray]:
  """Returns the prompts as int32 arrays; an empty one becomes `start_id`.

  Raises:
    ValueError: no prompts, an empty one without `start_id`, something that is
      not a sequence of integers, or ids outside the vocabulary.
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


def _to_row(number, prompt, vocab_size, start_id) -> np.ndarray:
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
  """Returns the least of some limits, of which None is none."""
  return min((n for n in limits if n is not None), default=None)


def check_text(
  lengths: Sequence[int], num_tokens: int, limit: int | None, more: str
) -> None:
  """Raises ValueError if prompt and new tokens pass the limit of positions.

  `more` says how the limit is raised.
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
  """Raises ValueError if a source or its answer passes the limit."""
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
  """Returns the positions of a cache: whole chunks, and few different sizes.

  Args:
    given: what the caller asks for, or None for a power of two of chunks.
    needed: the least that will do.
    limit: positions that the model has; more are of no use.
    chunk: the result is a multiple of it.

  Raises:
    ValueError: less is given than is needed.
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
  """Returns the rows of a padded batch, a multiple of `parts`.

  Args:
    given: what the caller asks for, or None for a power of two.
    needed: the number of prompts.
    parts: how many parts a mesh splits the rows into.

  Raises:
    ValueError: fewer are given than there are prompts.
  """
  if given is not None and given < needed:
    raise ValueError(
      f'num_rows={given}, and there are {needed} prompts. Give at least '
      f'{needed}, or none to let it be chosen.'
    )
  return _whole(given or max(power_of_two(needed), _MIN_ROWS), parts)


def check_cache_dtype(given: str | None) -> None:
  """Raises ValueError if a cache cannot have it."""
  if given not in (None, *_CACHE_DTYPES):
    raise ValueError(
      f'cache_dtype={given!r}; it is one of {", ".join(_CACHE_DTYPES)}, or '
      "none for the model's own."
    )


def pad(rows: Sequence[Any], shape: tuple[int, int], fill: int) -> np.ndarray:
  """Returns the rows as one array, filled up on the right and below."""
  result_BS = np.full(shape, fill, np.int32)
  for row, values in zip(result_BS, rows):
    row[: len(values)] = values
  return result_BS


def power_of_two(number: int) -> int:
  """Returns the least power of two that is not below `number`."""
  return 1 << (number - 1).bit_length()


def _whole(number: int, multiple: int) -> int:
  return -(-number // multiple) * multiple

"""Checks of the arrays that an encoder takes besides its tokens."""

from collections.abc import Collection
from typing import Protocol

from t2x.layers import attention_kinds

_OF_ROWS = {'segments', 'positions'}
_ASKED = {'query_segments', 'query_positions', 'query_places'}
_PERMUTED = {*_OF_ROWS, 'ranks', *_ASKED, 'query_ranks'}
_LEFT = {*_OF_ROWS, 'places'}
_DROPPED = {*_LEFT, 'query_inputs', *_ASKED}
_OF_QUERIES = (_PERMUTED | _DROPPED) - _LEFT
_ALL = {*_PERMUTED, *_DROPPED, 'token_types', 'target_positions'}


class InputConfig(Protocol):
  """The fields of an `EncoderConfig` that decide which arrays it takes."""

  @property
  def kinds(self) -> tuple[attention_kinds.AttentionConfig, ...]:
    """Attention of each layer of its repeating group."""
    ...

  @property
  def num_token_types(self) -> int:
    """Number of token type embeddings."""
    ...

  @property
  def two_stream(self) -> bool:
    """Whether there is a query stream."""
    ...

  @property
  def query_layers(self) -> int:
    """Number of layers of the second stack."""
    ...


def check(config: InputConfig, given: Collection[str], asks: bool) -> None:
  """Raises a ValueError for arrays that would be ignored, or are missing.

  Args:
    config: settings of the encoder.
    given: names of the arrays besides the tokens.
    asks: whether the last tower runs, so that a model with queries needs their
      arrays.
  """
  names = set(given)
  if names - _ALL:
    raise ValueError(
      f'An encoder takes no {_list(names - _ALL)}; what it takes beside inputs '
      f'is {_list(_ALL)}.'
    )
  if config.two_stream and names & (_OF_QUERIES | {'places'}):
    _check_whole('model.two_stream=true', names, _PERMUTED)
  elif config.query_layers and asks:
    _check_whole(f'model.query_layers={config.query_layers}', names, _DROPPED)
  elif names & _OF_QUERIES:
    raise ValueError(
      f'{_list(names & _OF_QUERIES)}: here no second stream or stack of layers '
      'reads them (model.two_stream, model.query_layers). Leave them out.'
    )
  elif 'places' in names and not names >= _LEFT:
    raise ValueError(
      f'places without {_list(_LEFT - names)}: rows of which tokens are '
      'missing need all three.'
    )
  if 'token_types' in names and not tells_types(config):
    raise ValueError(
      'token_types, and model.num_token_types=0: the model has no vectors of '
      'sentences. Leave them out, or build it with 2.'
    )


def _check_whole(owner: str, given: set[str], needed: set[str]) -> None:
  """Raises a ValueError unless exactly the needed arrays are given.

  Args:
    owner: setting that needs them, for the message.
    given: names of the given arrays.
    needed: names of the arrays of a second stream or stack.
  """
  parts = {'missing': needed - given, 'not read': given - needed}
  if any(parts.values()):
    wrong = [f'{_list(names)} {what}' for what, names in parts.items() if names]
    raise ValueError(
      f'{owner}: {" and ".join(wrong)}. Give {_list(needed)}, and no other.'
    )


def _list(names: Collection[str]) -> str:
  return ', '.join(sorted(names))


def tells_types(config: InputConfig) -> bool:
  """Returns whether a model distinguishes sentences A and B of a row."""
  by_kind = (kind.num_token_types for kind in config.kinds)
  return bool(config.num_token_types) or any(by_kind)

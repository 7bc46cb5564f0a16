"""What an encoder can be given beside its tokens, and what goes together."""

from collections.abc import Collection
from typing import Any

_OF_ROWS = {'segments', 'positions'}
_ASKED = {'query_segments', 'query_positions', 'query_places'}
_PERMUTED = {*_OF_ROWS, 'ranks', *_ASKED, 'query_ranks'}
_LEFT = {*_OF_ROWS, 'places'}
_DROPPED = {*_LEFT, 'query_inputs', *_ASKED}
_OF_QUERIES = (_PERMUTED | _DROPPED) - _LEFT
_ALL = {*_PERMUTED, *_DROPPED, 'token_types', 'target_positions'}


def check(config: Any, given: Collection[str], asks: bool) -> None:
  """Raises ValueError for arrays that would be ignored, or are missing.

  Args:
    config: an `EncoderConfig`.
    given: names of the arrays beside the tokens.
    asks: features are wanted, of the queries where a model has them.
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
  """The arrays of a second stream or stack come together, and alone."""
  parts = {'missing': needed - given, 'not read': given - needed}
  if any(parts.values()):
    wrong = [f'{_list(names)} {what}' for what, names in parts.items() if names]
    raise ValueError(
      f'{owner}: {" and ".join(wrong)}. Give {_list(needed)}, and no other.'
    )


def _list(names: Collection[str]) -> str:
  return ', '.join(sorted(names))


def tells_types(config: Any) -> bool:
  """Whether sentences A and B of a row look different to a model."""
  by_kind = (kind.num_token_types for kind in config.kinds)
  return bool(config.num_token_types) or any(by_kind)

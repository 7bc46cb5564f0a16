"""The arrays of a batch: their names, and what each holds.

A batch is a dict of arrays (B, length); `Objective.lengths` says how long each
is. Further heads add targets and weights under their own name, such as
`ahead2_targets` and `ahead2_weights`; see `of`.

Shape suffixes: B rows, T tokens of a row, S tokens of an encoder's row, M
positions that are asked for.
"""

from collections.abc import Mapping
from typing import Any
from typing import Literal
from typing import NamedTuple

import numpy as np

TASKS = 'tasks'
CONTINUES = 'continues'
RANKS = 'ranks'
QUERY_SEGMENTS = 'query_segments'

# Whose tokens an array speaks of: those of an encoder-decoder's encoder
# (`source`), those of the row that is predicted, or of an encoder alone
# (`row`), those that a second set of queries asks for (`query`), or of the row
# as a whole (`example`).
Side = Literal['source', 'row', 'query', 'example']
Role = Literal[
  'ids',
  'targets',
  'weights',
  'segments',
  'positions',
  'places',
  'types',
  'order',
  'number',
]


class Key(NamedTuple):
  """One array of a batch.

  Attributes:
    name: the key in the dict.
    side: the tokens that it speaks of.
    role: the kind of its values.
    meaning: a sentence on what it holds.
  """

  name: str
  side: Side
  role: Role
  meaning: str

  @property
  def dtype(self) -> np.dtype:
    """The dtype of the array: float32 for weights, else int32."""
    return np.dtype(np.float32 if self.role == 'weights' else np.int32)


KEYS = (
  Key('inputs', 'row', 'ids', 'Token ids that the model reads, (B, T).'),
  Key('targets', 'row', 'targets', 'Token ids to predict, (B, T) or (B, M).'),
  Key('weights', 'row', 'weights', 'Weight of each target; 0 is not counted.'),
  Key(
    'segments',
    'row',
    'segments',
    'Number of the document that a token is of, from 1; 0 is padding.',
  ),
  Key('positions', 'row', 'positions', 'Position in the document, from 0.'),
  Key('encoder_inputs', 'source', 'ids', 'Token ids of the encoder, (B, S).'),
  Key('encoder_segments', 'source', 'segments', 'As `segments`, (B, S).'),
  Key('encoder_positions', 'source', 'positions', 'As `positions`, (B, S).'),
  Key(
    'prefix_ends',
    'row',
    'places',
    "Place in the row where the prefix of a token's document ends.",
  ),
  Key(
    'target_positions',
    'row',
    'places',
    'Places in the row of the targets, (B, M), where few are predicted.',
  ),
  Key('token_types', 'row', 'types', 'Which of two sentences a token is of.'),
  Key(
    'places',
    'row',
    'places',
    'Places in the whole row, where tokens were dropped from it.',
  ),
  Key('originals', 'row', 'ids', 'Ids before masking, for masks by loss.'),
  Key('noised', 'row', 'ids', 'Ids that stand in where a token is masked.'),
  Key('maskable', 'row', 'types', '1 where a token may be masked.'),
  Key('mask_keys', 'example', 'number', 'Key of the masks of a row, (B, 1).'),
  Key(
    RANKS,
    'row',
    'order',
    'Order in which tokens are predicted; a token sees lower ranks.',
  ),
  Key('query_inputs', 'query', 'ids', 'Ids in the asked places, (B, M).'),
  Key(QUERY_SEGMENTS, 'query', 'segments', 'As `segments`, (B, M).'),
  Key('query_positions', 'query', 'positions', 'As `positions`, (B, M).'),
  Key('query_places', 'query', 'places', 'Places in the row, (B, M).'),
  Key('query_ranks', 'query', 'order', 'As `ranks`, (B, M).'),
  Key(TASKS, 'example', 'number', 'Number of the task of a row, (B, 1).'),
  Key(
    CONTINUES,
    'example',
    'number',
    '1 where a row goes on with the row of the batch before, (B, 1).',
  ),
)
_BY_NAME = {key.name: key for key in KEYS}


def of(name: str) -> Key:
  """Returns the key of a name, that of a further head included.

  Raises:
    ValueError: no batch has an array of that name.
  """
  if name in _BY_NAME:
    return _BY_NAME[name]
  head, _, role = name.rpartition('_')
  if head and role == 'targets':
    return Key(name, 'row', role, f'Targets of the head {head}.')
  if head and role == 'weights':
    return Key(name, 'row', role, f'Weights of the targets of {head}.')
  raise ValueError(
    f'{name!r} is no array of a batch. Name one of '
    f'{", ".join(_BY_NAME)}, or HEAD_targets and HEAD_weights of a further '
    'head; a new one gets a line in t2x/objectives/batch_keys.py.'
  )


def is_source(name: str) -> bool:
  """Returns whether an array is of the encoder of an encoder-decoder."""
  return of(name).side == 'source'


def num_tokens(batch: Mapping[str, Any]) -> int:
  """Returns how many tokens a batch holds, on both sides; padding is none.

  Args:
    batch: arrays by name.
  """
  # The tokens of a second stream are those of the first once more; queries
  # for dropped tokens are not.
  again = {QUERY_SEGMENTS} if RANKS in batch else set()
  return sum(
    int(np.count_nonzero(array))
    for name, array in batch.items()
    if of(name).role == 'segments' and name not in again
  )

"""Rows of tokens with their segments, and arrays derived from them.

Shape suffixes: B rows, T tokens of a row.
"""

from typing import NamedTuple

import numpy as np

from t2x.objectives import segments as segments_lib
from t2x.objectives import vocab as vocab_lib


class Rows(NamedTuple):
  """Raw tokens, before an objective turns them into a batch.

  Attributes:
    tokens: (B, T) int32 ids, `PAD` where there is no token.
    segments: (B, T) int32, 0 where there is no token; the documents of a row
      are numbered from 1, and each is contiguous.
  """

  tokens: np.ndarray
  segments: np.ndarray


def lengths(length: int) -> dict[str, int]:
  """Returns the row length of each array of a batch, all of them `length`."""
  names = 'inputs', 'targets', 'weights', 'segments', 'positions'
  return dict.fromkeys(names, length)


def encoder_decoder_lengths(length: int, target_length: int) -> dict[str, int]:
  """Returns the row length of each array of an `encoder_decoder` batch.

  Args:
    length: row length of the encoder.
    target_length: row length of the decoder.
  """
  names = 'encoder_inputs', 'encoder_segments', 'encoder_positions'
  return lengths(target_length) | dict.fromkeys(names, length)


def positions(segments_BT: np.ndarray) -> np.ndarray:
  """Returns positions that restart at 0 in each segment, (B, T) int32.

  >>> positions(np.array([[1, 1, 2, 2, 2, 0]]))
  array([[0, 1, 0, 1, 2, 0]], dtype=int32)
  """
  T = segments_BT.shape[1]
  index_T = np.arange(T, dtype=np.int32)
  is_start_BT = segments_lib.starts(segments_BT)
  start_BT = np.maximum.accumulate(np.where(is_start_BT, index_T, 0), axis=1)
  return np.where(segments_BT != 0, index_T - start_BT, 0).astype(np.int32)


def shift_right(
  targets_BT: np.ndarray, positions_BT: np.ndarray, start: int = vocab_lib.PAD
) -> np.ndarray:
  """Returns decoder inputs: the target before each, or `start` at a start.

  T5 starts its decoder with the padding id (Raffel et al., 2020).

  Args:
    targets_BT: target ids.
    positions_BT: positions, 0 at the start of each segment.
    start: id of the input at the start of each segment.

  >>> shift_right(np.array([[7, 8, 9]]), np.array([[0, 1, 0]]))
  array([[0, 7, 0]], dtype=int32)
  """
  inputs_BT = np.full(targets_BT.shape, start, np.int32)
  inputs_BT[:, 1:] = targets_BT[:, :-1]
  return np.where(positions_BT == 0, start, inputs_BT).astype(np.int32)


def encoder_decoder(
  encoder: Rows, decoder: Rows, start: int = vocab_lib.PAD
) -> dict[str, np.ndarray]:
  """Returns the batch of an encoder-decoder; every target has weight 1.

  Args:
    encoder: rows of the sources.
    decoder: rows of the targets.
    start: id of the first decoder input of each segment.
  """
  positions_BT = positions(decoder.segments)
  return {
    'inputs': shift_right(decoder.tokens, positions_BT, start),
    'targets': decoder.tokens,
    'weights': (decoder.segments != 0).astype(np.float32),
    'segments': decoder.segments,
    'positions': positions_BT,
    'encoder_inputs': encoder.tokens,
    'encoder_segments': encoder.segments,
    'encoder_positions': positions(encoder.segments),
  }

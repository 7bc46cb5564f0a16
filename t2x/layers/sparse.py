"""Sparse kinds of softmax attention: gaps, blocks, global tokens.

Letters: T tokens of a sequence.
"""

import dataclasses
from typing import ClassVar

from t2x import field_checks
from t2x.attention import block_patterns
from t2x.attention import patterns
from t2x.layers import attention_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dilated(attention_config.Softmax):
  """A window with gaps: every `dilation`-th key, `window` of them.

  Longformer's dilated sliding window (Beltagy et al., 2020, section 3.1).
  """

  kind: ClassVar[str] = 'dilated'
  decoding: ClassVar[str | None] = 'keys and values of the window'
  window: int = 128
  dilation: int = 2

  def __post_init__(self):
    super().__post_init__()
    attention_config.check_window(self)
    field_checks.least(self, 'attention.', dilation=1)

  def pattern(self, length: int, *, causal: bool) -> patterns.Pattern:
    del length, causal
    return patterns.Window(self.reach) & patterns.Dilated(self.dilation)

  def check_length(self, length: int) -> None:
    attention_config.check_reach(self, self.reach, length)

  @property
  def reach(self) -> int:
    return _reach(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSparse(attention_config.Softmax):
  """Whole blocks of keys, by any matrix of blocks (Child et al., 2019; Gray et
  al., 2017).

  Attributes:
    sparse_block: tokens to a side of a block.
    rows: for each block of queries a string with 1 for each block of keys that
      it sees and 0 for each that it does not: `100,110,101`.
  """

  kind: ClassVar[str] = 'block_sparse'
  sparse_block: int = 64
  rows: tuple[str, ...] = ()

  def __post_init__(self):
    super().__post_init__()
    field_checks.least(self, 'attention.', sparse_block=1)
    lengths = {len(row) for row in self.rows}
    marks = {*''.join(self.rows)}
    if lengths - {len(self.rows)} or marks not in (set(), {'0', '1'}, {'1'}):
      raise ValueError(
        f'attention.rows={",".join(self.rows)} must be a square matrix of 0 '
        'and 1, not all 0, a row for each block of queries: 100,110,111.'
      )

  @property
  def limit(self) -> int:
    return self.sparse_block * len(self.rows)

  def pattern(self, length: int, *, causal: bool) -> patterns.Pattern:
    del length, causal
    return block_patterns.Blocks(self.sparse_block, self.rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(attention_config.Softmax):
  """Each block of queries sees its own and some others, drawn once.

  Attributes:
    sparse_block: tokens to a side of a block.
    num_random: blocks that are drawn for each block of queries; a decoder draws
      among those before.
    seed: of the draws.
  """

  kind: ClassVar[str] = 'random'
  sparse_block: int = 64
  num_random: int = 3
  seed: int = 0

  def __post_init__(self):
    super().__post_init__()
    field_checks.least(self, 'attention.', sparse_block=1, num_random=1)

  def pattern(self, length: int, *, causal: bool) -> patterns.Pattern:
    return _drawn(self, length, causal) | patterns.Region(self.sparse_block)

  def check_length(self, length: int) -> None:
    _check_drawn(self, length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BigBird(attention_config.Softmax):
  """A window, the row's first tokens as global ones, and random blocks.

  Zaheer et al., 2020, with global tokens of the row itself (BigBird-ITC).
  Global tokens see all and are seen by all; they are the first of the row, so
  rows should hold one document (`data.batching=pad`).

  Attributes:
    window: keys on each side, the query's own included.
    num_global: the first tokens of a row, which see all and all see.
    sparse_block: tokens to a side of a random block.
    num_random: random blocks of keys for each block of queries.
    seed: of the draws.
  """

  kind: ClassVar[str] = 'bigbird'
  window: int = 96
  num_global: int = 64
  sparse_block: int = 64
  num_random: int = 3
  seed: int = 0

  def __post_init__(self):
    super().__post_init__()
    attention_config.check_window(self)
    field_checks.least(
      self, 'attention.', num_global=0, sparse_block=1, num_random=0
    )

  def pattern(self, length: int, *, causal: bool) -> patterns.Pattern:
    pattern: patterns.Pattern = patterns.Window(self.window)
    if self.num_global:
      pattern |= patterns.Global(self.num_global)
    if self.num_random:
      pattern |= _drawn(self, length, causal)
    return pattern

  def check_length(self, length: int) -> None:
    attention_config.check_reach(self, self.window, length)
    _check_global(self, length)
    _check_drawn(self, length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Longformer(attention_config.Softmax):
  """A window, with gaps if asked, and the row's first tokens as global ones.

  Beltagy et al., 2020. Rows should hold one document (`data.batching=pad`).

  Attributes:
    window: keys on each side, the query's own included.
    dilation: every so many-th key of the window's reach.
    num_global: the first tokens of a row, which see all and all see.
    global_projections: global tokens have queries, keys and values by weights
      of their own, as the paper's (section 3.2); encoders alone.
  """

  kind: ClassVar[str] = 'longformer'
  window: int = 256
  dilation: int = 1
  num_global: int = 1
  global_projections: bool = False

  def __post_init__(self):
    super().__post_init__()
    attention_config.check_window(self)
    field_checks.least(self, 'attention.', num_global=0, dilation=1)
    if self.global_projections and (self.qk_norm or not self.num_global):
      raise ValueError(
        f'attention.num_global={self.num_global}, qk_norm={self.qk_norm} with '
        'attention.global_projections=true: its weights are for one global '
        'token or more, and have no norm. Set num_global=1 or more, and '
        'qk_norm=false.'
      )
    if self.global_projections and self.kv_heads != self.num_heads:
      raise ValueError(
        f'attention.num_kv_heads={self.num_kv_heads} with attention.'
        'global_projections=true: global tokens have a key head for each query '
        'head. Set num_kv_heads=none.'
      )

  def pattern(self, length: int, *, causal: bool) -> patterns.Pattern:
    del length, causal
    pattern: patterns.Pattern = patterns.Window(_reach(self))
    if self.dilation > 1:
      pattern &= patterns.Dilated(self.dilation)
    return pattern | patterns.Global(self.num_global)

  def check_length(self, length: int) -> None:
    attention_config.check_reach(self, _reach(self), length)
    _check_global(self, length)


def _reach(config) -> int:
  """Tokens back to the farthest key of a window with gaps."""
  return (config.window - 1) * config.dilation + 1


def _check_global(config, length: int) -> None:
  if config.num_global > length:
    raise ValueError(
      f'attention.num_global={config.num_global} tokens lie outside a sequence '
      f'of {length}. Lower it, or raise data.length.'
    )


def _drawn(config, length: int, causal: bool) -> patterns.Pattern:
  return block_patterns.RandomBlocks(
    config.sparse_block,
    num=config.num_random,
    num_blocks=-(-length // config.sparse_block),
    causal=causal,
    seed=config.seed,
  )


def _check_drawn(config, length: int) -> None:
  num_blocks = -(-length // config.sparse_block)
  if config.num_random > num_blocks:
    raise ValueError(
      f'attention.num_random={config.num_random} blocks cannot be drawn from '
      f'the {num_blocks} of attention.sparse_block={config.sparse_block} in a '
      f'sequence of {length}. Lower one of the two.'
    )

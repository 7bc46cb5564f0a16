"""Configs of sparse softmax attention: dilated, in blocks, with global tokens.

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
  """A sliding window with gaps (Longformer, Beltagy et al., 2020, section 3.1).

  Attributes:
    window: number of keys that a query sees, its own included.
    dilation: distance between neighbouring keys that a query sees.
  """

  kind: ClassVar[str] = 'dilated'
  decoding: ClassVar[str | None] = 'keys and values of the window'
  window: int = 128
  dilation: int = 2

  def __post_init__(self) -> None:
    super().__post_init__()
    attention_config.check_window(self)
    field_checks.least(self, 'attention.', dilation=1)

  def pattern(self, length: int, *, causal: bool) -> patterns.Pattern:
    del length, causal
    return patterns.Window(self.reach) & patterns.DilatedPattern(self.dilation)

  def check_length(self, length: int) -> None:
    attention_config.check_reach(self, self.reach, length)

  @property
  def reach(self) -> int:
    return _reach(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSparse(attention_config.Softmax):
  """Blocks of keys, given by a matrix of blocks.

  Child et al., 2019; Gray et al., 2017.

  Attributes:
    sparse_block: number of tokens along a side of a block.
    rows: one string for each block of queries, with a 1 for each block of keys
      that it sees and a 0 for each that it does not see: `100,110,101`.
  """

  kind: ClassVar[str] = 'block_sparse'
  sparse_block: int = 64
  rows: tuple[str, ...] = ()

  def __post_init__(self) -> None:
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
  """Each block of queries sees its own block and others, drawn once at random.

  Attributes:
    sparse_block: number of tokens along a side of a block.
    num_random: number of blocks drawn for each block of queries; a decoder
      draws among the blocks up to the query's own.
    seed: seed of the random draws.
  """

  kind: ClassVar[str] = 'random'
  sparse_block: int = 64
  num_random: int = 3
  seed: int = 0

  def __post_init__(self) -> None:
    super().__post_init__()
    field_checks.least(self, 'attention.', sparse_block=1, num_random=1)

  def pattern(self, length: int, *, causal: bool) -> patterns.Pattern:
    return _drawn(self, length, causal) | patterns.Region(self.sparse_block)

  def check_length(self, length: int) -> None:
    _check_drawn(self, length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BigBird(attention_config.Softmax):
  """A window, global tokens, and random blocks (Zaheer et al., 2020).

  Global tokens see all keys and all queries see them. They are the first tokens
  of the row (BigBird-ITC), so a row should be one document
  (`data.batching=pad`).

  Attributes:
    window: number of keys on each side, the query's own included.
    num_global: number of global tokens.
    sparse_block: number of tokens along a side of a random block.
    num_random: number of random blocks of keys for each block of queries.
    seed: seed of the random draws.
  """

  kind: ClassVar[str] = 'bigbird'
  window: int = 96
  num_global: int = 64
  sparse_block: int = 64
  num_random: int = 3
  seed: int = 0

  def __post_init__(self) -> None:
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
  """A window, optionally with gaps, and global tokens (Beltagy et al., 2020).

  Global tokens are the first of the row, so a row should be one document
  (`data.batching=pad`).

  Attributes:
    window: number of keys on each side, the query's own included.
    dilation: distance between neighbouring keys of the window.
    num_global: number of global tokens, which see all keys and which all
      queries see.
    global_projections: whether global tokens have projections of their own to
      queries, keys and values, as in section 3.2; for encoders only.
  """

  kind: ClassVar[str] = 'longformer'
  window: int = 256
  dilation: int = 1
  num_global: int = 1
  global_projections: bool = False

  def __post_init__(self) -> None:
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
      pattern &= patterns.DilatedPattern(self.dilation)
    return pattern | patterns.Global(self.num_global)

  def check_length(self, length: int) -> None:
    attention_config.check_reach(self, _reach(self), length)
    _check_global(self, length)


def _reach(config: Dilated | Longformer) -> int:
  """Returns the number of tokens from a query to its farthest key."""
  return (config.window - 1) * config.dilation + 1


def _check_global(config: BigBird | Longformer, length: int) -> None:
  if config.num_global > length:
    raise ValueError(
      f'attention.num_global={config.num_global} tokens lie outside a sequence '
      f'of {length}. Lower it, or raise data.length.'
    )


def _drawn(
  config: Random | BigBird, length: int, causal: bool
) -> patterns.Pattern:
  return block_patterns.RandomBlocks(
    config.sparse_block,
    num=config.num_random,
    num_blocks=-(-length // config.sparse_block),
    causal=causal,
    seed=config.seed,
  )


def _check_drawn(config: Random | BigBird, length: int) -> None:
  num_blocks = -(-length // config.sparse_block)
  if config.num_random > num_blocks:
    raise ValueError(
      f'attention.num_random={config.num_random} blocks cannot be drawn from '
      f'the {num_blocks} of attention.sparse_block={config.sparse_block} in a '
      f'sequence of {length}. Lower one of the two.'
    )

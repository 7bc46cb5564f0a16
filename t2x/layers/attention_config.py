"""Configs of softmax attention, which `attention_layer` runs.

Every kind of softmax attention computes softmax(q k^T) v over the keys that a
mask shows, and adds a pattern (t2x/attention/patterns.py) to the model's mask.
More of these kinds are in sparse.py. Kinds without scores are in linear.py,
low_rank.py, regional.py and convolution.py; attention_kinds.py lists all kinds.

Letters: N query heads, K key/value heads, H head dim, T tokens of a sequence.
"""

import dataclasses
from typing import ClassVar
from typing import Literal
from typing import Protocol

from t2x import field_checks
from t2x.attention import patterns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
  """Fields that every kind of attention has.

  Attributes:
    num_heads: number of query heads N.
    num_kv_heads: number of key/value heads K, a divisor of N; None means N. 1
      is multi-query attention (Shazeer, 2019), a number between is
      grouped-query attention (Ainslie et al., 2023).
    head_dim: number of entries H of each head.
    bias: whether queries, keys, values and output have biases.
    out_bias: whether the output has a bias; None follows `bias` (Qwen 2 has
      biases, but none on the output).
    qk_norm: whether each head's queries and keys have an RMSNorm (Dehghani et
      al., 2023).
    qk_norm_eps: epsilon of that norm, added to the mean square.
    rotary: whether queries and keys are rotated where the model's positions are
      rotary; false is a layer without positions (Kazemnejad et al., 2023).
    kind: name of the kind, for `model.attention`.
    not_causal: reason why a decoder cannot have this kind, or None.
    decoding: description of what a decoder keeps of earlier tokens to generate
      token by token; None if it cannot.
    mixes_rows: whether queries see other documents packed into their row.
  """

  num_heads: int = 8
  num_kv_heads: int | None = None
  head_dim: int = 64
  bias: bool = False
  out_bias: bool | None = None
  qk_norm: bool = False
  qk_norm_eps: float = 1e-6
  rotary: bool = True

  kind: ClassVar[str] = ''
  not_causal: ClassVar[str | None] = None
  decoding: ClassVar[str | None] = 'keys and values of all positions'
  mixes_rows: ClassVar[bool] = False
  # Fields of some kinds, as the others have them.
  dropout = 0.0
  global_projections = False
  num_token_types = 0

  def __post_init__(self) -> None:
    least = dict.fromkeys(('num_heads', 'num_kv_heads', 'head_dim'), 1)
    field_checks.least(self, 'attention.', **least)
    field_checks.positive(self, 'attention.', 'qk_norm_eps')
    if self.num_heads % self.kv_heads:
      raise ValueError(
        f'attention.num_heads={self.num_heads} must be a multiple of '
        f'attention.num_kv_heads={self.kv_heads}: each key/value head serves '
        'the same number of query heads.'
      )

  @property
  def kv_heads(self) -> int:
    """Number of key/value heads K."""
    return self.num_kv_heads or self.num_heads

  @property
  def has_out_bias(self) -> bool:
    """Whether the output has a bias."""
    return self.bias if self.out_bias is None else self.out_bias

  @property
  def limit(self) -> int | None:
    """Number of tokens in the longest possible sequence; None is any."""
    return None

  def check_limit(self, length: int) -> None:
    """Raises ValueError for a sequence longer than `limit`."""
    if self.limit is not None and length > self.limit:
      raise ValueError(
        f'model.attention={self.kind} is made for {self.limit} tokens '
        '(attention.length of linformer, attention.rows x sparse_block of '
        f'block_sparse), and the sequence has {length}. Shorten it, or make '
        'the kind for more.'
      )

  def check_length(self, length: int) -> None:
    """Raises ValueError for a row length that the kind does not support."""
    self.check_limit(length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Softmax(Heads):
  """Fields that every kind of softmax attention has.

  Attributes:
    scale: factor of the scores; None means 1 / sqrt(H). T5 takes 1 and draws
      its queries smaller instead.
    soft_cap: bound of the scores, which become cap * tanh(score / cap); None is
      no bound.
    dropout: dropout rate of the attention probabilities.
    block: number of queries in a block of the computation, and of keys where
      blocks are scanned; None chooses.
    kernel: `auto` takes the device's own kernel where it supports the layer
      (t2x/attention/kernels.py), `flash` requires it, `blocks` runs the same
      program on all devices.
  """

  scale: float | None = None
  soft_cap: float | None = None
  dropout: float = 0.0
  block: int | None = None
  kernel: Literal['auto', 'flash', 'blocks'] = 'auto'

  def __post_init__(self) -> None:
    super().__post_init__()
    field_checks.least(self, 'attention.', block=1)
    field_checks.positive(self, 'attention.', 'scale', 'soft_cap')
    field_checks.share(self, 'attention.', 'dropout')

  def pattern(self, length: int, *, causal: bool) -> patterns.Pattern:
    """Returns the pattern that the kind adds to the model's mask.

    Args:
      length: number of tokens T of a sequence that attends to itself.
      causal: whether the model's mask is causal.
    """
    del length, causal
    return patterns.Everything()

  @property
  def reach(self) -> int | None:
    """Number of tokens from a causal query back to its farthest key, or None.

    Both are included; None is no limit.
    """
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense(Softmax):
  """Full attention: a query sees every key that the model's mask shows."""

  kind: ClassVar[str] = 'dense'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local(Softmax):
  """Sliding-window attention.

  A window may be longer than a run's rows, since the window of a checkpoint is
  fixed. GPT-3's locally banded layers (Brown et al., 2020; Child et al., 2019)
  are these, alternating with dense layers in `model.attention_pattern`.

  Attributes:
    window: number of latest keys that a query sees, its own included. An
      encoder sees as many on the other side.
  """

  kind: ClassVar[str] = 'local'
  decoding: ClassVar[str | None] = 'keys and values of the window'
  window: int = 128

  def __post_init__(self) -> None:
    super().__post_init__()
    check_window(self)

  def pattern(self, length: int, *, causal: bool) -> patterns.Pattern:
    del length, causal
    return patterns.Window(self.window)

  @property
  def reach(self) -> int | None:
    return self.window


class Windowed(Protocol):
  """A config with a window."""

  @property
  def window(self) -> int:
    """Number of keys on one side of a query, its own included."""
    ...


def check_window(config: Windowed) -> None:
  """Raises ValueError for a `window` without any key."""
  if config.window < 1:
    raise ValueError(
      f'attention.window={config.window}; a query sees at least itself, so '
      'the window is 1 or more.'
    )


def check_reach(config: Windowed, reach: int, length: int) -> None:
  """Raises ValueError for a `window` that is longer than a sequence.

  Args:
    config: config of the layer.
    reach: number of tokens from a query to its farthest key, both included.
    length: number of tokens in a sequence.
  """
  if reach > length:
    raise ValueError(
      f'attention.window={config.window} reaches {reach} tokens, more than the '
      f'{length} of a sequence, so it would hide nothing. Lower it, or set '
      'model.attention=dense.'
    )

"""The kinds of softmax attention, as configs; `attention_layer` runs them.

All of them compute softmax(q k^T) v over the keys that a mask shows. What a
kind adds to the model's mask is a pattern (t2x/attention/patterns.py). Others,
with no scores to hide, are in linear, low_rank, regional and convolution, and
more of these in sparse; t2x/layers/attention_kinds.py lists them all.

Letters: N query heads, K key/value heads, H head dim, T tokens of a sequence.
"""

import dataclasses
from typing import Any
from typing import ClassVar
from typing import Literal

from t2x import field_checks
from t2x.attention import patterns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
  """What every kind of attention has.

  Attributes:
    num_heads: query heads N.
    num_kv_heads: key/value heads K, a divisor of N; None means N. 1 is
      multi-query attention (Shazeer, 2019), between is grouped-query (Ainslie
      et al., 2023).
    head_dim: H.
    bias: add biases to queries, keys, values and output.
    out_bias: whether the output has one; None is as `bias` says (Qwen 2 has
      biases, and none there).
    qk_norm: RMSNorm over each head's queries and keys (Dehghani et al., 2023).
    qk_norm_eps: added to the mean square there.
    rotary: turn queries and keys where the model's positions are rotary; false
      is a layer without positions (Kazemnejad et al., 2023).
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
  # Why no decoder can have it, or None. By what a decoder goes on token by
  # token, or None where it cannot. Whether queries see other documents of their
  # row.
  not_causal: ClassVar[str | None] = None
  decoding: ClassVar[str | None] = 'keys and values of all positions'
  mixes_rows: ClassVar[bool] = False
  # Fields of some kinds, as the others have them.
  dropout = 0.0
  global_projections = False
  num_token_types = 0

  def __post_init__(self):
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
    return self.num_kv_heads or self.num_heads

  @property
  def has_out_bias(self) -> bool:
    return self.bias if self.out_bias is None else self.out_bias

  @property
  def limit(self) -> int | None:
    """Tokens of the longest sequence; None for any."""
    return None

  def check_limit(self, length: int) -> None:
    """Raises ValueError for sequences longer than the kind is made for."""
    if self.limit is not None and length > self.limit:
      raise ValueError(
        f'model.attention={self.kind} is made for {self.limit} tokens '
        '(attention.length of linformer, attention.rows x sparse_block of '
        f'block_sparse), and the sequence has {length}. Shorten it, or make '
        'the kind for more.'
      )

  def check_length(self, length: int) -> None:
    """Raises ValueError for rows that the kind makes no sense for."""
    self.check_limit(length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Softmax(Heads):
  """What every kind of softmax attention has.

  Attributes:
    scale: factor of the scores; None means 1 / sqrt(H). T5 takes 1 and draws
      its queries smaller instead.
    soft_cap: bounds the scores by cap * tanh(score / cap).
    dropout: rate on the attention probabilities.
    block: queries, and where blocks are scanned keys, to a block of the
      computation; None chooses.
    kernel: `auto` takes the device's own kernel where it has one that serves
      (t2x/attention/kernels.py), `flash` insists on it, `blocks` runs the same
      program everywhere.
  """

  scale: float | None = None
  soft_cap: float | None = None
  dropout: float = 0.0
  block: int | None = None
  kernel: Literal['auto', 'flash', 'blocks'] = 'auto'

  def __post_init__(self):
    super().__post_init__()
    field_checks.least(self, 'attention.', block=1)
    field_checks.positive(self, 'attention.', 'scale', 'soft_cap')
    field_checks.share(self, 'attention.', 'dropout')

  def pattern(self, length: int, *, causal: bool) -> patterns.Pattern:
    """Returns what the kind leaves of the keys that the model's mask shows.

    Args:
      length: T, of a sequence that looks at itself.
      causal: the model's mask is causal.
    """
    del length, causal
    return patterns.Everything()

  @property
  def reach(self) -> int | None:
    """Tokens back to the farthest key of a causal query; None for all."""
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense(Softmax):
  """Every query sees every key that the model's mask lets it see."""

  kind: ClassVar[str] = 'dense'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local(Softmax):
  """A sliding window of the `window` latest keys, the query's own included.

  An encoder sees as many on the other side. A window may reach further than a
  run's rows, since that of a checkpoint stays what it is. GPT-3's locally
  banded layers (Brown et al., 2020; Child et al., 2019) are these, in
  `model.attention_pattern` with dense ones.
  """

  kind: ClassVar[str] = 'local'
  decoding: ClassVar[str | None] = 'keys and values of the window'
  window: int = 128

  def __post_init__(self):
    super().__post_init__()
    check_window(self)

  def pattern(self, length: int, *, causal: bool) -> patterns.Pattern:
    del length, causal
    return patterns.Window(self.window)

  @property
  def reach(self) -> int | None:
    return self.window


def check_window(config: Any) -> None:
  """Raises ValueError for a `window` in which nothing is seen."""
  if config.window < 1:
    raise ValueError(
      f'attention.window={config.window}; a query sees at least itself, so '
      'the window is 1 or more.'
    )


def check_reach(config: Any, reach: int, length: int) -> None:
  """Raises ValueError for a `window` that reaches further than a sequence."""
  if reach > length:
    raise ValueError(
      f'attention.window={config.window} reaches {reach} tokens, more than the '
      f'{length} of a sequence, so it would hide nothing. Lower it, or set '
      'model.attention=dense.'
    )

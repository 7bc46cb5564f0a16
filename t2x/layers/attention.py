"""The kinds of attention, as configs; `attention_layer` runs them.

Letters: N query heads, K key/value heads, H head dim.
"""

import dataclasses
from typing import ClassVar
from typing import Literal

from t2x import checks
from t2x.attention import patterns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
  """Every query sees every key that the model's mask lets it see.

  Attributes:
    num_heads: query heads N.
    num_kv_heads: key/value heads K, a divisor of N; None means N. 1 is
      multi-query attention (Shazeer, 2019), between is grouped-query (Ainslie
      et al., 2023).
    head_dim: H.
    bias: add biases to queries, keys, values and output.
    scale: factor of the scores; None means 1 / sqrt(H). T5 takes 1 and draws
      its queries smaller instead.
    qk_norm: RMSNorm over each head's queries and keys (Dehghani et al., 2023).
    soft_cap: bounds the scores by cap * tanh(score / cap).
    dropout: rate on the attention probabilities.
    block: queries to a block of the computation; None chooses.
    kernel: `auto` takes the device's own kernel where it has one that serves
      (t2x/attention/kernels.py), `flash` insists on it, `blocks` runs the same
      program everywhere.
  """

  kind: ClassVar[str] = 'dense'
  num_heads: int = 8
  num_kv_heads: int | None = None
  head_dim: int = 64
  bias: bool = False
  scale: float | None = None
  qk_norm: bool = False
  soft_cap: float | None = None
  dropout: float = 0.0
  block: int | None = None
  kernel: Literal['auto', 'flash', 'blocks'] = 'auto'

  def __post_init__(self):
    least = dict.fromkeys(('num_heads', 'num_kv_heads', 'head_dim', 'block'), 1)
    checks.least(self, 'attention.', **least)
    checks.positive(self, 'attention.', 'scale', 'soft_cap')
    checks.share(self, 'attention.', 'dropout')
    if self.num_heads % self.kv_heads:
      raise ValueError(
        f'attention.num_heads={self.num_heads} must be a multiple of '
        f'attention.num_kv_heads={self.kv_heads}: each key/value head serves '
        'the same number of query heads.'
      )

  @property
  def kv_heads(self) -> int:
    return self.num_kv_heads or self.num_heads

  def pattern(self, length: int, *, causal: bool) -> patterns.Pattern:
    """Returns what the kind leaves of the keys that the model's mask shows.

    Args:
      length: tokens of a sequence that looks at itself.
      causal: the model's mask is causal.

    Raises:
      ValueError: it does not fit the length.
    """
    del length, causal
    return patterns.Everything()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local(Dense):
  """A sliding window of the `window` latest keys, the query's own included.

  GPT-3's locally banded layers (Brown et al., 2020; Child et al., 2019).
  """

  kind: ClassVar[str] = 'local'
  window: int = 128

  def __post_init__(self):
    super().__post_init__()
    if self.window < 1:
      raise ValueError(
        f'attention.window={self.window}; a query sees at least itself, so '
        'the window is 1 or more.'
      )

  def pattern(self, length: int, *, causal: bool) -> patterns.Pattern:
    del length, causal
    return patterns.Window(self.window)


AttentionConfig = Dense | Local

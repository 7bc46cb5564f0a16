"""Special tokens around the texts that a model reads.

Runs, exported checkpoints and artefacts all take them from here.
"""

from collections.abc import Sequence
import dataclasses

from t2x.data import tokenizers
from t2x.models import encoder
from t2x.models import encoder_decoder
from t2x.models import model as model_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
  """Special tokens around a text.

  Attributes:
    before: token ids before the text.
    after: token ids after the text.
    reads_sentinels: whether <extra_id_N> in a text is the N-th sentinel.
    pairs: whether two texts can form one row, the second with another token
      type.
  """

  before: tuple[int, ...] = ()
  after: tuple[int, ...] = ()
  reads_sentinels: bool = False
  pairs: bool = False

  def ids(
    self, tokenizer: tokenizers.Tokenizer, texts: Sequence[str]
  ) -> list[list[int]]:
    """Returns the token ids of each text, the special ones included.

    Raises:
      ValueError: a text names a sentinel that does not exist.
    """
    if self.reads_sentinels:
      encoded = [tokenizer.encode_marked(text) for text in texts]
    else:
      encoded = tokenizer.encode_batch(texts)
    return [[*self.before, *ids, *self.after] for ids in encoded]


def of(config: model_lib.ModelConfig, tokenizer: tokenizers.Tokenizer) -> Frame:
  """Returns the frame of a model's texts.

  A decoder's text has the tokenizer's prefix (BOS, except for GPT-2's), so that
  it can be continued. An encoder's text has the suffix too. The source of an
  encoder-decoder ends with EOS.

  Args:
    config: config of the model.
    tokenizer: tokenizer of the model.
  """
  before, after = tokenizer.prefix_ids, tokenizer.suffix_ids
  if isinstance(config, encoder_decoder.EncoderDecoderConfig):
    return Frame(after=(tokenizer.eos_id,), reads_sentinels=True)
  if isinstance(config, encoder.EncoderConfig):
    return Frame(before=before, after=after, pairs=config.num_token_types > 1)
  return Frame(before=before)

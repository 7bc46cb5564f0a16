"""What a model reads of a text: its ids, and what stands around them.

Runs, their exports and their artefacts all take it from here.
"""

from collections.abc import Sequence
import dataclasses

from t2x.data import tokenizers
from t2x.models import encoder
from t2x.models import encoder_decoder
from t2x.models import model as model_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
  """What surrounds a text.

  Attributes:
    before: ids in front of it.
    after: ids behind it.
    marks: whether <extra_id_N> in a text is the N-th sentinel.
    pairs: whether two texts are read as one row, the second of another type.
  """

  before: tuple[int, ...] = ()
  after: tuple[int, ...] = ()
  marks: bool = False
  pairs: bool = False

  def ids(
    self, tokenizer: tokenizers.Tokenizer, texts: Sequence[str]
  ) -> list[list[int]]:
    """Returns what is read of each text.

    Raises:
      ValueError: a text names a sentinel that there is not.
    """
    if self.marks:
      encoded = [tokenizer.encode_marked(text) for text in texts]
    else:
      encoded = tokenizer.encode_batch(texts)
    return [[*self.before, *ids, *self.after] for ids in encoded]


def of(config: model_lib.ModelConfig, tokenizer: tokenizers.Tokenizer) -> Frame:
  """Returns the frame of a model's texts.

  A decoder's text begins as its tokenizer's texts do (with BOS, but for
  GPT-2's) and goes on; an encoder's ends as well; a source ends with EOS.
  """
  before, after = tokenizer.prefix_ids, tokenizer.suffix_ids
  if isinstance(config, encoder_decoder.EncoderDecoderConfig):
    return Frame(after=(tokenizer.eos_id,), marks=True)
  if isinstance(config, encoder.EncoderConfig):
    return Frame(before=before, after=after, pairs=config.num_token_types > 1)
  return Frame(before=before)

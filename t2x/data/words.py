"""The lexicon of a corpus: what its training text says of each token."""

import numpy as np

from t2x.data import token_store
from t2x.data import tokenizers
from t2x.objectives import lexicon as lexicon_lib
from t2x.objectives import masking


def lexicon(
  config: masking.Config | None,
  tokenizer: tokenizers.Tokenizer,
  stream: token_store.Stream,
) -> lexicon_lib.Lexicon:
  """Returns what a masking strategy or another objective asks for.

  Args:
    config: the strategy, if there is one.
    tokenizer: of the corpus.
    stream: the training text.
  """
  size, tokens = tokenizer.vocab_size, np.asarray(stream.tokens)
  phrases = ()
  config = config.phrase if isinstance(config, masking.Hierarchy) else config
  if isinstance(config, masking.Phrases):
    is_inside = tokens >= tokenizer.vocab.first_text_id
    is_inside[1:] &= is_inside[:-1].copy()
    phrases = lexicon_lib.find_phrases(
      tokens,
      is_inside,
      longest=config.longest,
      most=config.most or size,
      least_count=config.least_count,
    )
  return lexicon_lib.Lexicon(
    **tokenizer.marks(),
    counts_V=np.bincount(tokens, minlength=size),
    phrases=phrases,
  )

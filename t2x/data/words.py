"""Statistics of the training text for objectives: the lexicon and labels."""

import functools

import numpy as np

from t2x.data import config as config_lib
from t2x.data import corpus as corpus_lib
from t2x.data import token_store
from t2x.data import tokenizers
from t2x.objectives import classification
from t2x.objectives import denoising
from t2x.objectives import lexicon as lexicon_lib
from t2x.objectives import masked_lm
from t2x.objectives import masking
from t2x.objectives import next_sentence
from t2x.objectives import permutation
from t2x.objectives import vocab as vocab_lib


def lexicon(
  objective: config_lib.Objective,
  tokenizer: tokenizers.Tokenizer,
  stream: token_store.TokenStream,
) -> lexicon_lib.Lexicon | None:
  """Returns the lexicon that an objective needs; None if it needs none.

  Args:
    objective: the training objective.
    tokenizer: the corpus's tokenizer.
    stream: token stream of the training split.
  """
  match objective:
    case masked_lm.MaskedLM(masking=masking.Tokens() | masking.ByLoss()):
      return None
    case masked_lm.MaskedLM(masking=masking.Hierarchy() as levels):
      phrases = levels.phrase if levels.phrases else None
      return _lexicon(phrases, tokenizer, stream)
    case masked_lm.MaskedLM(masking=masking.Phrases() as phrases):
      return _lexicon(phrases, tokenizer, stream)
    case next_sentence.NextSentence():
      masked = lexicon(objective.masked, tokenizer, stream)
      return masked or _lexicon(None, tokenizer, stream)
    case permutation.Permutation():
      masked = masked_lm.MaskedLM(masking=objective.masking)
      return lexicon(masked, tokenizer, stream)
    case masked_lm.MaskedLM() | denoising.Denoising():
      return _lexicon(None, tokenizer, stream)
  return None


def labels(
  config: config_lib.DataConfig, corpus: corpus_lib.Corpus
) -> tuple[tuple[int, ...], ...]:
  """Returns the ids of each label of the training text, in class order.

  Empty for an objective without classes.

  Raises:
    ValueError: if there are more or fewer labels than classes, or a label is
      longer than a row.
  """
  objective = config.objective
  if not isinstance(objective, classification.Classification):
    return ()
  stream = corpus.streams(config.train_split)[1]
  label_ids = _labels(stream, corpus.tokenizer.vocab)
  if objective.labels:
    label_ids = _ordered(label_ids, objective.labels, corpus.tokenizer)
  longest = max(map(len, label_ids))
  room = objective.source_length(config.length)
  if longest > room:
    raise ValueError(
      f'data.target_field={config.target_field!r} has a label of {longest} '
      f'tokens, and rows of data.length={config.length} hold {room}. Shorten '
      'labels, or raise data.length.'
    )
  if len(label_ids) != objective.num_classes:
    decode = corpus.tokenizer.decode
    some = ', '.join(repr(decode(ids)) for ids in label_ids[:8])
    raise ValueError(
      f'data.target_field={config.target_field!r} has {len(label_ids)} labels '
      f'({some}), and data.objective.num_classes={objective.num_classes}. Set '
      'it to as many, or another field.'
    )
  return label_ids


def has_classes(config: config_lib.DataConfig) -> bool:
  """Returns whether a task of the run is classification."""
  return any(
    isinstance(part.objective, classification.Classification)
    for part in config_lib.parts(config).values()
  )


def label_texts(
  config: config_lib.DataConfig, corpus: corpus_lib.Corpus
) -> dict[str, list[str]]:
  """Returns the texts of the labels, in class order, by the head's term."""
  by_term = {}
  decode = corpus.tokenizer.decode
  for name, part in config_lib.parts(config).items():
    if isinstance(part.objective, classification.Classification):
      ids = labels(part, corpus.tasks[name] if name else corpus)
      texts = [*part.objective.labels] or [decode(label) for label in ids]
      by_term[part.objective.name] = texts
  return by_term


def _ordered(
  found: tuple[tuple[int, ...], ...],
  texts: tuple[str, ...],
  tokenizer: tokenizers.Tokenizer,
) -> tuple[tuple[int, ...], ...]:
  """Returns the ids of labels in a given order.

  Args:
    found: ids of each label of the training text.
    texts: labels in the order of their classes.
    tokenizer: the corpus's tokenizer.

  Raises:
    ValueError: if two labels have the same ids, or the training text has a
      label that is not among them.
  """
  given = tuple(tuple(ids) for ids in tokenizer.encode_batch(texts))
  more = [tokenizer.decode(ids) for ids in found if ids not in given]
  if more or len(set(given)) < len(given):
    what = (
      f'lacks {more[:8]} of the training text'
      if more
      else ('has two that are the same to the tokenizer')
    )
    raise ValueError(
      f'data.objective.labels={",".join(texts)} {what}. Name each label as it '
      'is written in the texts.'
    )
  return given


# Cached, since training and each evaluation ask for it.
@functools.lru_cache(maxsize=4)
def _labels(
  stream: token_store.TokenStream, vocab: vocab_lib.Vocab
) -> tuple[tuple[int, ...], ...]:
  texts = np.split(np.asarray(stream.tokens), stream.offsets[1:-1])
  return tuple(sorted({classification.label_of(text, vocab) for text in texts}))


# Cached, since training and each evaluation ask for it.
@functools.lru_cache(maxsize=4)
def _lexicon(
  config: masking.Phrases | None,
  tokenizer: tokenizers.Tokenizer,
  stream: token_store.TokenStream,
) -> lexicon_lib.Lexicon:
  """Returns the lexicon of a token stream; reads the whole stream.

  Args:
    config: settings of the phrases to find; None for no phrases.
    tokenizer: the corpus's tokenizer.
    stream: token stream of the training split.
  """
  size, tokens = tokenizer.vocab_size, np.asarray(stream.tokens)
  phrases = ()
  if config is not None:
    is_inside = tokenizer.vocab.is_text(tokens)
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

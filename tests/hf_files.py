"""Small tokenizers and models of the other library, in files as it has them."""

import json
import os
import pathlib

import sentencepiece
import tokenizers

# Punctuation, numbers, accents, other scripts and runs of spaces.
_ROOT = pathlib.Path(__file__).parents[1]
TEXTS = [
  line
  for name in ('README.md', 'BUILD_NOTES.md', 'docs/limits.md')
  for line in (_ROOT / name).read_text().split('\n')
  if line.strip()
][:400]
PROBES = [
  'The quick brown fox, déjà vu — 12,345!',
  'Ünïcödé 漢字 🙂 ok',
  "don't stop\tnow",
  'two  spaces  here ',
  'HELLO World',
  '',
]


def wordpiece(directory: pathlib.Path) -> pathlib.Path:
  """Writes BERT's vocab.txt."""
  directory.mkdir()
  made = tokenizers.BertWordPieceTokenizer()
  made.train_from_iterator(TEXTS, vocab_size=500, show_progress=False)
  made.save_model(str(directory))
  return directory


def byte_level(directory: pathlib.Path, special=('<|endoftext|>',)):
  """Writes GPT-2's vocab.json and merges.txt."""
  directory.mkdir()
  made = tokenizers.ByteLevelBPETokenizer()
  made.train_from_iterator(
    TEXTS, vocab_size=500, special_tokens=list(special), show_progress=False
  )
  made.save_model(str(directory))
  return directory


def roberta(directory: pathlib.Path) -> pathlib.Path:
  """Writes RoBERTa's vocab.json and merges.txt."""
  return byte_level(directory, ('<s>', '<pad>', '</s>', '<unk>', '<mask>'))


def unigram(directory: pathlib.Path) -> pathlib.Path:
  """Writes T5's spiece.model."""
  _sentencepiece(
    directory, 'spiece', model_type='unigram', pad_id=0, eos_id=1, unk_id=2,
    bos_id=-1,
  )  # fmt: skip
  return directory


def llama(directory: pathlib.Path) -> pathlib.Path:
  """Writes Llama 2's tokenizer.model."""
  _sentencepiece(
    directory, 'tokenizer', model_type='bpe', pad_id=-1, byte_fallback=True,
    normalization_rule_name='identity', remove_extra_whitespaces=False,
  )  # fmt: skip
  settings = {
    'tokenizer_class': 'LlamaTokenizer',
    'bos_token': '<s>',
    'eos_token': '</s>',
    'unk_token': '<unk>',
    'add_bos_token': True,
  }
  (directory / 'tokenizer_config.json').write_text(json.dumps(settings))
  return directory


def _sentencepiece(directory, name, **options):
  directory.mkdir()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS),
    model_prefix=str(directory / name),
    vocab_size=600 if options['model_type'] == 'bpe' else 400,
    minloglevel=2,
    **options,
  )
  os.remove(directory / f'{name}.vocab')


MAKERS = {
  'bert': wordpiece,
  'gpt2': byte_level,
  'roberta': roberta,
  't5': unigram,
  'llama': llama,
}


def is_usual(text: str) -> bool:
  """Whether a text has printable ASCII alone, and blanks between words."""
  return (
    text.isascii() and text.isprintable() and text == ' '.join(text.split())
  )

"""The sample of a corpus that a tokenizer is trained on."""

from collections.abc import Iterable

from t2x.data import letters

_SAMPLE_BYTES = 5_000_000  # More text hardly changes 8k pieces.
CHUNK = 2_000  # Characters; the trainer skips very long sentences.


def chunks(texts: Iterable[str]) -> Iterable[str]:
  """Yields the first megabytes of texts, in chunks of `CHUNK` characters."""
  left = _SAMPLE_BYTES
  for text in texts:
    for start in range(0, len(text), CHUNK):
      chunk = text[start : start + CHUNK]
      left -= len(chunk.encode())
      if left < 0:
        return
      # The trainer would take U+2581 for a space; it is encoded as bytes.
      yield from filter(None, chunk.split(letters.SPACE))

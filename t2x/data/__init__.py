"""Text to batches: builders, tokenizers, packing, and the input pipeline."""

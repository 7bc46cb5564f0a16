"""Reads and writes checkpoints and tokenizers of Hugging Face."""

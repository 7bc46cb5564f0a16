"""Training objectives: pure NumPy functions from rows of tokens to batches."""

"""The training loop, and the directory of a run."""

"""Sweeps: many runs of one experiment, and the study that keeps them."""

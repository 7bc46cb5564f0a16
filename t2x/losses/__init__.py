"""Losses: cross-entropy, load balancing, and the weights of tasks."""

"""Metrics, progress and reports of a run."""

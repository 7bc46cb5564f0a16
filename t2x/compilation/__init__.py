"""The programs of an experiment, compiled here or read from a file."""

"""Several processes in one run: joining, agreeing, dying, being late."""

"""The update as a pure function: state, step, optimizer, evaluation."""

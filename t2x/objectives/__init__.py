"""What a model is asked to predict: pure numpy functions of rows of tokens."""

"""A trained model behind HTTP: requests, streams, limits, the page."""

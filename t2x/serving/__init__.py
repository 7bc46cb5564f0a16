"""Serves a trained model over HTTP: requests, streams, limits, a web page."""

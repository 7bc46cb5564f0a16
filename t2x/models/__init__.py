"""Encoders, decoders and encoder-decoders, made of layers."""

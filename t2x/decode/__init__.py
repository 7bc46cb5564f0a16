"""Generation token by token: prefill, decoding, sampling, beam search,
speculative decoding, and an engine with continuous batching.
"""

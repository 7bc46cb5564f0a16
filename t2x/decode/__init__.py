"""Generation token by token: caches, sampling, beams, drafts, the engine of
requests that come and go.
"""

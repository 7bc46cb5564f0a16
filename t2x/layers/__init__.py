"""The parts of a block: attention layers, feed-forward layers, experts, norms,
positions, embeddings, and the stack of blocks.
"""

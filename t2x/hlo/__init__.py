"""What a compiled program does: FLOPs, bytes, exchanges, memory over time."""

"""What a step would cost, from shapes alone: FLOPs, bytes, messages, memory."""

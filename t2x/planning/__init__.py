"""What a run would cost, and on which mesh it is fastest."""

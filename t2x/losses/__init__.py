"""From logits and targets to the number that training minimises."""

"""What a program will cost, before it runs."""

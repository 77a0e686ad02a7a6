"""What a graph reads, and what it computes."""

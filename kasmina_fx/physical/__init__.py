"""The physical view: what a graph reads, and what it computes."""

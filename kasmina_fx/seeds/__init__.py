"""The seeds of one layer, on the host."""

"""How a change shows: whole or not at all."""

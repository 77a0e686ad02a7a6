"""Look at graphs: capture them, write them as text, compare them."""

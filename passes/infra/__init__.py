"""What all passes share."""

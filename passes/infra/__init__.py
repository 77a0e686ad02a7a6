"""The parts that all passes share."""

"""Bases, which seeds watch: modules whose output has features."""

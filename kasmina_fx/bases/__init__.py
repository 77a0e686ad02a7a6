"""What seeds watch: modules whose output has features."""

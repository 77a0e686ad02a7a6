"""What people and controllers read about a model."""

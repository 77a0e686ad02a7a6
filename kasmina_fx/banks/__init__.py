"""Blueprints of one class, stacked."""

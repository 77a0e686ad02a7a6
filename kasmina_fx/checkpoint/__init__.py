"""Checkpoints: a model, and its optimizer, in one file that is whole or not there."""

from kasmina_fx.checkpoint.files import FORMAT, VERSION, load, save

__all__ = ["FORMAT", "VERSION", "load", "save"]

"""Blueprints: the small modules that seeds grow into their chunks.

A blueprint has two views as well: ``module(size)``, plain PyTorch for one chunk (what the reference
runs), and ``stacked(params, chunks, dim)``, many of them at once (what the graph runs). A new
built-in is one class in :mod:`kasmina_fx.blueprints.builtin`; anything else, an ``nn.Module`` say,
goes through :mod:`kasmina_fx.blueprints.from_module`.
"""

from kasmina_fx.blueprints.base import Blueprint
from kasmina_fx.blueprints.from_module import ModuleBlueprint
from kasmina_fx.blueprints.registry import lookup, names, register

__all__ = ["Blueprint", "ModuleBlueprint", "lookup", "names", "register"]

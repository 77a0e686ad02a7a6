"""Packs: named sets of seeds over all layers of a model, one of them in use.

``model_packs.py`` is what :func:`kasmina_fx.packs` returns; what one layer keeps is in
:mod:`kasmina_fx.seeds.packs`, and how it is swapped in :mod:`kasmina_fx.seeds.switching`.
"""

from kasmina_fx.seed_packs.model_packs import ModelPacks, packs

__all__ = ["ModelPacks", "packs"]

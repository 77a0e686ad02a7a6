"""Which seeds of a model somebody means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from kasmina_fx.arguments import SeedIds, as_seed_ids
from kasmina_fx.errors import InvalidArgument, InvalidType, shown
from kasmina_fx.layer import KasminaLayer
from kasmina_fx.lifecycle import is_blended
from kasmina_fx.model import layers_of

#: Seeds of a model: the name of a layer, several names, or seed ids by name (None: all of it).
SeedGroup: TypeAlias = str | Iterable[str] | Mapping[str, SeedIds | None]


def groups_by_layer(model: nn.Module) -> dict[str, SeedGroup]:
    """One group for each layer that has blended seeds, under the layer's name.

    Raises:
        NoTargets: The model has no KasminaLayer.
    """
    return {name: {name: ids} for name, ids in _blended(model).items()}


def groups_by_seed(model: nn.Module) -> dict[str, SeedGroup]:
    """One group for each blended seed, called ``layer[seed]``.

    Seeds are the same to :func:`kasmina_fx.counterfactual` as larger groups: each costs a forward
    of every batch.

    Raises:
        NoTargets: The model has no KasminaLayer.
    """
    return {
        f"{name}[{seed}]": {name: [seed]}
        for name, ids in _blended(model).items()
        for seed in ids.tolist()
    }


def _blended(model: nn.Module) -> dict[str, Tensor]:
    """Ids of the seeds that forwards blend, by layer, of layers that have any."""
    stages = {name: layer.kasmina.stages for name, layer in layers_of(model).items()}
    found = {name: is_blended(of).nonzero().flatten() for name, of in stages.items()}
    return {name: ids for name, ids in found.items() if len(ids)}


def masks_of(model: nn.Module, group: SeedGroup | None) -> dict[KasminaLayer, Tensor]:
    """The seeds of a group, a bool mask ``(S,)`` on the CPU for each layer that has some.

    Args:
        model: Whose.
        group: None means all seeds of the model.

    Raises:
        NoTargets: The model has no KasminaLayer.
        InvalidArgument, InvalidType, SeedIndexError: No such layer, or no such seeds.
    """
    layers = layers_of(model)
    masks = {}
    for name, ids in _by_name(layers, group).items():
        if name not in layers:
            raise InvalidArgument(f"no layer {shown(name)}; the model has {sorted(layers)[:8]}")
        mask = torch.zeros(layers[name].num_seeds, dtype=torch.bool, device="cpu")
        mask[slice(None) if ids is None else as_seed_ids(ids, len(mask), name)] = True
        masks[layers[name]] = mask
    return masks


def _by_name(
    layers: Mapping[str, KasminaLayer], group: SeedGroup | None
) -> Mapping[str, SeedIds | None]:
    if group is None:
        return dict.fromkeys(layers)
    if isinstance(group, str):
        return {group: None}
    if isinstance(group, Mapping):
        return group
    given: Any = group  # whatever callers give
    names = list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(name, str) for name in names):
        raise InvalidType(
            f"seeds {shown(group)}: give the name of a layer, several names, or seed ids by name"
        )
    return dict.fromkeys(names)

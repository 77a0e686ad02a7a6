"""State dicts: a wrapped layer keeps its base's names, so that plain checkpoints go on loading.

A :class:`~kasmina_fx.KasminaLayer` at ``fc`` saves ``fc.weight`` (not ``fc.base.weight``) and its
seeds' tensors under ``fc.kasmina.``. Loading a plain checkpoint leaves the latter as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from kasmina_fx.bank import check_bank
from kasmina_fx.blueprints.registry import lookup
from kasmina_fx.errors import LayoutMismatch, UnknownBlueprint
from kasmina_fx.layout import parse_banks
from kasmina_fx.seed_store import LAYOUT_VERSION

if TYPE_CHECKING:
    from kasmina_fx.layer import KasminaLayer

OWN: Final = "kasmina."
_BASE: Final = "base."


def attach(layer: nn.Module) -> None:
    """Give a layer the hooks that rename its base's entries and read its own."""
    layer.register_state_dict_post_hook(_strip_base)
    layer.register_load_state_dict_pre_hook(_prepare)
    layer.register_load_state_dict_post_hook(_after_load)


def floating_tensor(module: nn.Module) -> Tensor | None:
    """A floating-point tensor of a module: its dtype and device stand for the module's."""
    tensors = (*module.parameters(), *module.buffers())
    return next((t for t in tensors if t.dtype.is_floating_point), None)


def check(layer: KasminaLayer, state_dict: dict[str, Any], prefix: str) -> None:
    """Refuse entries that were written for another layer; changes nothing.

    Raises:
        LayoutMismatch: Says what the entries hold and what this layer takes.
    """
    own, name = prefix + OWN, layer.layer_id
    extra = state_dict.get(own + "_extra_state")
    if extra is not None:
        if not isinstance(extra, dict) or extra.get("version") != LAYOUT_VERSION:
            raise LayoutMismatch(
                f"{name}: the state dict's kasmina entries have version "
                f"{extra.get('version') if isinstance(extra, dict) else extra!r}; "
                f"this release reads version {LAYOUT_VERSION}"
            )
        if extra.get("layout") != str(layer.kasmina.layout):
            raise LayoutMismatch(
                f"{name}: the state dict was written for chunks [{extra.get('layout')}]; this "
                f"layer has [{layer.kasmina.layout}]. Give kasminify the same num_seeds"
            )
        try:
            for kind in extra["blueprints"].values():
                lookup(kind)
            for key, text in extra["banks"].items():
                check_bank(key, text, layer.kasmina.layout, state_dict, f"{own}banks.{key}.")
        except UnknownBlueprint as error:
            raise LayoutMismatch(
                f"{name}: the state dict needs a blueprint that is not registered here: {error}"
            ) from error
        except (KeyError, ValueError) as error:
            raise LayoutMismatch(f"{name}: a malformed state dict: {error}") from error
    state = state_dict.get(own + "state.state_tensor")
    layer.state.check_values(state, state_dict.get(own + "state.alpha"))
    telemetry = state_dict.get(own + "telemetry.accumulated")
    expected = layer.kasmina.telemetry.accumulated.shape
    if telemetry is not None and telemetry.shape != expected:
        raise LayoutMismatch(
            f"{name}: telemetry of shape {tuple(telemetry.shape)}; this layer takes "
            f"{tuple(expected)}"
        )


def _strip_base(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [key for key in state_dict if key.startswith(prefix + _BASE)]:
        state_dict[prefix + key.removeprefix(prefix + _BASE)] = state_dict.pop(key)


def _prepare(layer: KasminaLayer, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    check(layer, state_dict, prefix)
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        if not name.startswith(OWN):
            state_dict[prefix + _BASE + name] = state_dict.pop(key)
    own = prefix + OWN
    extra = state_dict.get(own + "_extra_state")
    for key, text in (extra or {"banks": {}})["banks"].items():
        if key not in layer.kasmina.banks:
            (spec,) = parse_banks(text)
            layer.allocate(spec.kind, shared=spec.shared)
    # A plain checkpoint has none of these: they stay. One that has lacks the banks that only this
    # layer has: their slots are free from now on.
    for name, value in layer.kasmina.state_dict().items():
        gone = extra is not None and name.endswith(".slots")
        state_dict.setdefault(own + name, torch.zeros_like(value) if gone else value)


def _after_load(layer: KasminaLayer, incompatible_keys: Any) -> None:
    layer.reload()

"""State dicts of whole models: checked before the first layer takes a part of one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kasmina_fx import host_state
from kasmina_fx.errors import LayoutMismatch
from kasmina_fx.layer import KasminaLayer


def attach(root: nn.Module) -> None:
    """Give a kasminified model the hooks that check, and that name entries as its user does."""
    root.register_load_state_dict_pre_hook(_check_all_first)
    root.register_load_state_dict_post_hook(_plain_names)


def _layers(root: nn.Module) -> dict[str, KasminaLayer]:
    return {name: m for name, m in root.named_modules() if isinstance(m, KasminaLayer)}


def _check_all_first(root: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    # Names that are missing or unknown are torch's to check, after loading: a hook is not told
    # whether it is strict. checkpoint.load checks them before.
    layers = {f"{prefix}{name}." if name else prefix: m for name, m in _layers(root).items()}
    have = {p: any(key.startswith(p + host_state.OWN) for key in state_dict) for p in layers}
    lacking = [p.removesuffix(".") for p, has in have.items() if not has]
    if lacking and any(have.values()):
        raise LayoutMismatch(
            f"the state dict holds the seeds of {len(layers) - len(lacking)} layers and none of "
            f"{lacking[:4]}: it was cut off, or its model was kasminified in another way. Give it "
            "whole, or load layer by layer"
        )
    for start, layer in layers.items():
        host_state.check(layer, state_dict, start)
    for name, mine in root.state_dict(prefix=prefix).items():
        given = state_dict.get(name)
        seeds = f".{host_state.OWN}" in f".{name}"
        if seeds or is_lazy(mine) or not isinstance(mine, Tensor) or not isinstance(given, Tensor):
            continue
        if given.shape != mine.shape:
            raise LayoutMismatch(
                f"size mismatch for {name}: the state dict has {tuple(given.shape)}, the model "
                f"takes {tuple(mine.shape)}; nothing has changed"
            )


def _plain_names(root: nn.Module, incompatible_keys: Any) -> None:
    """A wrapped layer's weight is ``fc.weight`` to its user, not ``fc.base.weight``."""
    for name in _layers(root):
        inside = f"{name}.base." if name else "base."
        for keys in (incompatible_keys.missing_keys, incompatible_keys.unexpected_keys):
            for i, key in enumerate(keys):
                head, found, tail = f".{key}".partition(f".{inside}")
                if found:
                    keys[i] = f"{head}.{inside.removesuffix('base.')}{tail}".removeprefix(".")

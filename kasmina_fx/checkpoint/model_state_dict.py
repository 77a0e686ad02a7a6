"""State dicts of whole models: checked before the first layer takes a part of one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kasmina_fx.errors import LayoutMismatch
from kasmina_fx.layer import KasminaLayer
from kasmina_fx.seeds.entry_names import OWN, saved_prefix
from kasmina_fx.seeds.state_dict_checks import check as check_entries


def attach(root: nn.Module) -> None:
    """Give a kasminified model the hook that checks a state dict before any layer takes a part."""
    if not any(
        getattr(h, "hook", h) is _check_all_first for h in root._load_state_dict_pre_hooks.values()
    ):
        root.register_load_state_dict_pre_hook(_check_all_first)


def _layers(root: nn.Module) -> dict[str, KasminaLayer]:
    return {name: m for name, m in root.named_modules() if isinstance(m, KasminaLayer)}


def _check_all_first(root: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    # Names that are missing or unknown are torch's to check, after loading: a hook is not told
    # whether it is strict. checkpoint.load checks them before.
    layers = {prefix + saved_prefix(name): m for name, m in _layers(root).items()}
    for start, layer in layers.items():
        check_entries(layer.kasmina, state_dict, start)
    for name, mine in _loaded_plainly(root, prefix):
        given = state_dict.get(name)
        if not isinstance(given, Tensor) or {mine.shape, given.shape} == {(), (1,)}:
            continue
        if given.shape != mine.shape:
            raise LayoutMismatch(
                f"size mismatch for {name}: the state dict has {tuple(given.shape)}, the model "
                f"takes {tuple(mine.shape)}; nothing has changed"
            )
    have = {p: any(k.startswith(p + OWN) for k in state_dict) for p in layers}
    for start, layer in layers.items():
        layer.kasmina.misses_entries = any(have.values()) and not have[start]


def _loaded_plainly(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Host tensors by their names in a state dict, but for modules with loading of their own."""
    if isinstance(module, KasminaLayer):
        module = module.base
    if type(module)._load_from_state_dict is not nn.Module._load_from_state_dict:
        return
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        kept = name not in module._non_persistent_buffers_set
        if tensor is not None and kept and not is_lazy(tensor):
            yield prefix + name, tensor
    for name, child in module._modules.items():
        hooked = child is None or child._load_state_dict_pre_hooks
        if child is not None and (isinstance(child, KasminaLayer) or not hooked):
            yield from _loaded_plainly(child, f"{prefix}{name}.")

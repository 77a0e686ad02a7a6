"""Whole models: wrap every target, and take the wrapping off again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from kasmina_fx import gated_call, host_state, whole_state
from kasmina_fx._dynamo_compat import compile_whole, uncompiled
from kasmina_fx._torch_compat import mode_options
from kasmina_fx.backend import kasmina, split_options
from kasmina_fx.chunked_layer import ChunkedKasminaLayer
from kasmina_fx.colony import Colony
from kasmina_fx.config import SeedConfig, TelemetryPolicy
from kasmina_fx.errors import InvalidArgument, InvalidType, NoTargets, StillGrowing
from kasmina_fx.features import find_features
from kasmina_fx.layer import KasminaLayer
from kasmina_fx.lifecycle import SeedLifecycle
from kasmina_fx.seed_store import SeedStore

M = TypeVar("M", bound=nn.Module)

#: Settings that would let the owner of a wrapped layer go past the layer's forward, and what turns
#: them off. In eval mode torch's fused encoder kernel reads linear1.weight and never calls linear1;
#: an encoder hands its layers nested tensors, which only that kernel takes.
_FAST_PATHS: Final = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
#: Where the owner keeps the setting that it had.
_KEPT: Final = "_kasmina_kept"


def kasminify(
    model: M,
    *,
    num_seeds: int = 1000,
    targets: Sequence[type[nn.Module]] = (nn.Linear,),
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    reserve: int = 0,
    telemetry: bool | TelemetryPolicy = True,
    config: SeedConfig | None = None,
    compile: bool = True,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
) -> M:
    """Let a model grow: wrap its targets in place, around the same parameters.

    Shared and tied modules stay shared; names in the state dict, hooks, device, dtype, training
    flag and ``requires_grad`` stay as they are. Calling it again changes nothing.

    Args:
        model: Any module. One that is itself a target is returned in a wrapper.
        num_seeds: Seeds a layer, capped at the layer's features.
        targets: Module types, or subclasses of them, to wrap.
        filter_fn: ``(module, fqn) -> bool``; wraps only where it is true.
        reserve: Slots a layer to allocate ahead for the default blueprint.
        telemetry: Keep statistics of every chunk; a :class:`TelemetryPolicy` says of how much.
        config: Ramps, embargo and error limit of every layer.
        compile: Call ``model.compile(backend="kasmina")``, which keeps class and state-dict keys.
        mode: Of ``torch.compile``.
        options: Of the backend, see :func:`kasmina_fx.backend.kasmina`.
        dynamic: Of ``torch.compile``.

    Returns:
        The same model (a wrapper only if the model itself was a target).

    Raises:
        NoTargets: Nothing to wrap; lists the module types seen.
        InvalidArgument, InvalidType, UnknownOption: Before anything changed.

    >>> net = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4))
    >>> net = kasminify(net, num_seeds=16, compile=False)
    >>> list(kasmina_layers(net)), net[0].num_seeds, net[2].num_seeds
    (['0', '2'], 16, 4)
    >>> list(host_state_dict(net))
    ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    _check_arguments(model, num_seeds, filter_fn, config, dynamic)
    wanted = _checked_targets(targets)
    _, patches = split_options(mode, options)
    if patches.get("triton.cudagraphs") and (config is None or config.pad is None):
        config = replace(config or SeedConfig(), pad=True)
    plain: M = uncompiled(model)
    if any(isinstance(module, KasminaLayer) for module in plain.modules()):
        return model
    found = _find(plain, wanted, filter_fn)
    colony: Colony[SeedStore] = Colony()
    wrapped = {}
    for module, fqn in found.items():
        count = min(num_seeds, find_features(module, None, None).count)
        layer = ChunkedKasminaLayer(
            module, count, fqn or "model", telemetry, reserve=reserve, config=config
        )
        layer.colony = colony
        colony.add(layer.kasmina)
        wrapped[module] = layer
    root = _replace(plain, wrapped)
    whole_state.attach(root)
    for owner, name, off in _fast_paths(root):
        if any(_is_layer(child) for child in owner.modules()):
            setattr(owner, _KEPT, getattr(owner, name))
            setattr(owner, name, off)
    compiled = None
    if compile:
        given = dict(options or {})
        if mode is not None and given:  # torch.compile takes one of them: spell the mode out
            mode, given = None, mode_options(mode) | given
        compiled = compile_whole(
            root, backend=kasmina, mode=mode, options=given or None, dynamic=dynamic
        )
    gated_call.GatedCall(root, colony, compiled)
    return root


def unkasminify(model: M, *, fold: bool = False) -> M:
    """Back to plain layers with the current weights, in place.

    Args:
        model: A model with KasminaLayers, compiled or not.
        fold: Fold blended seeds into their base's weight; possible where the blueprint is
            ``affine``, the seed FOSSILIZED and the base a Linear or a convolution.

    Returns:
        The same model, uncompiled (the base, if the model itself is a KasminaLayer).

    Raises:
        StillGrowing: A blended seed that can't be folded; nothing has changed.
    """
    plain: M = uncompiled(model)
    layers = kasmina_layers(plain)
    uses = Counter(id(p) for owner in plain.modules() for p in owner._parameters.values())
    uses.update(id(p) for layer in layers.values() for p in layer.base.parameters())
    for name, layer in layers.items():
        for seed_id in layer.state.blended.nonzero().flatten().tolist():
            why = (
                _why_not_folded(layer, seed_id, uses) if fold else "pass fold=True if it is affine"
            )
            if why is not None:
                raise StillGrowing(f"{name or 'model'}: seed {seed_id} is blended: {why}")
    for layer in layers.values():
        _fold(layer)
        layer.colony.discard(layer.kasmina)
    gated_call.remove(plain)
    root = _replace(plain, {layer: layer.base for layer in layers.values()})
    for owner, name, _ in _fast_paths(root):
        if hasattr(owner, _KEPT):
            setattr(owner, name, getattr(owner, _KEPT))
            delattr(owner, _KEPT)
    return root


def kasmina_layers(model: nn.Module) -> dict[str, KasminaLayer]:
    """The KasminaLayers of a model, compiled or not, by FQN; a shared layer by its first name."""
    named = uncompiled(model).named_modules()
    return {name: module for name, module in named if isinstance(module, KasminaLayer)}


def host_state_dict(model: nn.Module) -> dict[str, Any]:
    """The plain model's state dict: its keys, and the host's current weights."""
    model = uncompiled(model)
    names = {name for name, m in model.named_modules(remove_duplicate=False) if _is_layer(m)}
    own = tuple(f"{name}.{host_state.OWN}" if name else host_state.OWN for name in names)
    return {key: value for key, value in model.state_dict().items() if not key.startswith(own)}


def skipped_targets(model: nn.Module, targets: Sequence[type[nn.Module]]) -> dict[str, str]:
    """Targets that are left alone, by FQN, and why."""
    return {
        f"{name}.out_proj" if name else "out_proj": (
            "nn.MultiheadAttention reads its weight and never calls it"
        )
        for name, owner in uncompiled(model).named_modules()
        if isinstance(owner, nn.MultiheadAttention) and isinstance(owner.out_proj, tuple(targets))
    }


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, KasminaLayer)


def _check_arguments(model: Any, num_seeds: Any, filter_fn: Any, config: Any, dynamic: Any) -> None:
    if not isinstance(model, nn.Module):
        raise InvalidType(f"kasminify({model!r}): give an nn.Module")
    if isinstance(num_seeds, bool) or not isinstance(num_seeds, int):
        raise InvalidType(f"num_seeds={num_seeds!r}: give an int")
    if num_seeds < 1:
        raise InvalidArgument(f"num_seeds={num_seeds}: give at least 1")
    if filter_fn is not None and not callable(filter_fn):
        raise InvalidType(f"filter_fn={filter_fn!r}: give a function (module, fqn) -> bool")
    if not isinstance(config, SeedConfig | None):
        raise InvalidType(f"config={config!r}: give a SeedConfig")
    if dynamic not in (None, True, False):
        raise InvalidType(f"dynamic={dynamic!r}: give True, False or None")


def _checked_targets(targets: Any) -> tuple[type[nn.Module], ...]:
    given = tuple(targets) if isinstance(targets, Iterable) else (targets,)
    for target in given:
        if not (isinstance(target, type) and issubclass(target, nn.Module)):
            raise InvalidType(f"targets holds {target!r}: give nn.Module classes")
    return given


def _find(
    model: nn.Module,
    targets: tuple[type[nn.Module], ...],
    filter_fn: Callable[[nn.Module, str], bool] | None,
) -> dict[nn.Module, str]:
    skipped = skipped_targets(model, targets)
    found: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}." if outer else "") for outer in found.values())
        if not isinstance(module, targets) or name in skipped or inside:
            continue
        if filter_fn is None or filter_fn(module, name):
            found[module] = name
    if not found:
        seen = sorted({type(module).__name__ for module in model.modules()})
        raise NoTargets(
            f"no module to wrap: targets are {', '.join(t.__name__ for t in targets)}"
            f"{' that pass filter_fn' if filter_fn else ''}; the model holds {', '.join(seen)}"
            + "".join(f"; {name} is left alone: {why}" for name, why in skipped.items())
        )
    return found


def _replace(root: M, replacements: Mapping[nn.Module, nn.Module]) -> M:
    """Put modules in place of others wherever they occur."""
    if root in replacements:
        return replacements[root]  # type: ignore[return-value]  # the wrapper stands for the model
    for owner in list(root.modules()):
        if owner in replacements.values() and isinstance(owner, KasminaLayer):
            continue  # its base is what was replaced
        for name, child in owner._modules.items():
            if child is not None and child in replacements:
                owner._modules[name] = replacements[child]
    return root


def _fast_paths(root: nn.Module) -> Iterator[tuple[nn.Module, str, int]]:
    for owner in root.modules():
        for kind, name, off in _FAST_PATHS:
            if isinstance(owner, kind) and hasattr(owner, name):
                yield owner, name, off


def _why_not_folded(layer: KasminaLayer, seed_id: int, uses: Mapping[int, int]) -> str | None:
    held = layer.bank_of(seed_id)
    stage = SeedLifecycle(int(layer.state.stages[seed_id]))
    if held is None or held[0].spec.kind != "affine":
        return "only affine blueprints fold into a weight"
    if stage is not SeedLifecycle.FOSSILIZED:
        return f"it is in {stage.name}, and only FOSSILIZED seeds fold"
    if not isinstance(layer.base, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return f"a {type(layer.base).__name__} has no weight to fold into"
    if is_parametrized(layer.base):
        return "its base's weight is computed by a parametrization"
    if any(uses[id(p)] > 2 for p in layer.base.parameters()):  # its base's and its layer's
        return "its base's weight is tied to another module's"
    if not all(bool(t.isfinite().all()) for t in held[0].slot_tensors(held[1]).values()):
        return "its blueprint holds NaN or Inf"
    return None


@torch.no_grad()
def _fold(layer: KasminaLayer) -> None:
    """Scale rows of the weight, shift the bias.

    ``y + alpha (s y + t - y)`` is ``(1 + alpha (s - 1)) y + alpha t``.
    """
    for chunk, scale, shift in _affine_seeds(layer):
        base: Any = layer.base  # a Linear or a convolution: _why_not_folded lets no other through
        weight, bias = base.weight, base.bias
        if bias is None:
            bias = torch.zeros(layer.chunks.layer_dim, dtype=weight.dtype, device=weight.device)
            base.bias = nn.Parameter(bias)
        weight[chunk] *= scale.view(-1, *[1] * (weight.dim() - 1))
        base.bias[chunk] = bias[chunk] * scale + shift


def _affine_seeds(layer: KasminaLayer) -> Iterator[tuple[slice, Tensor, Tensor]]:
    for seed_id in layer.state.blended.nonzero().flatten().tolist():
        held = layer.bank_of(seed_id)
        if held is not None:
            tensors, seed = held[0].slot_tensors(held[1]), layer.seeds[seed_id]
            yield seed.chunk, 1 + seed.alpha * (tensors["scale"] - 1), seed.alpha * tensors["shift"]

"""Whole models: every target gets seeds, or loses them again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal, TypeVar, overload

from torch import nn

from kasmina_fx._torch.distributed import announce_seed, leave_to_all, leave_to_each_rank
from kasmina_fx._torch.dynamo import compile_whole, static_below, uncompiled
from kasmina_fx._torch.inductor import mode_options
from kasmina_fx.arguments import check_count, check_instance
from kasmina_fx.backend import kasmina, split_options
from kasmina_fx.bases import fast_paths
from kasmina_fx.checkpoint import model_state_dict
from kasmina_fx.class_swap import SwappedLayer, swap_in, swap_out
from kasmina_fx.config import SeedConfig, TelemetryPolicy
from kasmina_fx.errors import InvalidType, StillGrowing, shown
from kasmina_fx.layer import KasminaLayer
from kasmina_fx.model import kasmina_layers, parameter_uses, seed_buffers
from kasmina_fx.seeds import model_call
from kasmina_fx.seeds.folding import fold_seeds, why_not_folded
from kasmina_fx.seeds.siblings import Siblings
from kasmina_fx.seeds.store import SeedStore
from kasmina_fx.targets import (
    SeedCounts,
    TargetReport,
    check_counts,
    checked_targets,
    find_targets,
    keep_targets,
    none_found,
    targets_of,
)

M = TypeVar("M", bound=nn.Module)
_LOG: Final = logging.getLogger(__name__)


@overload
def kasminify(
    model: M,
    *,
    num_seeds: SeedCounts = ...,
    targets: Sequence[type[nn.Module]] = ...,
    filter_fn: Callable[[nn.Module, str], bool] | None = ...,
    reserve: int = ...,
    telemetry: bool | TelemetryPolicy = ...,
    config: SeedConfig | None = ...,
    compile: bool = ...,
    mode: str | None = ...,
    options: Mapping[str, Any] | None = ...,
    dynamic: bool | None = ...,
    compare_ranks: bool = ...,
    dry_run: Literal[False] = ...,
) -> M: ...
@overload
def kasminify(  # the same, but for what it returns
    model: nn.Module,
    *,
    num_seeds: SeedCounts = ...,
    targets: Sequence[type[nn.Module]] = ...,
    filter_fn: Callable[[nn.Module, str], bool] | None = ...,
    reserve: int = ...,
    telemetry: bool | TelemetryPolicy = ...,
    config: SeedConfig | None = ...,
    compile: bool = ...,
    mode: str | None = ...,
    options: Mapping[str, Any] | None = ...,
    dynamic: bool | None = ...,
    compare_ranks: bool = ...,
    dry_run: Literal[True],
) -> TargetReport: ...
def kasminify(
    model: M,
    *,
    num_seeds: SeedCounts = None,
    targets: Sequence[type[nn.Module]] = (nn.Linear,),
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    reserve: int = 0,
    telemetry: bool | TelemetryPolicy = True,
    config: SeedConfig | None = None,
    compile: bool = True,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    compare_ranks: bool = True,
    dry_run: bool = False,
) -> M | TargetReport:
    """Let a model grow: its targets become layers with seeds, in place.

    Every target becomes a subclass of its own class that is a :class:`KasminaLayer` too. It stays
    the same object: shared and tied modules stay shared; names in the state dict, hooks, device,
    dtype, training flag and ``requires_grad`` stay as they are. Calling it again changes nothing,
    but that a deep copy or an unpickled model, which left compiled code behind, is compiled.

    Args:
        model: Any module; it may be a target itself.
        num_seeds: Seeds a layer, capped at the layer's features; or one number a layer, in the
            order of the model's modules; or a function ``(fqn, module) -> int``. Not given: one for
            each 16 features, at least 1 and at most 1,000: few wide chunks grow better than many
            narrow ones.
        targets: Module types, or subclasses of them.
        filter_fn: ``(module, fqn) -> bool``; takes only those where it is true.
        reserve: Slots a layer to allocate ahead for the default blueprint.
        telemetry: Keep statistics of every chunk; a :class:`TelemetryPolicy` says of how much.
        config: Ramps, embargo and error limit of every layer.
        compile: Call ``model.compile(backend="kasmina")``, which keeps class and state-dict keys.
        mode: Of ``torch.compile``.
        options: Of the backend, see :func:`kasmina_fx.backend.kasmina`.
        dynamic: Of ``torch.compile``.
        compare_ranks: Where ``torch.distributed`` runs several processes, a forward after a change
            of seeds compares them with those of the other ranks, through the store of the process
            group; False: never.
        dry_run: Change nothing, and return what would be taken and what left, and why. (Otherwise
            that is logged, at level INFO.)

    Returns:
        The same model; a :class:`~kasmina_fx.targets.TargetReport` of a dry run.

    Raises:
        NoTargets: Nothing to take; lists the module types seen.
        InvalidArgument, InvalidType, UnknownOption: Before anything changed.

    >>> net = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4))
    >>> net = kasminify(net, num_seeds=16, compile=False)
    >>> list(kasmina_layers(net)), net[0].num_seeds, net[2].num_seeds
    (['0', '2'], 16, 4)
    >>> from kasmina_fx import host_state_dict
    >>> list(host_state_dict(net))
    ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    _check_arguments(model, num_seeds, filter_fn, config, dynamic, compile, dry_run)
    wanted = checked_targets(targets)
    _, patches = split_options(mode, options)
    if patches.get("triton.cudagraphs") and (config is None or config.pad is None):
        config = replace(config or SeedConfig(), pad=True)
    plain: M = uncompiled(model)
    layers = kasmina_layers(plain)
    if layers:
        taken = {name: layer.num_seeds for name, layer in layers.items()}
        if dry_run:
            return targets_of(plain) or TargetReport(taken, {})
        for call in model_call.left_uncompiled(plain) if compile else ():
            call.compiled = _compiled(call.owner, mode, options, dynamic)
        return model
    found = find_targets(plain, wanted, filter_fn)
    if not found.taken:
        raise none_found(plain, wanted, filter_fn is not None, found.left)
    check_count("reserve", reserve)
    report = found.report(num_seeds)
    if dry_run:
        return report
    _LOG.info("%s", report)
    keep_targets(plain, report)
    siblings: Siblings[SeedStore] = Siblings()
    siblings.compares_ranks = compare_ranks
    static = static_below(plain)
    for fqn, count in report.taken.items():
        module = found.taken[fqn]
        layer = swap_in(
            module,
            count,
            layer_id=fqn or "model",
            telemetry=telemetry,
            reserve=reserve,
            config=config,
        )
        layer.kasmina.join(siblings)
        if id(layer) in static:
            layer.kasmina.show_by_key()
    _finish(plain, siblings, compile, mode, options, dynamic)
    return plain


def _finish(
    root: nn.Module,
    siblings: Siblings[SeedStore],
    compile: bool,
    mode: str | None,
    options: Mapping[str, Any] | None,
    dynamic: bool | None,
) -> None:
    """What a model needs around its layers: hooks of its state dict, no fast paths, a call."""
    model_state_dict.attach(root)
    leave_to_each_rank(root, seed_buffers)
    announce_seed()
    fast_paths.turn_off(root, lambda module: isinstance(module, KasminaLayer))
    compiled = _compiled(root, mode, options, dynamic) if compile else None
    model_call.ModelCall(root, siblings, compiled)


def _compiled(
    root: nn.Module, mode: str | None, options: Mapping[str, Any] | None, dynamic: bool | None
) -> Callable[..., Any]:
    """What calls a model through the backend; its first call compiles."""
    given = dict(options or {})
    if mode is not None and given:  # torch.compile takes one of them: spell the mode out
        mode, given = None, mode_options(mode) | given
    return compile_whole(root, backend=kasmina, mode=mode, options=given or None, dynamic=dynamic)


def unkasminify(model: M, *, fold: bool = False) -> M:
    """Back to plain layers with the current weights, in place.

    Args:
        model: A model with KasminaLayers, compiled or not.
        fold: Fold blended seeds into their base's weight; possible where the blueprint is
            ``affine`` or ``lora``, the seed FOSSILIZED and the base a Linear or a convolution.

    Returns:
        The same model, uncompiled (the base, if the model itself is a KasminaLayer made by hand).

    Raises:
        StillGrowing: A blended seed that can't be folded; nothing has changed. For those there is
            :func:`kasmina_fx.finalize`.
    """
    plain: M = uncompiled(model)
    layers = kasmina_layers(plain)
    uses = parameter_uses(plain)
    for name, layer in layers.items():
        for seed_id in layer.state.blended.nonzero().flatten().tolist():
            why = (
                why_not_folded(layer.kasmina, seed_id, uses)
                if fold
                else "pass fold=True if it is affine or lora"
            )
            if why is not None:
                raise StillGrowing(
                    f"{name or 'model'}: seed {seed_id} is blended: {why}; finalize(model) makes a "
                    "plain copy that keeps what any blueprint adds"
                )
    for layer in layers.values():
        fold_seeds(layer.kasmina, layer.state.blended)
    return take_seeds_off(plain)


def take_seeds_off(plain: M) -> M:
    """Make plain layers of all with seeds, in place, whatever these do; return the model."""
    by_hand: dict[nn.Module, nn.Module] = {}
    for layer in kasmina_layers(plain).values():
        layer.siblings.discard(layer.kasmina)
        if isinstance(layer, SwappedLayer):
            swap_out(layer)
        else:
            by_hand[layer] = layer.base
    model_call.remove(plain)
    leave_to_all(plain)
    keep_targets(plain, None)
    root = _replace(plain, by_hand)
    fast_paths.turn_on(root)
    return root


def _check_arguments(
    model: Any,
    num_seeds: Any,
    filter_fn: Any,
    config: Any,
    dynamic: Any,
    compile: Any,
    dry_run: Any,
) -> None:
    if not isinstance(model, nn.Module):
        raise InvalidType(f"kasminify({shown(model)}): give an nn.Module")
    check_counts(num_seeds)
    if filter_fn is not None and not callable(filter_fn):
        raise InvalidType(f"filter_fn={shown(filter_fn)}: give a function (module, fqn) -> bool")
    if config is not None:
        check_instance("config", config, SeedConfig)
    for name, given in (("compile", compile), ("dry_run", dry_run)):
        if not isinstance(given, bool):
            raise InvalidType(f"{name}={shown(given)}: give True or False")
    if dynamic not in (None, True, False):
        raise InvalidType(f"dynamic={shown(dynamic)}: give True, False or None")


def _replace(root: M, replacements: Mapping[nn.Module, nn.Module]) -> M:
    """Put bases in place of the layers that were made by hand around them, wherever they occur."""
    if root in replacements:
        return replacements[root]  # type: ignore[return-value]  # the base was the model
    for owner in list(root.modules()):
        for name, child in owner._modules.items():
            if child is not None and child in replacements:
                owner._modules[name] = replacements[child]
    return root

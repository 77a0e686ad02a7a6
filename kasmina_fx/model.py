"""Calls for all layers of a model at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from kasmina_fx._torch.dynamo import uncompiled
from kasmina_fx.arguments import check_instance
from kasmina_fx.errors import NoTargets
from kasmina_fx.layer import KasminaLayer
from kasmina_fx.seeds.entry_names import OWN
from kasmina_fx.seeds.model_call import look_at_registered
from kasmina_fx.transactions.threads import ModelThreads, refuse_inside_forward


@contextmanager
def transaction(model: nn.Module) -> Iterator[None]:
    """Changes of many layers become visible together, at the end; an exception undoes them all.

    No forward of a kasminified model runs between the publication of the first layer and the last.

    Raises:
        NoTargets: The model has no KasminaLayer.
        InsideForward: Called from inside a forward, or :func:`hold_seeds`.
    """
    layers = layers_of(model)
    refuse_inside_forward()
    threads = threads_of(model)
    with ModelThreads.command(*threads):
        with ExitStack() as staged:
            for layer in layers.values():
                staged.enter_context(layer.transaction())
            yield
            publications = staged.pop_all()
        with ModelThreads.publication(*threads):
            publications.close()


@contextmanager
def hold_seeds(model: nn.Module) -> Iterator[None]:
    """No seed changes inside: other threads' changes wait for the end of the block to show.

    What was written to registered state (by an average of models, say) is taken over before.

    A call of a kasminified model does both by itself. Needed, beside controller threads, only where
    more than such a call must see one state: several calls, parts of the model called one by one, a
    larger model compiled around it, activation checkpointing with its backward. Put the
    optimizer's step behind the block.

    Raises:
        NoTargets: The model has no KasminaLayer.
        InsideForward: By changes that this thread makes inside.
    """
    families = {id(layer.siblings): layer.siblings for layer in layers_of(model).values()}
    with ExitStack() as held:
        for siblings in families.values():
            look_at_registered(siblings)
            siblings.enter()
            held.callback(siblings.leave, compiled=True)  # maybe
        yield


@contextmanager
def unobserved(model: nn.Module) -> Iterator[None]:
    """No layer keeps statistics inside: what passes through has no say in which seeds are sick.

    For held-out batches, and for graphs without the arithmetic of statistics. What each layer's
    ``telemetry_enabled`` was before, it is again behind the block. It is compiled in: the first use
    of a compiled model inside costs a compile, later ones find that graph.

    Args:
        model: Kasminified; or one of its layers.

    Raises:
        NoTargets: The model has no KasminaLayer.
    """
    before = [(layer, layer.telemetry_enabled) for layer in layers_of(model).values()]
    try:
        for layer, _ in before:
            layer.telemetry_enabled = False
        yield
    finally:
        for layer, enabled in before:
            layer.telemetry_enabled = enabled


def step_epoch(model: nn.Module) -> None:
    """:meth:`KasminaLayer.step_epoch` of every layer.

    Raises:
        NoTargets: The model has no KasminaLayer.
    """
    for layer in layers_of(model).values():
        layer.step_epoch()


def follow_scaler(model: nn.Module, scaler: torch.amp.GradScaler | None) -> None:
    """Tell a model which GradScaler scales its loss; None: no one does.

    Reconstruction losses, which no training loop sees, are then scaled alike, and reports undo the
    scale in ``gradient_rms``, which starts anew with another one. Needed only for their
    first step: a scaler is learnt when it steps an optimizer of the model's, and let go of when
    that is stepped without it; what such losses did to the gradients of that step is dropped.

    Raises:
        NoTargets: The model has no KasminaLayer.
        InvalidType: No GradScaler.
    """
    if scaler is not None:
        check_instance("scaler", scaler, torch.amp.GradScaler)
    layers = list(layers_of(model).values())
    for layer in layers:
        if layer.siblings.loss_scale.scaler is not scaler:
            layer.kasmina.telemetry.forget_gradients()
    for layer in layers:
        layer.siblings.loss_scale.name(scaler)
        layer.publish()


def host_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The plain model's parameters, without those of blueprints.

    For what must not couple the two: ``clip_grad_norm_(host_parameters(model), 1.0)``.

    Raises:
        NoTargets: The model has no KasminaLayer.
    """
    layers = layers_of(model).values()
    blueprints = {id(p) for layer in layers for p in layer.blueprint_parameters(False)}
    return (p for p in uncompiled(model).parameters() if id(p) not in blueprints)


def kasmina_layers(model: nn.Module) -> dict[str, KasminaLayer]:
    """The KasminaLayers of a model, compiled or not, by FQN; a shared layer by its first name."""
    named = uncompiled(model).named_modules()
    return {name: module for name, module in named if isinstance(module, KasminaLayer)}


def seed_buffers(model: nn.Module) -> Iterator[str]:
    """The names of the buffers that seeds added to a model: their state and statistics."""
    for name, module in model.named_modules():
        if isinstance(module, KasminaLayer):
            prefix = f"{name}.{OWN}" if name else OWN
            yield from (prefix + buffer for buffer, _ in module.kasmina.named_buffers())


def host_state_dict(model: nn.Module) -> dict[str, Any]:
    """The plain model's state dict: its keys, and the host's current weights."""
    model = uncompiled(model)
    names = {name for name, m in model.named_modules(remove_duplicate=False) if _is_layer(m)}
    own = tuple(f"{name}.{OWN}" if name else OWN for name in names)
    return {key: value for key, value in model.state_dict().items() if not key.startswith(own)}


def parameter_uses(plain: nn.Module) -> Counter[int]:
    """Count how many modules hold a parameter and how many layers watch it, by its ``id``."""
    uses = Counter(id(p) for owner in plain.modules() for p in owner._parameters.values())
    layers = kasmina_layers(plain).values()
    uses.update(id(p) for layer in layers for p in layer.kasmina.host.parameters())
    return uses


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, KasminaLayer)


def threads_of(model: nn.Module) -> tuple[ModelThreads, ...]:
    """The locks of a model's layers: one for all that were kasminified together."""
    return tuple({layer.siblings.threads for layer in kasmina_layers(model).values()})


def layers_of(model: nn.Module) -> dict[str, KasminaLayer]:
    """The layers of :func:`kasmina_layers`, of which there must be one at least.

    Raises:
        NoTargets: The model has no KasminaLayer.
    """
    layers = kasmina_layers(model)
    if not layers:
        raise NoTargets(f"{type(model).__name__} has no KasminaLayer: call kasminify(model) first")
    return layers

"""What groups of seeds are worth: validation losses with each of them off, in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from kasmina_fx.arguments import check_instance
from kasmina_fx.counterfactuals.groups import SeedGroup, groups_by_layer, masks_of
from kasmina_fx.counterfactuals.off import seeds_off
from kasmina_fx.counterfactuals.report import CounterfactualReport, worth_of
from kasmina_fx.counterfactuals.trunk import Trunk, in_place_of_forward
from kasmina_fx.errors import InvalidArgument, InvalidType, shown
from kasmina_fx.model import layers_of
from kasmina_fx.transactions.threads import refuse_inside_forward

#: One batch, whatever the loss function takes; several are a list or another iterable.
Batch: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]
LossFunction: TypeAlias = Callable[[nn.Module, Any], Tensor | float]


def counterfactual(
    model: nn.Module,
    batches: Batch | Iterable[Any],
    loss_fn: LossFunction,
    groups: Mapping[str, SeedGroup] | None = None,
) -> CounterfactualReport:
    """Validation losses with each group of seeds off, and with all off.

    It runs in evaluation mode and without gradients; afterwards training flags, seeds, statistics,
    parameters and torch's random numbers are as before. Every batch is evaluated with all seeds on,
    once a group, and once with all off, from the same random numbers each time. Seeds are turned
    off by :func:`kasmina_fx.seeds_off`, so that a compiled model compiles nothing but its graph for
    evaluation, where it has none yet. Of an ``nn.Sequential`` that is not compiled, children before
    a group's first layer are run once a batch and not again for each group.

    Args:
        model: With KasminaLayers, compiled or not.
        batches: A batch (a tensor, a tuple or a dict), or an iterable of batches (a list, a
            ``DataLoader``), gone through once.
        loss_fn: ``(model, batch) -> loss``, a number or a tensor ``()``, the mean over the batch;
            batches weigh the same whatever their size.
        groups: Seeds by the name of their group, each as :func:`kasmina_fx.seeds_off` takes them;
            by default one for each layer with blended seeds. For one a seed give
            :func:`kasmina_fx.groups_by_seed`.

    Raises:
        NoTargets: The model has no KasminaLayer.
        InvalidArgument, InvalidType, SeedIndexError: No batch, no such seeds, or a loss that is no
            number.
        InsideForward: Called from inside a forward, or :func:`kasmina_fx.hold_seeds`.

    >>> from kasmina_fx.layer import KasminaLayer
    >>> model = nn.Sequential(KasminaLayer(nn.Linear(8, 8), 2, layer_id="fc"), nn.Linear(8, 1))
    >>> model[0].request_germination([0, 1])
    True
    >>> found = counterfactual(model, torch.randn(4, 8), lambda m, x: m(x).square().mean())
    >>> len(found.groups), found.all_off.worth  # nothing is blended yet
    (0, 0.0)
    """
    if not callable(loss_fn):
        raise InvalidType(f"loss_fn={shown(loss_fn)}: give a function (model, batch) -> loss")
    refuse_inside_forward()
    chosen = groups_by_layer(model) if groups is None else groups
    check_instance("groups", chosen, Mapping)
    first = {name: list(masks_of(model, group)) for name, group in chosen.items()}
    trunk = Trunk.of(model)
    starts = {name: 0 if trunk is None else trunk.first_of(of) for name, of in first.items()}
    all_off = 0 if trunk is None else trunk.first_of(masks_of(model, None))
    on: list[Any] = []
    off: dict[str, list[Any]] = {name: [] for name in chosen}
    none: list[Any] = []
    with _undisturbed(model), in_place_of_forward(model, trunk):
        for batch in _each(batches):
            if trunk is not None:
                trunk.keep()
            on.append(_evaluated(model, batch, loss_fn))
            for name, group in chosen.items():
                if trunk is not None:
                    trunk.start_at(starts[name])
                with seeds_off(model, group):
                    off[name].append(_evaluated(model, batch, loss_fn))
            if trunk is not None:
                trunk.start_at(all_off)
            with seeds_off(model):
                none.append(_evaluated(model, batch, loss_fn))
    if not on:
        raise InvalidArgument(f"batches={shown(batches)}: it holds no batch")
    return _report(_numbers(on), {name: _numbers(each) for name, each in off.items()}, none)


def _report(
    on: list[float], off: Mapping[str, list[float]], none: Sequence[Any]
) -> CounterfactualReport:
    rows = [worth_of(name, losses, on) for name, losses in off.items()]
    rows.sort(key=lambda row: -row.worth)
    return CounterfactualReport(
        tuple(rows), sum(on) / len(on), worth_of("all", _numbers(none), on), len(on)
    )


def _each(batches: Any) -> Iterable[Any]:
    if isinstance(batches, (Tensor, tuple, Mapping)):
        return [batches]
    if isinstance(batches, Iterable):
        return batches
    raise InvalidType(
        f"batches={shown(batches)}: give a tensor, a tuple or a dict, or an iterable of batches"
    )


def _evaluated(model: nn.Module, batch: Any, loss_fn: LossFunction) -> Any:
    """The loss, on whatever device it is: nothing waits for it."""
    with torch.random.fork_rng(_devices(model)):
        loss = loss_fn(model, batch)
    single = isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex()
    if not single and (isinstance(loss, bool) or not isinstance(loss, (int, float))):
        raise InvalidType(f"loss_fn returned {shown(loss)}; it has to return one number")
    return loss.detach().clone() if isinstance(loss, Tensor) else loss


def _numbers(losses: Sequence[Any]) -> list[float]:
    return [float(loss) for loss in losses]


def _devices(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.is_cuda}, key=str)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """In evaluation, without gradients; all that evaluations leave behind is taken back."""
    flags = [(module, module.training) for module in model.modules()]
    observers = [layer.kasmina for layer in layers_of(model).values()]
    kept = [
        (store.telemetry, store.telemetry.accumulated.clone())
        for store in observers
        if store.observed and store.in_eval
    ]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(_devices(model)))
        try:
            model.eval()
            yield
        finally:
            for module, training in flags:
                module.training = training
            for telemetry, before in kept:
                telemetry.accumulated.copy_(before)

"""The call ``sync`` brings an optimizer up to date with a model that grew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kasmina_fx._torch.dynamo import uncompiled
from kasmina_fx.arguments import check_count
from kasmina_fx.banks.stack import StackedParameter
from kasmina_fx.errors import InvalidType, NoTargets
from kasmina_fx.layer import KasminaLayer
from kasmina_fx.model import kasmina_layers, threads_of
from kasmina_fx.optim import state
from kasmina_fx.optim.follower import OptimizerFollower, follower_of


@dataclass(frozen=True)
class Carried:
    """A stack that took the place of a smaller one.

    Attributes:
        name: In the model; of a stack of another model, its bank.
        group: Index of the parameter group.
        before: Slots at the sync before.
        now: Slots.
    """

    name: str
    group: int
    before: int
    now: int

    def __str__(self) -> str:
        return f"carried in group {self.group}: {self.name} ({self.before} to {self.now} slots)"


@dataclass(frozen=True)
class Added:
    """A stack that the optimizer did not have.

    Attributes:
        name: In the model.
        group: Index of the parameter group.
        now: Slots.
    """

    name: str
    group: int
    now: int

    def __str__(self) -> str:
        return f"added to group {self.group}: {self.name} ({self.now} slots)"


@dataclass(frozen=True)
class SyncReport:
    """What :func:`sync` did, and what growth did by itself since the sync before.

    Attributes:
        carried: Stacks in the place of smaller ones.
        added: Stacks that the optimizer did not have.
    """

    carried: tuple[Carried, ...]
    added: tuple[Added, ...]

    def __str__(self) -> str:
        lines = [str(change) for change in (*self.carried, *self.added)]
        return "\n".join(lines) or "nothing to carry or add"


@torch.no_grad()
@torch.inference_mode(False)
def sync(
    optimizer: Optimizer,
    model: nn.Module,
    *,
    group: Callable[[str, nn.Parameter], int] | None = None,
) -> SyncReport:
    """Carry an optimizer across the growth of a model; a second call changes nothing.

    Every stack that was outgrown is replaced by the one in its place now, in the same position of
    the same group. Its state keeps the rows of all slots, new rows start empty, and what has no row
    a slot (``step``) is kept. Stacks that the optimizer does not have are added: to the group that
    holds others of their layer, else to the one that holds the layer's base, else to the last.

    Replacing happens by itself too; adding only here. LBFGS keeps one history of all its
    parameters, which can't be carried: make a new one.

    Args:
        optimizer: Any that keeps torch's ``param_groups`` and ``state``; one with a GradScaler too.
        model: Compiled or not.
        group: ``(name in the model, stack) -> index`` of the parameter group that a stack is added
            to.

    Returns:
        What changed.

    Raises:
        InvalidType: Not an optimizer, or not a module.
        NoTargets: The model has no KasminaLayer.
        InvalidArgument: ``group`` gives an index that the optimizer has no group for.
    """
    layers = _checked(optimizer, model)
    follower = follower_of(optimizer)
    with follower.alone(*threads_of(model)):
        follower.replace_grown()
        names = {id(p): name for name, p in uncompiled(model).named_parameters()}
        carried = tuple(_carried(follower, names))
        added = tuple(change for layer in layers for change in _add(optimizer, layer, names, group))
        follower.held()  # which meets those that are new
    return SyncReport(carried, added)


def _checked(optimizer: Any, model: Any) -> list[KasminaLayer]:
    if not isinstance(optimizer, Optimizer):
        raise InvalidType(
            f"a {type(optimizer).__name__} is no torch.optim.Optimizer; of a wrapper, give the "
            "optimizer inside (its .optimizer, as a rule)"
        )
    layers = kasmina_layers(model)
    if not layers:
        raise NoTargets(f"{type(model).__name__} has no KasminaLayer: call kasminify(model) first")
    return list(layers.values())


def _carried(follower: OptimizerFollower, names: dict[int, str]) -> Iterator[Carried]:
    before, follower.carried = follower.carried, {}
    for number, group in enumerate(follower.optimizer.param_groups):
        for stack in group["params"]:
            if type(stack) is StackedParameter and stack in before:
                bank = None if stack.bank is None else stack.bank()
                name = names.get(id(stack), "another model's" if bank is None else bank.key)
                yield Carried(name, number, before[stack], len(stack))


def _add(
    optimizer: Optimizer,
    layer: KasminaLayer,
    names: dict[int, str],
    choose: Callable[[str, nn.Parameter], int] | None,
) -> Iterator[Added]:
    stacks = list(layer.blueprint_parameters())
    missing = [stack for stack in stacks if not state.group_of(optimizer, stack)]
    if not missing:
        return
    groups = optimizer.param_groups
    held = _holding(optimizer, stacks) or _holding(optimizer, layer.kasmina.host.parameters())
    usual = held or groups[-1]
    number = next(i for i, g in enumerate(groups) if g is usual)
    chosen = [number if choose is None else choose(names[id(s)], s) for s in missing]
    for number in chosen:
        check_count("the index that group gave", number, most=len(groups) - 1)
    for stack, number in zip(missing, chosen, strict=True):
        group = groups[number]
        group["params"].append(stack)
        if "param_names" in group:
            group["param_names"].append(names[id(stack)])
        state.start(optimizer, stack, group)
        yield Added(names[id(stack)], number, len(stack))


def _holding(optimizer: Optimizer, parameters: Iterable[Tensor]) -> dict[str, Any]:
    """The first group that holds one of the parameters; an empty one if none does."""
    return next((g for p in parameters if (g := state.group_of(optimizer, p))), {})

"""Optimizers in checkpoints: by name, because a bank of another capacity has new parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from kasmina_fx.checkpoint.optimizer_checks import why_broken
from kasmina_fx.class_swap import SwappedLayer
from kasmina_fx.errors import CheckpointError
from kasmina_fx.optim.compact import CompactParameter
from kasmina_fx.optim.follower import follower_of
from kasmina_fx.seeds.entry_names import OWN


def pack(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """What a checkpoint holds of an optimizer; what seeds may change of it is copied.

    Raises:
        CheckpointError: A parameter is not the model's.
    """
    names, state = names_of(optimizer, model), optimizer.state_dict()
    for group, own in zip(state["param_groups"], names, strict=True):
        for number, name in zip(group["params"], own, strict=True):
            if _is_stack(name) and number in state["state"]:
                state["state"][number] = {
                    key: value.detach().clone() if isinstance(value, Tensor) else value
                    for key, value in state["state"][number].items()
                }
    return {"type": type(optimizer).__qualname__, "names": names, "state": state}


def names_of(optimizer: Optimizer, model: nn.Module) -> list[list[str]]:
    """Names in the model of each group's parameters."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    compacted = any(isinstance(parameter, CompactParameter) for parameter in given)
    # A stack that another thread grew is replaced at the end of the step under way.
    outgrown = any(getattr(parameter, "successor", None) is not None for parameter in given)
    if compacted or (outgrown and follower_of(optimizer).steps_elsewhere()):
        raise CheckpointError(
            f"the {type(optimizer).__name__} is in the middle of a step: save it from the thread "
            "that steps it, or between its steps"
        )
    strangers = sum(id(parameter) not in known for parameter in given)
    if strangers:
        raise CheckpointError(
            f"{strangers} of the optimizer's {len(given)} parameters are not the model's. If they "
            "are of banks that have grown, call kasmina_fx.optim.sync(optimizer, model) first"
        )
    return [[known[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def matched(
    optimizer: Optimizer, model: nn.Module, contents: Mapping[str, Any], path: str
) -> list[list[str]]:
    """Names of each group's parameters once the model is loaded, those that were saved first."""
    if contents["optimizer"] is None:
        raise CheckpointError(f"{path} holds no optimizer: load the model alone")
    kind, saved = _saved_groups(contents["optimizer"], path)
    saved_names = saved
    saved = [[_name_now(name, model) for name in names] for names in saved]
    given, now = type(optimizer).__qualname__, names_of(optimizer, model)
    if kind != given or len(saved) != len(now):
        raise CheckpointError(
            f"{path} holds a {kind} with {len(saved)} parameter groups; the optimizer is a {given} "
            f"with {len(now)}. Build it in the same way"
        )
    groups = []
    for theirs, ours in zip(saved, now, strict=True):
        gained, lost = set(theirs).difference(ours), set(ours).difference(theirs)
        fixed = sorted(name for name in gained | lost if not _is_stack(name))
        if fixed or not gained <= contents["model"].keys():
            raise CheckpointError(
                f"{path}: the optimizer was saved with other parameters: "
                f"{(fixed or sorted(gained))[:4]}. Build its groups in the same way"
            )
        groups.append([*theirs, *(name for name in ours if name in lost)])
    shapes = {n: tuple(t.shape) for n, t in contents["model"].items() if isinstance(t, Tensor)}
    renamed = {**contents["optimizer"], "names": saved_names}
    why = why_broken(optimizer, renamed, shapes)
    if why is not None:
        raise CheckpointError(f"{path}: the optimizer's state could not go on: {why}")
    twice = [name for name, n in Counter(name for g in groups for name in g).items() if n > 1]
    if twice:
        raise CheckpointError(f"{path}: the optimizer was saved with {twice[:4]} in another group")
    return groups


def _saved_groups(packed: dict[str, Any], path: str) -> tuple[str, list[list[str]]]:
    try:
        kind, groups, state = packed["type"], packed["names"], packed["state"]
        sizes = [len(group["params"]) for group in state["param_groups"]]
        whole = sizes == [len(names) for names in groups] and isinstance(state["state"], dict)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: a malformed optimizer: {error!r}") from error
    if not whole:
        raise CheckpointError(f"{path}: a malformed optimizer: names and groups don't match")
    return kind, groups


def _name_now(name: str, model: nn.Module) -> str:
    """The name of a parameter that was saved when layers in place were layers around a base."""
    for fqn, module in model.named_modules(remove_duplicate=False):
        before = f"{fqn}.base.".removeprefix(".")
        if isinstance(module, SwappedLayer) and name.startswith(before):
            return f"{fqn}.{name.removeprefix(before)}".removeprefix(".")
    return name


def _is_stack(name: str) -> bool:
    return f".{OWN}banks." in f".{name}"


def load(
    optimizer: Optimizer, model: nn.Module, state: dict[str, Any], groups: list[list[str]]
) -> None:
    """Load a state that was saved, into groups of the parameters that :func:`matched` named."""
    parameters = dict(model.named_parameters())
    for group, saved, names in zip(
        optimizer.param_groups, state["param_groups"], groups, strict=True
    ):
        group["params"][:] = [parameters[name] for name in names]
        # Stacks that only this model has keep their state. An id may be anything: here, the name.
        more = names[len(saved["params"]) :]
        saved["params"] = [*saved["params"], *more]
        state["state"] |= {n: own for n in more if (own := optimizer.state.get(parameters[n]))}
        if "param_names" in group or "param_names" in saved:
            group["param_names"] = saved["param_names"] = names
    optimizer.load_state_dict(state)

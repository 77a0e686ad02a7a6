"""Which modules of a model get seeds, and why each of the others does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from torch import nn

from kasmina_fx._torch.dynamo import uncompiled
from kasmina_fx.bases.features import find_features
from kasmina_fx.bases.probing import why_no_features
from kasmina_fx.class_swap import why_not
from kasmina_fx.errors import InvalidArgument


@dataclass(frozen=True)
class TargetReport:
    """What :func:`kasmina_fx.kasminify` takes of a model, and what it leaves.

    Attributes:
        taken: Seeds of each layer, by FQN.
        left: The reason, by FQN, for every other module that has parameters of its own.
    """

    taken: dict[str, int]
    left: dict[str, str]

    def __str__(self) -> str:
        """A line a module."""
        lines = [f"{name or '(model)'}: {seeds} seeds" for name, seeds in self.taken.items()]
        lines += [f"{name or '(model)'}: left: {why}" for name, why in self.left.items()]
        return "\n".join(lines)


#: Where a model keeps the report of what was taken of it.
_KEPT: Final = "_kasmina_targets"


def keep_targets(model: nn.Module, report: TargetReport | None) -> None:
    """Let a model remember what was taken of it; None: forget."""
    model.__dict__.pop(_KEPT, None)
    if report is not None:
        model.__dict__[_KEPT] = report


def targets_of(model: nn.Module) -> TargetReport | None:
    """Return what was taken of a model, or None if nobody asked."""
    report: TargetReport | None = model.__dict__.get(_KEPT)
    return report


@dataclass(frozen=True)
class Targets:
    """The modules of a model that get seeds, by FQN, and why others don't."""

    taken: dict[str, nn.Module]
    left: dict[str, str]

    def report(self, num_seeds: int) -> TargetReport:
        """Say how many seeds each gets, where ``num_seeds`` are asked for."""
        counts = {
            name: min(num_seeds, find_features(module, None, None).count)
            for name, module in self.taken.items()
        }
        return TargetReport(counts, dict(self.left))


def find_targets(
    model: nn.Module,
    kinds: Sequence[type[nn.Module]],
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> Targets:
    """Find the targets of a model; changes nothing.

    Raises:
        InvalidArgument: One of them can't have seeds; says which, and why.
    """
    skipped = dict(skipped_targets(model, kinds))
    taken: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    modules: dict[str, nn.Module] = dict(model.named_modules())
    for name, module in modules.items():
        above = next((t for t in taken if name.startswith(f"{t}." if t else "")), None)
        if above is not None:
            left[name] = f"it is inside of {above or 'the model'}, which has seeds"
        elif not isinstance(module, tuple(kinds)):
            left[name] = f"a {type(module).__name__} is none of the targets"
        elif name in skipped:
            left[name] = skipped[name]
        elif filter_fn is not None and not filter_fn(module, name):
            left[name] = "filter_fn says no"
        else:
            taken[name] = module
            reason = why_not(module) or why_no_features(module)
            if reason is not None:
                raise InvalidArgument(f"{name or 'model'}: {reason}; filter_fn can leave it out")
    own = {name for name, module in modules.items() if module._parameters}
    return Targets(taken, {name: why for name, why in left.items() if name in own})


def skipped_targets(
    model: nn.Module, kinds: Sequence[type[nn.Module]]
) -> Iterator[tuple[str, str]]:
    """Iterate over targets that are left alone, by FQN, and why."""
    for name, owner in uncompiled(model).named_modules():
        prefix = f"{name}." if name else ""
        out = getattr(owner, "out_proj", None)
        if isinstance(owner, nn.MultiheadAttention) and isinstance(out, tuple(kinds)):
            yield f"{prefix}out_proj", "nn.MultiheadAttention reads its weight and never calls it"
        # PEFT's contract for its adapters: the names of the children that hold them.
        for adapter in getattr(owner, "adapter_layer_names", ()):
            inner = getattr(owner, adapter, None)
            if isinstance(inner, nn.Module):
                for path, child in inner.named_modules(prefix=f"{prefix}{adapter}"):
                    if isinstance(child, tuple(kinds)):
                        yield path, f"it is part of an adapter of {name or 'the model'}"

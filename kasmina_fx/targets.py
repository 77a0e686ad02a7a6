"""Which modules of a model get seeds, and why each of the others does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from torch import nn

from kasmina_fx._torch.dynamo import uncompiled
from kasmina_fx.arguments import check_count, is_int
from kasmina_fx.bases.features import find_features
from kasmina_fx.bases.probing import why_no_features
from kasmina_fx.class_swap import why_not
from kasmina_fx.errors import InvalidArgument, InvalidType, NoTargets, shown


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


#: Seeds of each layer: a number, one a layer, a function ``(fqn, module) -> int``, or the default.
SeedCounts: TypeAlias = int | Sequence[int] | Callable[[str, nn.Module], int] | None
#: By default a chunk has so many features at least, and a layer so many seeds at most. Chunks of
#: one feature cost accuracy, and few wide ones beat many narrow ones.
WIDE_CHUNK: Final = 16
MOST_SEEDS: Final = 1000


def default_num_seeds(features: int) -> int:
    """Return how many seeds a layer of so many features gets unless told otherwise.

    >>> [default_num_seeds(features) for features in (10, 64, 4096, 65536)]
    [1, 4, 256, 1000]
    """
    return min(MOST_SEEDS, max(1, features // WIDE_CHUNK))


def check_counts(num_seeds: object) -> None:
    """Refuse what can't be :data:`SeedCounts`.

    Raises:
        InvalidType: Says what is allowed.
        InvalidArgument: A number below 1.
    """
    if num_seeds is None or callable(num_seeds):
        return
    if is_int(num_seeds):
        check_count("num_seeds", num_seeds, least=1)
    elif not isinstance(num_seeds, Sequence) or isinstance(num_seeds, str | bytes):
        raise InvalidType(
            f"num_seeds={shown(num_seeds)}: give an int, one for each layer, or a function "
            "(fqn, module) -> int"
        )


@dataclass(frozen=True)
class Targets:
    """The modules of a model that get seeds, by FQN, and why others don't."""

    taken: dict[str, nn.Module]
    left: dict[str, str]

    def report(self, num_seeds: SeedCounts) -> TargetReport:
        """Say how many seeds each gets, where so many are asked for.

        Raises:
            InvalidArgument: Not a number for each target, or one that is no count.
        """
        asked = self._asked(num_seeds)
        counts = {}
        for name, module in self.taken.items():
            features = find_features(module, None, None).count
            counts[name] = min(asked.get(name, default_num_seeds(features)), features)
        return TargetReport(counts, dict(self.left))

    def _asked(self, num_seeds: SeedCounts) -> dict[str, int]:
        if num_seeds is None:
            return {}
        if callable(num_seeds):
            found = {name: num_seeds(name, module) for name, module in self.taken.items()}
        elif isinstance(num_seeds, int):
            found = dict.fromkeys(self.taken, num_seeds)
        else:
            given = list(num_seeds)
            if len(given) != len(self.taken):
                raise InvalidArgument(
                    f"num_seeds holds {len(given)} numbers, and {len(self.taken)} modules get "
                    f"seeds: {', '.join(self.taken)}; give one number, or one for each"
                )
            found = dict(zip(self.taken, given, strict=True))
        for name, count in found.items():
            check_count(f"num_seeds of {name or 'the model'}", count, least=1)
        return found


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


def checked_targets(targets: Any) -> tuple[type[nn.Module], ...]:
    """Return the classes of targets.

    Raises:
        InvalidType: What is given is no class of modules, and no iterable of such.
    """
    given = tuple(targets) if isinstance(targets, Iterable) else (targets,)
    for target in given:
        if not (isinstance(target, type) and issubclass(target, nn.Module)):
            raise InvalidType(f"targets holds {shown(target)}: give nn.Module classes")
    return given


def none_found(
    model: nn.Module, targets: Sequence[type[nn.Module]], filtered: bool, left: Mapping[str, str]
) -> NoTargets:
    """Return the error that says what a model holds, and why targets among it were left alone."""
    seen = sorted({type(module).__name__ for module in model.modules()})
    skipped = {name: left[name] for name, _ in skipped_targets(model, targets) if name in left}
    return NoTargets(
        f"no module to take: targets are {', '.join(t.__name__ for t in targets)}"
        f"{' that pass filter_fn' if filtered else ''}; the model holds {', '.join(seen)}"
        + "".join(f"; {name} is left alone: {why}" for name, why in skipped.items())
    )

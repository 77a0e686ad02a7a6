"""Where a controller lets seeds grow: layers first, then chunks inside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from random import Random
from typing import Any

from torch import Tensor

from kasmina_fx.arguments import check_instance, check_number
from kasmina_fx.controllers.judging import Seed
from kasmina_fx.errors import InvalidArgument, shown
from kasmina_fx.layer import KasminaLayer
from kasmina_fx.lifecycle import SeedLifecycle


def check_places(choose: object, shares: Mapping[str, float] | None, layers: Iterable[str]) -> None:
    """Refuse a way to choose that is none, and shares of layers that are none.

    Raises:
        InvalidArgument, InvalidType: Says which, and what is allowed.
    """
    if choose not in ("layers", "health"):
        raise InvalidArgument(f"choose={shown(choose)}: give 'layers' or 'health'")
    if shares is None:
        return
    check_instance("shares", shares, Mapping)
    known = sorted(layers)
    for name, share in shares.items():
        if name not in known:
            raise InvalidArgument(f"shares: no layer {shown(name)}; the model has {known[:8]}")
        check_number(f"shares[{shown(name)}]", share, least=0)
    if not any(shares.values()):
        raise InvalidArgument(f"shares={shown(shares)}: give one layer at least more than 0")


def free_in(layer: KasminaLayer, blueprint: str | None) -> Tensor:
    """DORMANT seeds whose chunk a blueprint fits: bool ``(S,)`` on the CPU."""
    free = layer.state.stages == SeedLifecycle.DORMANT
    for first, count, _ in layer.chunks.runs:
        free[first : first + count] &= layer.accepts(first, blueprint)
    return free


def by_layer(
    free: Mapping[str, list[int]],
    holding: Mapping[str, int],
    shares: Mapping[str, float] | None,
    random: Random,
) -> Iterator[Seed]:
    """Each next seed is in the layer that has fewest for its share, at a chunk by chance.

    The layer with the least ``(holding + 1) / share`` is next (D'Hondt's method), one by chance
    where several have the same.

    Args:
        free: Seeds that may grow, by layer; all of them come, in the end.
        holding: Seeds of each layer that hold a blueprint.
        shares: Of the layers, in any unit; those without one get none. None: all the same.
        random: What chance is.
    """
    of = dict.fromkeys(free, 1.0) if shares is None else {n: shares.get(n, 0) for n in free}
    places = {name: random.sample(free[name], len(free[name])) for name in free if of[name] > 0}
    held, tie = dict(holding), {name: random.random() for name in places}

    def fullness(name: str) -> tuple[float, float]:
        return (held[name] + 1) / of[name], tie[name]

    while places:
        name = min(places, key=fullness)
        if places[name]:
            yield name, places[name].pop()
            held[name] += 1
        else:
            del places[name]


def by_health(
    free: Mapping[str, list[int]], report: Mapping[str, Mapping[str, Any]]
) -> Iterator[Seed]:
    """The seeds whose chunk has the lowest health first; those without health are left out.

    Args:
        free: Seeds that may grow, by layer.
        report: Of :func:`kasmina_fx.health_report`.
    """
    known = [
        (health, name, seed)
        for name, seeds in free.items()
        for seed, health in zip(seeds, report[name]["health"][seeds].tolist(), strict=True)
        if health == health  # not NaN
    ]
    for _, name, seed in sorted(known):
        yield name, seed

"""How often the cost model takes the lowering that is quickest, or nearly.

    python benchmarks/choice.py --device cpu|cuda [--threads N] [--json PATH]
    python benchmarks/choice.py --fit PATH

Layers of several widths, chunk sizes and blueprints, with a few, half and all of their seeds active
and several numbers of rows, in training and in inference: in each cell every lowering that can is
measured, and the model's choice compared with the quickest. The host is Linear 64 -> features and
GELU, small so that the blend is much of the time; seeds keep statistics, as by default. A time is
that of a whole step (a forward, or a forward and a backward from a fixed gradient), the quickest of
several rounds in turns. With one thread the clock is that thread's own, which others on the machine
hardly spoil. A layer is compiled once for each lowering and mode, with a symbol for its rows, as in
the life of a network that grows; the model is asked in each cell as if it were compiled there.

``--json`` keeps what was measured. ``--fit`` reads such a file, finds the prices for
``kasmina_fx/lowerings/cost.py`` that explain it best, and says how well these would choose.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _timing import Plan, Step, interleave, machine
from torch import Tensor, nn
from torch._dynamo import maybe_mark_dynamic

from kasmina_fx import capture, find_matches, kasmina_layers, kasminify
from kasmina_fx.blueprints.registry import register
from kasmina_fx.lowerings import LOWERINGS, Site, cost, lowering_named
from kasmina_fx.passes import passes_for
from kasmina_fx.passes.choose_lowerings import ChooseLowerings, site_of
from kasmina_fx.passes.infra.matching import Match
from kasmina_fx.passes.infra.metadata import Lowering
from kasmina_fx.physical.layout import ChunkLayout, format_banks, parse_banks
from kasmina_fx.testing import graft

#: A choice is good if its time is at most so many times the best one's.
GOOD = 1.1
INPUTS = 64
HOST, MODES = "host", ("inference", "training")
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
ROWS = {"cpu": (64, 512, 4096, 16384), "cuda": (64, 1024, 16384)}
#: Numbers of an output, at most.
MOST = {"cpu": 2**22, "cuda": 2**26}
PLANS = {"cpu": Plan(5, 0.01, 0.3), "cuda": Plan(5, 0.005, 0.1)}
#: Blueprint (`tanh` is a module of a user's), features, and features of a chunk.
LAYERS = {
    "cpu": (
        ("mlp", 4096, 1), ("mlp", 4096, 4), ("mlp", 1024, 16), ("mlp", 2048, 64),
        ("mlp", 512, 256), ("mlp", 64, 64), ("mlp", 64, 4), ("lora", 256, 4), ("lora", 1024, 256),
        ("affine", 1024, 4), ("bottleneck", 256, 128), ("tanh", 256, 64), ("tanh", 256, 256),
    ),
    "cuda": (
        ("mlp", 4096, 4), ("mlp", 768, 3), ("mlp", 2048, 64), ("mlp", 1024, 256),
        ("lora", 3072, 12), ("affine", 1024, 4), ("bottleneck", 256, 128), ("tanh", 256, 256),
    ),
}  # fmt: skip


class Tanh(nn.Sequential):
    """A module of a user's."""

    def __init__(self, size: int) -> None:
        super().__init__(nn.Linear(size, size), nn.Tanh())


@dataclass(frozen=True)
class Forced(ChooseLowerings):
    """Blends by one lowering, and keeps statistics as "auto" does."""

    blend: str = ""

    def choose(self, match: Match) -> Lowering:
        chosen = super().choose(match)
        return Lowering(self.blend, "forced") if match.is_blend and match.banks else chosen


@dataclass(frozen=True)
class Layer:
    """A layer to measure."""

    kind: str
    features: int
    size: int
    device: str

    @property
    def count(self) -> int:
        return self.features // self.size

    def host(self) -> nn.Module:
        torch.manual_seed(0)
        host = nn.Sequential(nn.Linear(INPUTS, self.features), nn.GELU())
        return host.to(self.device, DTYPES[self.device])

    def model(self, lowering: str) -> nn.Module:
        """A compiled model that blends by this lowering, or the plain host."""
        if lowering == HOST:
            host = self.host()
            host.compile()
            return host
        steps = [
            Forced(blend=lowering) if isinstance(step, ChooseLowerings) else step
            for step in passes_for()
        ]
        return kasminify(self.host(), num_seeds=self.count, options={"passes": steps})

    def random(self, rows: int, columns: int) -> Tensor:
        x = torch.randn(rows, columns, device=self.device).to(DTYPES[self.device])
        maybe_mark_dynamic(x, 0)
        return x

    def site(self, model: nn.Module, rows: int, mode: str) -> Site:
        """What lowerings are asked about."""
        with torch.set_grad_enabled(mode == "training"):
            return site_of(find_matches(capture(model, self.random(rows, INPUTS)))[0])

    def measure(self) -> Iterator[dict[str, Any]]:
        """Yield a cell for each number of seeds and rows, and each mode; none without a choice."""
        torch._dynamo.reset()
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(2)).tolist()
        asked = self.model("matmul")
        self.grow(asked, order[:1])
        site = self.site(asked, 64, "training")
        able = [
            each.name for each in LOWERINGS if not (each.why_not(site) or reason(each.name, site))
        ]
        if len(able) < 2:
            return
        models, done = {name: self.model(name) for name in (HOST, *able)}, 0
        for active in sorted({max(1, self.count // 16), max(1, self.count // 2), self.count}):
            for name, model in models.items():
                if name != HOST:
                    self.grow(model, order[done:active])
            done = active
            for rows in ROWS[self.device]:
                if rows * self.features <= MOST[self.device]:
                    for mode in MODES:
                        yield self.cell(models, active, rows, mode)

    def grow(self, model: nn.Module, seeds: Sequence[int]) -> None:
        (layer,) = kasmina_layers(model).values()
        torch.manual_seed(1)
        graft(layer, list(seeds), self.kind)

    def cell(self, models: dict[str, nn.Module], active: int, rows: int, mode: str) -> Any:
        x, gradient = self.random(rows, INPUTS), self.random(rows, self.features)
        for model in models.values():
            model.train(mode == "training")
        steps = {name: step_of(model, gradient, mode) for name, model in models.items()}
        for step in steps.values():
            step(x)  # may compile
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        samples = interleave(steps, [x], PLANS[self.device], clock)
        site = self.site(next(m for name, m in models.items() if name != HOST), rows, mode)
        return {
            "layer": f"{self.kind} {self.features}/{self.size}",
            "active": active, "rows": rows, "mode": mode, "site": written(site),
            "seconds": {name: min(found.seconds) for name, found in samples.items()},
        }  # fmt: skip


def step_of(model: nn.Module, gradient: Tensor, mode: str) -> Step:
    parameters = list(model.parameters())

    def forward(x: Tensor) -> None:
        with torch.no_grad():
            model(x)

    def training(x: Tensor) -> None:
        model(x).backward(gradient)
        for parameter in parameters:
            parameter.grad = None

    return training if mode == "training" else forward


def written(site: Site) -> dict[str, Any]:
    """What a site is, in numbers and strings."""
    return asdict(site) | {
        "chunks": str(site.chunks),
        "banks": format_banks(site.banks),
        "dtype": str(site.dtype).removeprefix("torch."),
        "device": site.device.type,
        "dtypes": [],
    }


def read(text: dict[str, Any]) -> Site:
    """Undo :func:`written`."""
    changed = {
        "chunks": ChunkLayout.parse(text["chunks"]),
        "banks": parse_banks(text["banks"]),
        "dtype": getattr(torch, text["dtype"]),
        "device": torch.device(text["device"]),
        "sizes": tuple(tuple(map(tuple, shapes)) for shapes in text["sizes"]),
    }
    return Site(**text | changed)


Prediction = Callable[[str, Site], float]


def by_model(name: str, site: Site) -> float:
    return cost.predicted(lowering_named(name), site)


def judge(cells: Sequence[dict[str, Any]], predict: Prediction) -> float:
    """Print how well predictions choose; return the share of cells where that is good."""
    ratios, missed = [], []
    for cell in cells:
        site, times = read(cell["site"]), dict(cell["seconds"])
        host = times.pop(HOST)
        found = [cost.Candidate(n, 1e6 * predict(n, site), reason(n, site)) for n in times]
        times = {each.name: times[each.name] for each in found if each.why_not is None}
        chosen = cost.quickest(found)
        best = min(times, key=lambda name: times[name])
        ratios.append(times[chosen.name] / times[best])
        if ratios[-1] > GOOD:
            told = [
                f"{each.name} {each.microseconds:.0f} {1e6 * (times[each.name] - host):.0f}"
                for each in found
                if each.name in times
            ]
            missed.append(f"{name_of(cell)}: {chosen.name} {ratios[-1]:.2f} of {best}'s ({told})")
    good = sum(ratio <= GOOD for ratio in ratios)
    print("\n".join(missed))
    print(
        f"within {GOOD - 1:.0%} of the quickest: {good} of {len(ratios)} cells; "
        f"mean ratio {statistics.mean(ratios):.3f}, worst {max(ratios):.2f}"
    )
    return good / len(ratios)


def reason(name: str, site: Site) -> str | None:
    return lowering_named(name).why_rather_not(site)


def name_of(cell: dict[str, Any]) -> str:
    return f"{cell['layer']}, {cell['active']} active, {cell['rows']} rows, {cell['mode']}"


Key = tuple[str, bool]


def fit(
    cells: Sequence[dict[str, Any]], width: cost.Width
) -> tuple[dict[Key, cost.Prices], dict[bool, float]]:
    """Find prices that explain what was measured beside the host.

    Relative errors are least, in squares; those of a few are weighed less the larger they are. What
    every lowering of a layer with seeds takes (tables, guards of Dynamo, statistics) is a price of
    its own, which no choice needs.
    """
    prices: dict[Key, cost.Prices] = {}
    common: dict[bool, float] = {}
    for mode in MODES:
        after = mode == "training"
        rows, wanted = [], []
        names = sorted(
            {priced for cell in cells for priced in map(cost.priced_as, lowerings(cell))}
        )
        for cell in (cell for cell in cells if cell["mode"] == mode):
            site, host = read(cell["site"]), cell["seconds"][HOST]
            for name in lowerings(cell):
                seconds, work = cell["seconds"][name], lowering_named(name).work(site)
                units = [unit.of(work, width) for unit in UNITS]
                row = [1.0] + [u * (n == cost.priced_as(name)) for n in names for u in units]
                rows.append([value / seconds for value in row])
                wanted.append(max(0.0, 1 - host / seconds))
        found = not_negative(rows, wanted)
        common[after] = found[0]
        for number, name in enumerate(names):
            prices[name, after] = cost.Prices(*found[1 + 5 * number : 6 + 5 * number])
    return prices, common


def lowerings(cell: dict[str, Any]) -> list[str]:
    return [name for name in cell["seconds"] if name != HOST]


#: Prices of one unit each.
UNITS = [cost.Prices(*(float(i == unit) for i in range(5))) for unit in range(5)]


def not_negative(rows: Sequence[Sequence[float]], wanted: Sequence[float]) -> list[float]:
    """Solve least squares for numbers of at least 0, with less weight for what is far off."""
    matrix, target = torch.tensor(rows, dtype=torch.float64), torch.tensor(wanted).double()
    scale = matrix.norm(dim=0).clamp_min(1e-300)
    matrix, weights = matrix / scale, torch.ones_like(target)
    found = [0.0] * len(scale)
    for _ in range(8):
        weighted = matrix * weights.unsqueeze(1)
        products, sums = (weighted.T @ matrix).tolist(), (weighted.T @ target).tolist()
        for _ in range(2000):
            for i, row in enumerate(products):
                if row[i]:
                    rest = sums[i] - sum(a * b for a, b in zip(row, found, strict=True))
                    found[i] = max(0.0, found[i] + rest / row[i])
        errors = (matrix @ torch.tensor(found, dtype=torch.float64) - target).abs()
        weights = 1 / errors.clamp_min(0.1)
    return [value / by for value, by in zip(found, scale.tolist(), strict=True)]


def show_fit(kept: dict[str, Any]) -> None:
    cells, width = kept["cells"], cost.Width(*kept["width"])
    print("with the prices of the package:")
    judge(cells, lambda name, site: cost.predicted(lowering_named(name), site, width))
    prices, common = fit(cells, width)
    print("\nwith these:")
    for key, found in prices.items():
        print(f'("{key[0]}", {key[1]}): Prices({", ".join(f"{p:.2g}" for p in found)}),')
    print(", ".join(f"{after}: {seconds:.2g}" for after, seconds in common.items()))

    def predict(name: str, site: Site) -> float:
        work, priced = lowering_named(name).work(site), prices[cost.priced_as(name), site.training]
        return common[site.training] + priced.of(work, width)

    judge(cells, predict)
    for key in prices:
        errors = [
            (cell["seconds"][HOST] + predict(name, read(cell["site"]))) / cell["seconds"][name]
            for cell in cells
            for name in lowerings(cell)
            if key == (cost.priced_as(name), cell["mode"] == "training")
        ]
        low, middle, high = statistics.quantiles(errors, n=10)[::4]
        print(f"{key}: predicted / measured {low:.2f}, {middle:.2f}, {high:.2f} (deciles 1, 5, 9)")


def main() -> int:
    parser = argparse.ArgumentParser(description="How often the cost model chooses well.")
    parser.add_argument("--device", choices=tuple(DTYPES))
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything there")
    parser.add_argument("--fit", type=Path, metavar="PATH", help="find prices in such a file")
    args = parser.parse_args()
    if args.fit:
        show_fit(json.loads(args.fit.read_text()))
        return 0
    if args.device is None:
        parser.error("give --device or --fit")
    if args.threads:
        torch.set_num_threads(args.threads)
    began, about = time.perf_counter(), machine(args.device)
    print(", ".join(f"{key} {value}" for key, value in about.items()) + "\n", flush=True)
    register(Tanh, name="tanh")
    cells: list[dict[str, Any]] = []
    # What fell back to eager would be a wrong number: fail instead.
    limits = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, suppress_errors=False)
    for layer in LAYERS[args.device]:
        with limits:
            for cell in Layer(*layer, args.device).measure():
                times = {name: f"{1e6 * seconds:.0f}" for name, seconds in cell["seconds"].items()}
                print(f"{name_of(cell)}: {', '.join(map(' '.join, times.items()))} us", flush=True)
                cells.append(cell)
        gc.collect()
        done = f"[{time.perf_counter() - began:4.0f} s] {' '.join(map(str, layer))}"
        print(done, file=sys.stderr, flush=True)
    if args.json:
        width = cost.width_of(torch.device(args.device))
        kept = {"machine": about, "width": list(width), "cells": cells}
        args.json.write_text(json.dumps(kept) + "\n")
    print()
    judge(cells, by_model)
    print(f"{time.perf_counter() - began:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How often the cost model takes the lowering that is quickest, or nearly.

    python benchmarks/choice.py --device cpu|cuda [--json PATH]
    python benchmarks/choice.py --fit PATH

Layers of several widths, chunk sizes and blueprints, with a few, half and all of their seeds active
and several numbers of rows, in training and in inference: each cell is measured with every lowering
that can, and the model's choice is compared with the quickest. A host is Linear 64 -> features and
GELU, a small one, so that a blend is much of the time; seeds keep statistics, as by default. Times
are those of a whole step (a forward, or a forward and a backward from a fixed gradient), the
quickest of several rounds in turns: others may use the machine. A layer is compiled once for each
lowering and mode, with a symbol for its rows, as in the life of a network that grows.

``--json`` keeps what was measured; ``--fit`` reads such a file, finds the prices that explain it
best, and says how often a model with these would choose well.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _timing import Plan, interleave, machine
from torch import Tensor, nn

from kasmina_fx import capture, find_matches, kasmina_layers, kasminify
from kasmina_fx.blueprints.registry import register
from kasmina_fx.lowerings import LOWERINGS, Site
from kasmina_fx.passes import passes_for
from kasmina_fx.passes.choose_lowerings import ChooseLowerings, site_of
from kasmina_fx.passes.infra.matching import Match
from kasmina_fx.passes.infra.metadata import Lowering
from kasmina_fx.testing import graft

DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
ROWS = {"cpu": (64, 512, 4096, 16384), "cuda": (64, 1024, 16384)}
#: Numbers of an output at most.
MOST = {"cpu": 2**22, "cuda": 2**26}
INPUTS = 64
PLAN = {"cpu": Plan(5, 0.01, 0.4), "cuda": Plan(5, 0.005, 0.1)}
#: Blueprint (`tanh` is a module of a user's), features, features of a chunk.
LAYERS = (
    ("mlp", 4096, 4), ("mlp", 4096, 1), ("mlp", 1024, 16), ("mlp", 4096, 64), ("mlp", 1024, 256),
    ("mlp", 64, 64), ("mlp", 64, 16), ("mlp", 256, 64), ("lora", 4096, 256), ("lora", 1024, 64), ("lora", 256, 4),
    ("affine", 1024, 4), ("affine", 4096, 256), ("bottleneck", 1024, 16), ("bottleneck", 256, 128),
    ("tanh", 1024, 64), ("tanh", 256, 256),
)  # fmt: skip
#: A choice is good if its time is at most so many times the best one's.
GOOD = 1.1
NAMES = [lowering.name for lowering in LOWERINGS]
MODES = ("inference", "training")


class Tanh(nn.Sequential):
    """A module of a user's."""

    def __init__(self, size: int) -> None:
        super().__init__(nn.Linear(size, size), nn.Tanh())


@dataclass(frozen=True)
class Forced(ChooseLowerings):
    """Blends by one lowering; statistics as they are kept with "auto"."""

    blend: str = ""

    def choose(self, match: Match) -> Lowering:
        chosen = super().choose(match)
        return Lowering(self.blend, "forced") if chosen.name in NAMES else chosen


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

    @property
    def actives(self) -> list[int]:
        """How many seeds are a few, half, and all of them."""
        return sorted({max(1, self.count // 16), max(1, self.count // 2), self.count})

    @property
    def rows(self) -> list[int]:
        return [rows for rows in ROWS[self.device] if rows * self.features <= MOST[self.device]]

    def random(self, *size: int) -> Tensor:
        return torch.randn(*size, device=self.device).to(DTYPES[self.device])

    def inputs(self, rows: int) -> Tensor:
        x = self.random(rows, INPUTS)
        torch._dynamo.maybe_mark_dynamic(x, 0)
        return x

    def model(self, lowering: str) -> nn.Module:
        """A compiled model that blends by this lowering."""
        steps = [
            Forced(blend=lowering) if isinstance(step, ChooseLowerings) else step
            for step in passes_for()
        ]
        torch.manual_seed(0)
        host = nn.Sequential(nn.Linear(INPUTS, self.features), nn.GELU())
        host = host.to(self.device, DTYPES[self.device])
        return kasminify(host, num_seeds=self.count, options={"passes": steps})

    def site(self, model: nn.Module, rows: int, mode: str) -> Site:
        """What lowerings are asked about."""
        with torch.set_grad_enabled(mode == "training"):
            (match, *_) = find_matches(capture(model, self.inputs(rows)))
            return site_of(match)

    def measure(self) -> Iterator[dict[str, Any]]:
        """Yield a cell for each number of seeds and rows, and each mode."""
        torch._dynamo.reset()
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(2)).tolist()
        first = self.model("matmul")
        grow(first, order[:1], self.kind)
        site = self.site(first, 64, "training")
        models = {each.name: self.model(each.name) for each in LOWERINGS if not each.why_not(site)}
        done = 0
        for active in self.actives:
            for model in models.values():
                grow(model, order[done:active], self.kind)
            done = active
            for rows in self.rows:
                for mode in MODES:
                    yield self.cell(models, active, rows, mode)

    def cell(self, models: dict[str, nn.Module], active: int, rows: int, mode: str) -> Any:
        x, grad = self.inputs(rows), self.random(rows, self.features)
        steps = {name: step_of(model.train(mode == "training"), grad, mode) for name, model in models.items()}
        began = time.perf_counter()
        for step in steps.values():
            step(x)  # may compile
        first = time.perf_counter() - began
        samples = interleave(steps, [x], PLAN[self.device])
        site = self.site(models["matmul"], rows, mode)
        return {
            "kind": self.kind, "features": self.features, "size": self.size, "active": active,
            "rows": rows, "mode": mode, "site": site, "compiling": first,
            "seconds": {name: min(found.seconds) for name, found in samples.items()},
        }  # fmt: skip


def grow(model: nn.Module, seeds: Sequence[int], kind: str) -> None:
    (layer,) = kasmina_layers(model).values()
    torch.manual_seed(1)
    graft(layer, list(seeds), kind)


def step_of(model: nn.Module, grad: Tensor, mode: str) -> Any:
    parameters = list(model.parameters())

    def forward(x: Tensor) -> None:
        with torch.no_grad():
            model(x)

    def training(x: Tensor) -> None:
        model(x).backward(grad)
        for parameter in parameters:
            parameter.grad = None

    return training if mode == "training" else forward


def main() -> int:
    parser = argparse.ArgumentParser(description="How often the cost model chooses well.")
    parser.add_argument("--device", choices=tuple(DTYPES))
    parser.add_argument("--only", help="layers of this blueprint alone")
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything there")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(", ".join(f"{key} {value}" for key, value in machine(args.device).items()) + "\n")
    began = time.perf_counter()
    register(Tanh, name="tanh")
    kept = []
    for kind, features, size in LAYERS:
        if args.only not in (None, kind): continue
        for cell in Layer(kind, features, size, args.device).measure():
            times = "  ".join(f"{n} {t * 1e6:8.0f}" for n, t in cell["seconds"].items())
            print(f"[{time.perf_counter() - began:4.0f}] {kind:10} {features:5} {size:4} {cell['active']:5} {cell['rows']:6} {cell['mode']:9} {cell['compiling']:5.1f} {times}", flush=True)
            kept.append(cell)
        gc.collect()
    if args.json:
        import pickle
        pickle.dump(kept, open(args.json, "wb"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a finished network costs in evaluation: one layer, folded and not.

    python benchmarks/folded.py [--device cpu|cuda]

Linear and GELU with 1,024 seeds, all FOSSILIZED, in a batch of rows and of one row. Ratios are to
the plain compiled host, in the same rounds: "again" is another such host, "dormant" a kasminified
one of which no seed ever grew, "folded" a finished model, "blended" the same one in which the last
seed is still in FINE_TUNING. "fold" is what the first call after a change of the weight takes
beside later ones, and "copies" what is held beside the weight.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from _contenders import Shape
from _timing import Plan, interleave, machine
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

from kasmina_fx import SeedLifecycle, kasminify
from kasmina_fx.seeds.folded import ENOUGH
from kasmina_fx.testing import graft

SEEDS, KINDS = 1024, ("affine", "lora")
COLUMNS = ("again", "dormant", "folded", "blended")
SIZES = {"cpu": (512, 1024, torch.float32), "cuda": (16384, 4096, torch.bfloat16)}
PLANS = {"cpu": Plan(15, 0.1, 3.0), "cuda": Plan(15, 0.02, 0.5)}


def grown(shape: Shape, kind: str, last: SeedLifecycle) -> Any:
    """The model with small blueprints of its own in every seed."""
    model = kasminify(shape.host(), num_seeds=SEEDS).eval()
    layer: Any = model[0]
    torch.manual_seed(1)
    graft(layer, range(SEEDS - 1), kind, 0.5, SeedLifecycle.FOSSILIZED)
    graft(layer, [SEEDS - 1], kind, 0.5, last)
    with torch.no_grad():
        for stack in layer.blueprint_parameters(False):
            stack.add_(0.1 * torch.randn_like(stack))
    return model


def to_fold(model: Any, x: Tensor, shape: Shape) -> float:
    """Seconds that a first call after a write to the weight takes longer than a later one."""

    def seconds() -> float:
        if shape.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        model(x)
        if shape.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    taken = []
    for _ in range(7):
        for _ in range(ENOUGH):  # or copies would not be worth making
            model(x)
        model[0].weight.mul_(1.0)
        taken.append(seconds() - seconds())
    return statistics.median(taken)


def measure(shape: Shape, kind: str, plan: Plan) -> str:
    torch._dynamo.reset()
    # Two, each with a weight of its own: one that is read twice in a row is in a cache.
    models = {name: torch.compile(shape.host().eval()) for name in ("host", "again")}
    models["dormant"] = kasminify(shape.host(), num_seeds=SEEDS).eval()
    models["folded"] = grown(shape, kind, SeedLifecycle.FOSSILIZED)
    models["blended"] = grown(shape, kind, SeedLifecycle.FINE_TUNING)
    inputs = [shape.random(shape.rows, shape.inputs) for _ in range(3)]

    def step(model: nn.Module) -> Any:
        def call(x: Tensor) -> None:
            model(x)

        return call

    folded: Any = models["folded"]
    outs = {name: model(inputs[0]).float() for name, model in models.items()}
    error = (outs["folded"] - outs["blended"]).norm() / outs["blended"].norm()
    assert float(error) < (1e-5 if shape.dtype == torch.float32 else 1e-2), error
    held = folded[0].kasmina.folded
    assert held is not None
    found = interleave({name: step(model) for name, model in models.items()}, inputs, plan)
    beside = {name: samples.beside(found["host"]) for name, samples in found.items()}
    ratios = " | ".join(f"{beside[name]['ratio']:.2f}" for name in COLUMNS)
    fold = 1e3 * to_fold(folded, inputs[0], shape)
    return (
        f"| {kind} | {shape.rows:,} | {beside['host']['ms']:.3f} | {ratios} | {fold:.1f} | "
        f"{held.nbytes / 2**20:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="What a finished network costs in evaluation.")
    parser.add_argument("--device", choices=tuple(SIZES), default="cpu")
    device = parser.parse_args().device
    print(", ".join(f"{key} {value}" for key, value in machine(device).items()))
    print(
        "| blueprint | rows | host ms | again | dormant | folded | blended | fold ms | copies MiB |"
    )
    print("|---|" + "---:|" * 8)
    rows, inputs, dtype = SIZES[device]
    with fresh_cache(), torch.no_grad():
        for kind in KINDS:
            for many in (rows, 1):
                shape = Shape(many, inputs, 4096, dtype, device)
                print(measure(shape, kind, PLANS[device]), flush=True)


if __name__ == "__main__":
    main()

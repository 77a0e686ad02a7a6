"""What the structure of the code costs: optimizer hooks, and passes on a deep model.

    python benchmarks/structure.py

Prints, as ratios within this run,

- a step of AdamW (foreach) over 48 layers with 4 stacks each, with the package's hooks and without,
  while the stacks learn and while they are frozen; and of a plain model beside;
- ``run_passes`` on graphs of 48 layers once their templates are traced.
"""

from __future__ import annotations

import copy
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

import kasmina_fx
from kasmina_fx import SeedLifecycle, capture, kasmina_layers, kasminify
from kasmina_fx.passes import run_passes
from kasmina_fx.testing import graft

LAYERS, FEATURES, SEEDS, ACTIVE = 48, 256, 32, 8


def deep(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Linear(FEATURES, FEATURES) for _ in range(LAYERS)))
    return kasminify(plain, num_seeds=SEEDS, compile=False, **options)


def median_ms(call: Callable[[], object], times: int = 60) -> float:
    for _ in range(5):
        call()
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return 1e3 * statistics.median(taken)


@contextmanager
def no_hooks() -> Any:
    hooks = (
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    kept = [copy.copy(h) for h in hooks]
    for h in hooks:
        h.clear()
    try:
        yield
    finally:
        for h, before in zip(hooks, kept, strict=True):
            h.update(before)


def step_of(model: nn.Module) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return optimizer.step


def hooks() -> None:
    print(f"\nAdamW(foreach=True).step(), {LAYERS} layers, mlp in each: 4 stacks a layer")
    for name, stage in (("learn", SeedLifecycle.GRAFTING), ("frozen", SeedLifecycle.FOSSILIZED)):
        model = deep()
        with kasmina_fx.transaction(model):
            for layer in kasmina_layers(model).values():
                graft(layer, range(ACTIVE), "mlp", stage=stage)
        report(f"{ACTIVE} of {ACTIVE} slots {name}", step_of(model))
    report(
        "a plain model, no stacks", step_of(nn.Sequential(*(nn.Linear(64, 64) for _ in range(144))))
    )


def report(name: str, step: Callable[[], object]) -> None:
    pairs = []
    for _ in range(5):
        with_hooks = median_ms(step, 20)
        with no_hooks():
            pairs.append((with_hooks, median_ms(step, 20)))
    ratio = statistics.median(a / b for a, b in pairs)
    a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"  {name:28} {a:7.2f} ms with hooks, {b:7.2f} without: {ratio:.3f}")


def passes() -> None:
    print(f"\nrun_passes, {LAYERS} layers, templates traced before")
    x = torch.randn(16, FEATURES)
    for name, grow, telemetry in (
        ("dormant", False, False),
        ("dormant, telemetry", False, True),
        ("growing", True, False),
        ("growing, telemetry", True, True),
    ):
        model = deep(telemetry=telemetry)
        if grow:
            graft(kasmina_layers(model)["0"], [0, 1], "mlp")
        run_passes(capture(model, x))
        taken = []
        for _ in range(3):
            gm = capture(model, x)
            before = len(gm.graph.nodes)
            began = time.perf_counter()
            run_passes(gm)
            taken.append(1e3 * (time.perf_counter() - began))
        print(f"  {name:28} {min(taken):7.0f} ms, {before} nodes to {len(gm.graph.nodes)}")


def main() -> None:
    torch.set_num_threads(1)
    machine = f"Python {platform.python_version()}, {platform.machine()}, 1 thread"
    print(f"torch {torch.__version__}, {machine}")
    hooks()
    passes()


if __name__ == "__main__":
    main()

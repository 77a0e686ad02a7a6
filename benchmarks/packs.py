"""What switching packs takes, and what it takes if each sample of a batch names its pack.

    python benchmarks/packs.py [--device cpu|cuda]

A host of Linear and ReLU, frozen, whose hidden layers have seeds of 64 features each, all with a
`bottleneck` of their own in each of three packs, and an AdamW that has trained them. "activate" is
a switch in a compiled model, "activate, moments" one right after a step of that optimizer, whose
state goes with the pack; "transaction" puts every seed into another stage, which is what any
command does; "rollback" goes back to a snapshot of all layers; "seeds_off" turns all seeds off and
on again. "graphs" counts what all of these compiled. Then a batch each of whose samples names one
of the three packs or the host: by switching for each of the four groups; by
`activate(per_sample=...)` for each batch, and by the model's call alone; beside these the whole
batch through one pack. All are compiled.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _timing import machine
from torch import Tensor, nn

import kasmina_fx
from kasmina_fx import SeedLifecycle, kasmina_layers, kasminify
from kasmina_fx.testing import graft

#: Layers with seeds, their width, and samples in a batch.
SIZES = ((2, 256, 64), (2, 256, 1024), (12, 512, 64))
NAMES: tuple[str | None, ...] = ("a", "b", "c", None)


def with_packs(layers: int, width: int, device: str) -> Any:
    torch.manual_seed(0)
    row = [nn.Linear(width, width) for _ in range(layers)]
    model = nn.Sequential(*itertools.chain(*((fc, nn.ReLU()) for fc in row)), nn.Linear(width, 10))
    model = kasminify(model.to(device), num_seeds=width // 64, filter_fn=lambda m, n: m in row)
    model.requires_grad_(False)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1, device=device))])
    kasmina_fx.optim.follow(optimizer, model)
    x = torch.randn(64, width, device=device)
    mine = kasmina_fx.packs(model)
    for name in ("a", "b", "c"):
        mine.activate(None)
        for layer in kasmina_layers(model).values():
            graft(layer, range(width // 64), "bottleneck", 1.0, SeedLifecycle.FINE_TUNING)
        mine.capture(name)
        train(model, optimizer, x)
    return model, optimizer


def train(model: Any, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def median_ms(call: Callable[[], object], times: int = 9) -> str:
    """Median, least and most of calls that wait for the device; on a CPU the process's time."""
    taken = []
    clock = time.perf_counter if torch.cuda.is_initialized() else time.process_time
    for _ in range(times):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        start = clock()
        call()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        taken.append(1e3 * (clock() - start))
    return f"{statistics.median(taken):.2f} ({min(taken):.2f} to {max(taken):.2f})"


def measure_switches(model: Any, optimizer: torch.optim.Optimizer, width: int) -> list[str]:
    mine, turns = kasmina_fx.packs(model), itertools.cycle("bca")
    x = torch.randn(64, width, device=next(model.parameters()).device)
    layers = list(kasmina_layers(model).values())
    stages = itertools.cycle((SeedLifecycle.EVALUATING, SeedLifecycle.FINE_TUNING))

    def command() -> None:
        stage = next(stages)
        with kasmina_fx.transaction(model):
            for layer in layers:
                layer.state.batch_set_lifecycle_state(range(layer.num_seeds), stage)

    def off() -> None:
        with kasmina_fx.seeds_off(model):
            pass

    kept = [layer.snapshot() for layer in layers]

    def rollback() -> None:
        with kasmina_fx.transaction(model):
            for layer, snapshot in zip(layers, kept, strict=True):
                layer.rollback(snapshot)

    switch = median_ms(lambda: mine.activate(next(turns)))
    moments = []
    for _ in range(9):
        train(model, optimizer, x)
        moments.append(float(median_ms(lambda: mine.activate(next(turns)), 1).split()[0]))
    row = [median_ms(command), switch, f"{statistics.median(moments):.2f}", median_ms(rollback)]
    return [*row, median_ms(off)]


@torch.no_grad()
def measure_samples(model: Any, width: int, samples: int) -> list[str]:
    mine = kasmina_fx.packs(model)
    x = torch.randn(samples, width, device=next(model.parameters()).device)
    names = [NAMES[number % 4] for number in range(samples)]
    groups = {name: [n for n, own in enumerate(names) if own == name] for name in NAMES}
    model.eval()

    def by_groups() -> Tensor:
        out = x.new_empty(samples, 10)
        for name, where in groups.items():
            mine.activate(name)
            out[where] = model(x[where])
        return out

    def each() -> Tensor:
        mine.activate(per_sample=names)
        return model(x)

    mine.activate("a")
    model(x)
    wanted, found = by_groups(), each()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    row = [median_ms(by_groups), median_ms(each), median_ms(lambda: model(x))]
    mine.activate("a")
    row.append(median_ms(lambda: model(x)))
    model.train()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description="What switching packs takes.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = parser.parse_args().device
    torch.set_num_threads(1)  # whose time is the process's
    print(", ".join(f"{key} {value}" for key, value in machine(device).items()))
    switches, mixed = [], []
    for layers, width, samples in SIZES:
        torch._dynamo.reset()
        model, optimizer = with_packs(layers, width, device)
        mine = kasmina_fx.packs(model)
        mine.activate(None)
        start = f"| {layers} x {width} | {mine.nbytes('a') // 4:,} |"
        mine.activate("a")
        before = kasmina_fx.compiles()
        row = measure_switches(model, optimizer, width)
        compiled = kasmina_fx.compiles() - before
        switches.append(f"{start} {' | '.join(row)} | {compiled} |")
        row = measure_samples(model, width, samples)
        mixed.append(f"| {layers} x {width} | {samples} | {' | '.join(row)} |")
    print(
        "\n| layers | parameters of a pack | transaction ms | activate | activate, moments |",
        end="",
    )
    print(" rollback | seeds_off | graphs |\n|---|" + "---:|" * 7)
    print("\n".join(switches))
    print("\n| layers | samples | switched by group ms | per sample | its call | one pack |")
    print("|---|" + "---:|" * 5)
    print("\n".join(mixed))


if __name__ == "__main__":
    main()

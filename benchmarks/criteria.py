"""The plan's own criteria, measured, one line each, with pass or MISS.

    python benchmarks/criteria.py [--device cpu|cuda] [--quick] [--threads N] [--json PATH]

Time and memory: a layer of one seed, and one of 1,024 seeds of which none or one is active,
statistics included, beside the plain compiled layer, and beside the legacy path
(`kasmina_fx.reference`: what HybridKasminaLayer runs in "legacy"). One active seed alone is an
adapter over all features: for the plain layer that is more work, so it is compared with the same
written by hand, too. Ratios are medians of ratios within a round, in which all take turns, with
their quartiles. On a CPU with one thread (the default) times are the CPU's, so that others on the
machine are not in them; with more they are the clock's. Then: how times grow from 10 to 10,000
seeds, what a step waits for, threads that change the same seeds, parity of both implementations.
Four minutes on 2 cores that are free. The exit status is 1 if any criterion is missed.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _contenders as c
import torch
from _findings import Finding, print_head, print_line
from _properties import atomic, parity, syncs
from _report import memory_ratio
from _scaling import scaling
from _timing import Plan, held_bytes, interleave, machine, peak_growth
from overhead import FORWARD, TOLERANCE, TRAINING, distance, make_step, outcome, shapes
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.nn import functional as F

from kasmina_fx import kasminify
from kasmina_fx.testing import graft

#: Largest ratios of time and of memory.
TIME, MEMORY = 1.05, 1.10
PLANS = {"cpu": Plan(15, 0.1, 4.0), "cuda": Plan(25, 0.02, 1.0)}
QUICK = Plan(3, 0.005, 0.1)
#: Name, seeds, active ones, their blueprint, statistics.
CASES = (
    ("one seed, asleep", 1, 0, "lora", True),
    ("one seed, active (lora)", 1, 1, "lora", True),
    ("one seed, active (lora), no statistics", 1, 1, "lora", False),
    ("{n:,} seeds, asleep", 1024, 0, "mlp", True),
    ("{n:,} seeds, one active (mlp)", 1024, 1, "mlp", True),
)


def seeded(
    shape: c.Shape, seeds: int, active: int, kind: str, telemetry: bool, compile: bool = True
) -> c.Contender:
    model: Any = kasminify(shape.host(), num_seeds=seeds, telemetry=telemetry, compile=compile)
    torch.manual_seed(1)
    if active:
        graft(model[0], range(active), kind, c.ALPHA)
    return c.Contender(model, model, model[0].weight, compile)


class ByHand(nn.Module):
    """The plain layer with one blueprint over all of it, as a person writes it."""

    def __init__(self, shape: c.Shape, source: Any) -> None:
        super().__init__()
        self.base = shape.host()[0]
        ((bank, _, stacks),) = c.occupied(source[0])
        self.blueprint = bank.blueprint.module(bank.run.size)
        self.blueprint.load_state_dict({name: stack[0].cpu() for name, stack in stacks.items()})
        self.blueprint.to(shape.device, shape.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return F.gelu(y + c.ALPHA * (self.blueprint(y) - y))


def contenders(
    shape: c.Shape, seeds: int
) -> tuple[dict[str, c.Contender], dict[str, dict[str, str]]]:
    """All that take part, and for each case what it is compared with, by title."""
    everyone, beside = {c.HOST: c.host(shape)}, {}
    everyone[c.HOST_AGAIN] = everyone[c.HOST]
    for text, number, active, kind, telemetry in CASES:
        if (number == 1) != (seeds == 1):
            continue
        name = text.format(n=seeds)
        everyone[name] = seeded(shape, seeds, active, kind, telemetry)
        source: Any = seeded(shape, seeds, active, kind, telemetry, compile=False).module
        everyone[f"{name}, legacy"] = c.reference(source)
        beside[name] = {"the plain layer": c.HOST, "legacy": f"{name}, legacy"}
        if active == seeds:
            model: Any = ByHand(shape, source)
            mine = c.Contender(torch.compile(model), model, model.base.weight, True)
            everyone[f"{name}, by hand"] = mine
            beside[name]["the same by hand, compiled"] = f"{name}, by hand"
    return everyone, beside


def costs(shape: c.Shape, seeds: int, plan: Plan, clock: Callable[[], float]) -> Iterator[Finding]:
    """Time and memory of the cases of one number of seeds (1, or as many as there shall be)."""
    torch._dynamo.reset()
    everyone, beside = contenders(shape, seeds)
    inputs = [shape.random(shape.rows, shape.inputs) for _ in range(3)]
    gradient = shape.random(shape.rows, shape.features)
    require_one_function(everyone, beside, inputs[0], gradient)
    for mode in (FORWARD, TRAINING):
        steps = {name: make_step(one, gradient, mode) for name, one in everyone.items()}
        for step in steps.values():
            step(inputs[0]), step(inputs[0])  # compiles
        samples = interleave(steps, inputs, plan, clock)
        again = samples[c.HOST_AGAIN].beside(samples[c.HOST])
        yield _ratio(f"time, {mode}, the plain layer beside itself", again, None)
        for name, others in beside.items():
            for title, other in others.items():
                found = samples[name].beside(samples[other])
                yield _ratio(f"time, {mode}, {name}, beside {title}", found, TIME)
    held = {name: {"held_bytes": held_bytes(one.module)} for name, one in everyone.items()}
    peaks = {
        name: held[name] | {"peak_bytes": peak_growth(step, inputs[0])}
        for name, step in steps.items()
    }
    for name, others in beside.items():
        for title, other in others.items():
            ratio = memory_ratio(peaks[name], peaks[other])
            shown = "can't be read here" if ratio is None else f"{ratio:.3f}"
            met = None if ratio is None else ratio <= MEMORY
            text = f"memory, training, {name}, beside {title}"
            yield Finding(text, shown, "held and peak, median of 3", f"<= {MEMORY}", met)


def require_one_function(
    everyone: dict[str, c.Contender], beside: dict[str, dict[str, str]], x: Tensor, gradient: Tensor
) -> None:
    """Raise AssertionError unless a case gives what legacy and the one by hand give."""
    for name, others in beside.items():
        mine = outcome(everyone[name], x, gradient, FORWARD)[0]
        for other in others.values():
            if other != c.HOST:
                theirs = outcome(everyone[other], x, gradient, FORWARD)[0]
                apart = distance(mine, theirs)
                assert apart <= TOLERANCE[x.dtype], f"{name} and {other} are {apart} apart"


def _ratio(criterion: str, found: dict[str, Any], most: float | None) -> Finding:
    first, last = found["ratio_quartiles"]
    return Finding(
        criterion,
        f"{found['ratio']:.3f} ({found['ms']:.3g} ms)",
        f"quartiles {first:.3f} to {last:.3f}, {found['rounds']} rounds",
        "noise" if most is None else f"<= {most}",
        None if most is None else found["ratio"] <= most,
    )


def everything(device: str, quick: bool, clock: Callable[[], float]) -> Iterator[Finding]:
    plan, shape, seeds = PLANS[device], shapes(device)[0], 1024
    if quick:
        plan, shape, seeds = QUICK, c.Shape(16, 8, 64, torch.float32, device), 16
    for number in (1, seeds):
        yield from costs(shape, number, plan, clock)
        gc.collect()
    torch._dynamo.reset()
    counts = (10, 40) if quick else (10, 100, 1000, 10000)
    yield from scaling(counts, 64, device, 3 if quick else 15, clock)
    yield from syncs(16 if quick else 64, device)
    yield from atomic(20 if quick else 500, device)
    yield from parity(3 if quick else 50, device)


def main() -> int:
    parser = argparse.ArgumentParser(description="The plan's own criteria, measured.")
    parser.add_argument("--device", choices=tuple(PLANS), default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny: says whether it runs, no more")
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all lines there")
    args = parser.parse_args()
    started = time.perf_counter()
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    one = args.device == "cpu" and args.threads == 1
    clock, named = (time.process_time, "CPU time") if one else (time.perf_counter, "wall clock")
    about = machine(args.device) | {"times": named}
    print(", ".join(f"{key} {value}" for key, value in about.items()) + "\n", flush=True)
    print_head()
    findings = []
    with fresh_cache():
        for finding in everything(args.device, args.quick, clock):
            findings.append(finding)
            print_line(finding)
    missed = [finding.criterion for finding in findings if finding.met is False]
    asked = sum(finding.met is not None for finding in findings)
    print(f"\n{asked - len(missed)} of {asked} met, {time.perf_counter() - started:.0f} s in all")
    for criterion in missed:
        print(f"missed: {criterion}")
    if args.json:
        lines = [finding._asdict() for finding in findings]
        args.json.write_text(json.dumps({"machine": about, "criteria": lines}, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

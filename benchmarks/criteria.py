"""The plan's own criteria, measured, one line each, with pass or MISS.

    python benchmarks/criteria.py [--device cpu|cuda] [--quick] [--threads N] [--json PATH]

Time and memory: a layer of one seed, and of 1,024 seeds of which none or one is active, statistics
included, beside the plain compiled layer and beside the legacy path (`kasmina_fx.reference`: what
HybridKasminaLayer runs in "legacy"). Ratios are medians of ratios of one round, all contenders take
turns; quartiles are beside them. On a CPU with one thread (the default) times are the CPU's, so
that others on the machine are not in them; with more they are the clock's. Then: how times grow
from 10 to 10,000 seeds, what a step waits for, threads that change the same seeds, parity of both
implementations. About three minutes on 2 cores. The exit status is 1 if any criterion is missed.
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
from overhead import FORWARD, TRAINING, make_step, outcome, shapes
from torch._inductor.utils import fresh_cache

from kasmina_fx import kasminify
from kasmina_fx.testing import graft

#: Largest ratios of time and of memory.
TIME, MEMORY = 1.05, 1.10
PLANS = {"cpu": Plan(25, 0.1, 6.0), "cuda": Plan(25, 0.02, 1.0)}
QUICK = Plan(3, 0.005, 0.1)
#: Name, seeds, active ones, their blueprint.
CASES = (
    ("one seed, asleep", 1, 0, "lora"),
    ("one seed, active (lora)", 1, 1, "lora"),
    ("{n:,} seeds, asleep", 1024, 0, "mlp"),
    ("{n:,} seeds, one active (mlp)", 1024, 1, "mlp"),
)


def seeded(shape: c.Shape, seeds: int, active: int, kind: str, compile: bool) -> c.Contender:
    model: Any = kasminify(shape.host(), num_seeds=seeds, compile=compile)
    torch.manual_seed(1)
    if active:
        graft(model[0], range(active), kind, c.ALPHA)
    return c.Contender(model, model, model[0].weight, compile)


def costs(shape: c.Shape, seeds: int, plan: Plan, clock: Callable[[], float]) -> Iterator[Finding]:
    """Time and memory of the cases of one number of seeds (1, or as many as there shall be)."""
    torch._dynamo.reset()
    everyone = {c.HOST: c.host(shape)}
    everyone[c.HOST_AGAIN] = everyone[c.HOST]
    names = []
    for text, number, active, kind in CASES:
        if (number == 1) == (seeds == 1):
            name = text.format(n=seeds)
            names.append(name)
            everyone[name] = seeded(shape, seeds, active, kind, True)
            eager: Any = seeded(shape, seeds, active, kind, False).module
            everyone[f"legacy: {name}"] = c.reference(eager)
    inputs = [shape.random(shape.rows, shape.inputs) for _ in range(3)]
    gradient = shape.random(shape.rows, shape.features)
    for mode in (FORWARD, TRAINING):
        steps = {name: make_step(one, gradient, mode) for name, one in everyone.items()}
        for name in names:  # the same function of the same numbers
            mine, theirs = (
                outcome(everyone[n], inputs[0], gradient, FORWARD)[0]
                for n in (name, f"legacy: {name}")
            )
            torch.testing.assert_close(mine.float(), theirs.float(), rtol=0.05, atol=0.01)
        for step in steps.values():
            step(inputs[0]), step(inputs[0])  # compiles
        samples = interleave(steps, inputs, plan, clock)
        again = samples[c.HOST_AGAIN].beside(samples[c.HOST])
        title = f"time, {mode}, beside the same plain layer a second time"
        yield _ratio(title, again, None)
        for name in names:
            for other, title in ((c.HOST, "the plain layer"), (f"legacy: {name}", "legacy")):
                found = samples[name].beside(samples[other])
                yield _ratio(f"time, {mode}, {name}, beside {title}", found, TIME)
    peaks = {
        name: {
            "peak_bytes": peak_growth(steps[name], inputs[0]),
            "held_bytes": held_bytes(m.module),
        }
        for name, m in everyone.items()
        if name != c.HOST_AGAIN
    }
    for name in names:
        for other, title in ((c.HOST, "the plain layer"), (f"legacy: {name}", "legacy")):
            ratio = memory_ratio(peaks[name], peaks[other])
            shown = "can't be read here" if ratio is None else f"{ratio:.3f}"
            met = None if ratio is None else ratio <= MEMORY
            text = f"memory, training, {name}, beside {title}"
            yield Finding(text, shown, "held and peak, median of 3", f"<= {MEMORY}", met)


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

"""What seeds cost beside the plain compiled host, and beside other ways to write them.

    python benchmarks/overhead.py --device cpu|cuda [--quick] [--check] [--json PATH] [--seeds N]
        [--lowering NAME] [--against KEPT | --keep KEPT]

One process, one run. All ratios are to `torch.compile(Linear + GELU)` of the same shape, measured
in the same rounds; `_contenders.py` says what is compared, `_timing.py` how it is measured. Active
seeds are spread over the layer. A training step is a forward and a backward from a fixed random
gradient; there is no gradient to the input, no loss and no optimizer, which would only bring every
ratio nearer to 1. Inductor's cache starts empty, so that an earlier run changes nothing; within the
run it is kept, and seeds go from none to all, as they do in a life.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import _contenders as c
import torch
from _regression import ALLOWED, compare, keep
from _report import check, memory_ratio, print_report
from _timing import Plan, Step, held_bytes, interleave, machine, peak_growth
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from kasmina_fx.testing import assert_no_recompiles

FORWARD, TRAINING = "forward", "training"
NONE, SOME, ALL = "none", "6 %", "all"
STRIDE = 16  # one seed in 16 is active for "6 %"
SEEDS = (16, 256, 1024, 10000)
#: If asked for: chunks of 5 and of 4 features, two runs and so two banks.
UNEVEN = 1000
EVERY = (*SEEDS, UNEVEN)
PLANS = {"cpu": Plan(7, 0.1, 2.0), "cuda": Plan(15, 0.02, 0.5)}
QUICK_BUDGET_S = 0.8

#: Largest relative distance from the loop's output, and from its gradient of the host's weight.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Group:
    """A host and its seeds: contenders of one group are measured together."""

    shape: c.Shape
    seeds: int
    active: str
    lowering: str = "auto"
    modes: tuple[str, ...] = (FORWARD, TRAINING)

    @property
    def active_ids(self) -> range:
        stop = 0 if self.active == NONE else self.seeds
        return range(0, stop, 1 if self.active == ALL else STRIDE)

    def contenders(self) -> dict[str, c.Contender]:
        source = c.grown(self.shape, self.seeds, self.active_ids, telemetry=False, compile=False)
        made = {c.HOST: c.host(self.shape), c.LOOP: c.loop(self.shape, source, compiled=False)}
        made[c.HOST_AGAIN] = made[c.HOST]
        made[c.REFERENCE] = c.reference(source)
        if self.seeds == 16:
            made[c.LOOP_COMPILED] = c.loop(self.shape, source, compiled=True)
        if self.active != NONE:
            made[c.VMAP] = c.vmapped(self.shape, source)
            adapted = c.lora(self.shape) if self.seeds == 1024 else None
            made |= {} if adapted is None else {c.LORA: adapted}
        for name, telemetry in ((c.KASMINA, False), (c.KASMINA_TELEMETRY, True)):
            made[name] = c.kasmina(
                self.shape, self.seeds, self.active_ids, telemetry, self.lowering
            )
        return made

    def takes_part(self, name: str, mode: str) -> bool:
        if name == c.REFERENCE:
            return mode == FORWARD and self.seeds in (16, 1024)
        return name != c.LOOP or mode == FORWARD or self.seeds != 256


def shapes(device: str) -> tuple[c.Shape, c.Shape]:
    if device == "cuda":
        size: tuple[int, int, torch.dtype] = (16384, 4096, torch.bfloat16)
    else:
        size = (512, 1024, torch.float32)
    rows, inputs, dtype = size
    return (
        c.Shape(rows, inputs, 4096, dtype, device),
        c.Shape(rows, inputs, 16384, dtype, device),
    )


def groups(device: str, quick: bool, seeds: Sequence[int], lowering: str) -> list[Group]:
    narrow, wide = shapes(device)
    if quick:
        chosen = [Group(narrow, 1024, active, modes=(FORWARD,)) for active in (NONE, SOME, ALL)]
        chosen[1] = Group(narrow, 1024, SOME)
    else:
        hosts = {number: wide if number > narrow.features else narrow for number in EVERY}
        chosen = [Group(hosts[n], n, active) for n in EVERY for active in (NONE, SOME, ALL)]
    return [replace(group, lowering=lowering) for group in chosen if group.seeds in seeds]


def outcome(contender: c.Contender, x: Tensor, gradient: Tensor, mode: str) -> list[Tensor]:
    """What all must agree on: the output, and in training the gradient of the host's weight."""
    with torch.set_grad_enabled(mode == TRAINING):
        out = contender.call(x)
    if mode == FORWARD:
        return [out]
    out.backward(gradient)
    grads = [contender.weight.grad]
    for parameter in contender.module.parameters():
        parameter.grad = None
    return [out.detach(), *(grad for grad in grads if grad is not None)]


def make_step(contender: c.Contender, gradient: Tensor, mode: str) -> Step:
    parameters = list(contender.module.parameters())

    def forward(x: Tensor) -> None:
        with torch.no_grad():
            contender.call(x)

    def training(x: Tensor) -> None:
        contender.call(x).backward(gradient)
        for parameter in parameters:
            parameter.grad = None

    return forward if mode == FORWARD else training


def warm_up(
    taking_part: dict[str, c.Contender], x: Tensor, gradient: Tensor, mode: str
) -> dict[str, dict[str, Any]]:
    """Compile; check that all compiled that should, and that seeds mean the same to everyone."""
    found: dict[str, dict[str, Any]] = {}
    outcomes = {}
    for name, contender in taking_part.items():
        before, start = counters["stats"]["unique_graphs"], time.perf_counter()
        outcomes[name] = outcome(contender, x, gradient, mode)
        synchronize(x)
        found[name] = {"first_s": time.perf_counter() - start}
        compiled = counters["stats"]["unique_graphs"] - before
        if compiled != int(contender.compiled and name != c.HOST_AGAIN):
            raise AssertionError(f"{name}, {mode}: {compiled} graphs compiled")
        if contender.compiled:
            outcome(contender, x, gradient, mode)
    truth = outcomes.get(c.LOOP, outcomes.get(c.VMAP, outcomes[c.KASMINA]))
    for name, mine in outcomes.items():
        if name not in (c.HOST, c.HOST_AGAIN, c.LORA):
            errors = [distance(*pair) for pair in zip(mine, truth, strict=True)]
            found[name]["relative_errors"] = errors
            if not all(error <= TOLERANCE[x.dtype] for error in errors):  # NaN is an error, too
                raise AssertionError(f"{name}, {mode}: relative errors {errors}")
    return found


def distance(value: Tensor, truth: Tensor) -> float:
    wide = truth.float()
    return float((value.float() - wide).norm() / wide.norm())


def synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def measure(group: Group, plan: Plan) -> list[dict[str, Any]]:
    torch._dynamo.reset()  # every group starts with all of Dynamo's limits
    shape, everyone, results = group.shape, group.contenders(), []
    torch.manual_seed(2)
    inputs = [shape.random(shape.rows, shape.inputs) for _ in range(3)]
    gradient = shape.random(shape.rows, shape.features)
    for mode in group.modes:
        mine = {name: one for name, one in everyone.items() if group.takes_part(name, mode)}
        found = warm_up(mine, inputs[0], gradient, mode)
        steps = {name: make_step(one, gradient, mode) for name, one in mine.items()}
        with assert_no_recompiles():
            samples = interleave(steps, inputs, plan)
            for name, numbers in found.items():
                numbers |= samples[name].beside(samples[c.HOST])
                if mode == TRAINING and name != c.HOST_AGAIN:
                    numbers["peak_bytes"] = peak_growth(steps[name], inputs[0])
                    numbers["held_bytes"] = held_bytes(mine[name].module)
                    numbers["memory_ratio"] = memory_ratio(numbers, found[c.HOST])
        case = {"features": shape.features, "seeds": group.seeds, "active": group.active}
        case |= {"active_seeds": len(group.active_ids), "mode": mode, "contenders": found}
        results.append(case)
    return results


def first_calls(device: str, quick: bool) -> list[dict[str, Any]]:
    """Seconds of a first forward with an empty Inductor cache, which should not grow with seeds."""
    narrow, wide = shapes(device)
    # 10,000 seeds have chunks of two sizes at 16,384 features, and so have 10.
    all_cases = [(narrow, 16), (narrow, 4096), (narrow, 256), (narrow, 1024)]
    all_cases += [(wide, 10), (wide, 10000)]
    pair = all_cases[:2]
    rounds = [pair] if quick else [all_cases, pair] if device == "cuda" else [all_cases, pair, pair]
    seconds: dict[tuple[c.Shape, int], list[float]] = {}
    for case in (case for cases in rounds for case in cases):
        shape, seeds = case
        torch._dynamo.reset()
        x = shape.random(shape.rows, shape.inputs)
        model = c.grown(shape, seeds, range(0, seeds, STRIDE))
        with fresh_cache(), torch.no_grad():
            start = time.perf_counter()
            model(x)
            synchronize(x)
            seconds.setdefault(case, []).append(time.perf_counter() - start)
    return [
        {"features": shape.features, "seeds": seeds, "seconds": times}
        for (shape, seeds), times in seconds.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="What seeds cost beside the plain compiled host.")
    parser.add_argument("--device", choices=tuple(PLANS), required=True)
    parser.add_argument("--quick", action="store_true", help="a few cases, in about a minute")
    parser.add_argument("--check", action="store_true", help="exit 1 if a bound is exceeded (CPU)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything there")
    parser.add_argument("--seeds", type=int, nargs="+", choices=EVERY, default=SEEDS)
    parser.add_argument("--lowering", default="auto", help="of kasmina; first calls take auto")
    worse = f"exit 1 if a ratio is over {ALLOWED} times the one kept there"
    parser.add_argument("--against", type=Path, metavar="KEPT", help=worse)
    parser.add_argument("--keep", type=Path, metavar="KEPT", help="write the ratios there")
    args = parser.parse_args()
    if args.check and (args.device != "cpu" or 1024 not in args.seeds):
        parser.error("--check: the bounds are for the CPU and 1,024 seeds")
    started, about, plan = time.perf_counter(), machine(args.device), PLANS[args.device]
    if args.quick:
        plan = replace(plan, budget_s=min(plan.budget_s, QUICK_BUDGET_S))
    print(", ".join(f"{key} {value}" for key, value in about.items()) + "\n", flush=True)
    # A contender that fell back to eager would be a wrong number: fail instead.
    limits = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, suppress_errors=False)
    results: list[dict[str, Any]] = []
    with limits, fresh_cache():
        for group in groups(args.device, args.quick, args.seeds, args.lowering):
            results += measure(group, plan)
            gc.collect()
            done = f"{group.seeds} seeds, {group.active} active"
            print(f"[{time.perf_counter() - started:4.0f} s] {done}", file=sys.stderr, flush=True)
        calls = first_calls(args.device, args.quick)
    print_report(results, calls)
    met = check(results) if args.check else True
    met = (compare(args.against, results) if args.against else True) and met
    if args.keep:
        keep(args.keep, results, about)
    about["seconds"] = time.perf_counter() - started
    print(f"{about['seconds']:.0f} s in all")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        everything = {"machine": about, "plan": vars(plan), "cases": results, "first_call": calls}
        args.json.write_text(json.dumps(everything, indent=1) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())

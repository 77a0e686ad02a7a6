"""What growing is good for: the table of docs/growth.md, measured.

    python benchmarks/growth.py [--only NAME ...] [--replicates N] [--minutes M] [--workers N]
                                [--quick] [--json FILE]

Each experiment compares ways to train or adapt small networks on scikit-learn's digits, or on text
that ships with Python. A replicate has a split of the data, an initialisation and batches of its
own, the same for all its arms, so that arms are compared in pairs: "difference" is to the first arm
of the group, the mean over replicates with its 95 % interval (Student's t). Accuracies in per cent
of held-out images, text in bits per byte, where less is better. All runs eagerly: networks so small
take longer to compile than to train. Replicates are shared among --workers processes of one thread,
one a core by default; one replicate is all experiments in turn. With --minutes none begins after
so many, but each worker does one. With --quick networks train a twentieth as long, which says only
that everything runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from _growth_adapting import adapting, layers, sequence, widths
from _growth_choosing import choosing
from _growth_data import Scale
from _growth_removing import removing
from _growth_text import language
from _growth_training import chunks, freezing, training
from _timing import machine
from scipy import stats

Scores = dict[str, dict[str, float]]
#: An experiment: `(replicate, scale) -> {group: {arm: score}}`.
Experiment = Callable[[int, Scale], Scores]
Replicate = dict[str, Scores]

#: By name, in the order of their worth.
EXPERIMENTS: dict[str, Experiment] = {
    "training": training,
    "freezing": freezing,
    "chunks": chunks,
    "adapting": adapting,
    "sequence": sequence,
    "removing": removing,
    "layers": layers,
    "widths": widths,
    "choosing": choosing,
    "language": language,
}


#: Digits after the point, where two say too little.
DIGITS = {"language": 3}


def interval(values: np.ndarray, digits: int, sign: str = "") -> str:
    """The mean and half its 95 % interval."""
    mean = f"{values.mean():{sign}.{digits}f}"
    if len(values) < 2:
        return mean
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{mean} ± {half:.{digits}f}"


def rows(name: str, found: list[Scores]) -> list[str]:
    """Lines of the table: each arm's mean, and its difference to the first of its group."""
    lines, digits = [], DIGITS.get(name, 2)
    for group, arms in found[0].items():
        first = np.array([one[group][next(iter(arms))] for one in found])
        for place, arm in enumerate(arms):
            values = np.array([one[group][arm] for one in found])
            difference = values - first
            shown = interval(difference, digits, "+") if place else ""
            what = f"{group}: {arm}" if group else arm
            lines.append(
                f"| {name} | {what} | {interval(values, digits)} | {shown} | {len(found)} |"
            )
    return lines


def replicate(number: int, names: list[str], scale: Scale, deadline: float) -> Replicate | None:
    """Run experiments in turn; None if that would begin after the deadline. For a worker."""
    torch.set_num_threads(1)
    if time.monotonic() > deadline:
        return None
    found = {name: EXPERIMENTS[name](number, scale) for name in names}
    print(f"replicate {number} done", file=sys.stderr, flush=True)
    return found


def run(
    names: list[str], replicates: int, workers: int, scale: Scale, deadline: float
) -> dict[str, list[Scores]]:
    """Run replicates, the first of each worker in any case; return their scores by experiment."""
    workers = min(workers, replicates)
    deadlines = [float("inf")] * workers + [deadline] * (replicates - workers)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        asked = [
            pool.submit(replicate, number, names, scale, latest)
            for number, latest in enumerate(deadlines)
        ]
        done = [found for one in asked if (found := one.result()) is not None]
    return {name: [one[name] for one in done] for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--replicates", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    for name in ("replicates", "workers"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)}: give at least 1")
    torch.set_num_threads(1)
    about = machine("cpu") | {"workers": arguments.workers}
    print(", ".join(f"{key} {value}" for key, value in about.items()), end="\n\n", flush=True)
    start = time.monotonic()
    deadline = start + 60 * arguments.minutes
    scale = Scale(arguments.quick)
    results = run(arguments.only, arguments.replicates, arguments.workers, scale, deadline)
    print("| experiment | arm | score | difference | replicates |\n|---|---|---:|---:|---:|")
    print("\n".join(line for name, found in results.items() for line in rows(name, found)))
    print(f"\n{time.monotonic() - start:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": about, "results": results}, indent=1))


if __name__ == "__main__":
    main()

"""The table of `overhead.py`, its notes, and the bounds of --check."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import _contenders as c

#: Forward, 1,024 seeds at 4,096 features, on a CPU: active, contender, largest ratio.
BOUNDS = (
    ("none", c.KASMINA_TELEMETRY, 1.15),
    ("6 %", c.KASMINA, 1.15),
    ("6 %", c.KASMINA_TELEMETRY, 1.15),
    ("all", c.KASMINA, 1.7),
    ("all", c.KASMINA_TELEMETRY, 1.7),
)

FEW = 5  # a median of fewer rounds says so
HEADER = ("features", "seeds", "active", "mode", "host ms", *c.CONTENDERS, "memory")

NOTES = """\
Ratios to the plain compiled host, medians over rounds that measured both; (n): of only n rounds.
- host again: the same host a second time. Its distance from 1.00 is the noise.
- reference: kasmina_fx.reference, which makes each active seed's module anew in every call. Forward
  at 16 and 1,024 seeds only: its time grows with the seeds, and its gradients are the loop's.
- loop eager: the same loop with its parameters ready. At 256 seeds forward only.
- loop compiled: at 16 seeds only. Its graph grows with the seeds, and compile time with it (seen on
  2 CPU cores: 7, 21 and 70 s for 16, 64 and 256); more than 16 run past what a benchmark may take.
- vmap eager: torch.func.vmap over stacked modules, chunks of one size at a time. With no active
  seed there is nothing to map.
- LoRA (peft): one adapter of rank 8 on the whole layer; another function. At 1,024 seeds only.
- memory: of kasmina + telemetry in training: parameters, buffers and the peak growth during a step,
  over the host's. On CUDA as allocated, on a Linux CPU as resident; "-" where it can't be read."""


def memory_ratio(numbers: dict[str, Any], baseline: dict[str, Any]) -> float | None:
    if not numbers.get("peak_bytes") or not baseline.get("peak_bytes"):
        return None
    total, base = (n["peak_bytes"] + n["held_bytes"] for n in (numbers, baseline))
    return float(total / base)


def row(result: dict[str, Any]) -> list[str]:
    """A line of the table."""
    found = result["contenders"]

    def ratio(name: str) -> str:
        if name not in found:
            return "-"
        value, rounds = found[name]["ratio"], found[name]["rounds"]
        text = f"{value:.2f}" if value < 9.995 else f"{value:.0f}"
        return text if rounds >= FEW else f"{text} ({rounds})"

    keys = (f"{result['features']:,}", f"{result['seeds']:,}", result["active"], result["mode"])
    memory = found[c.KASMINA_TELEMETRY].get("memory_ratio")
    last = f"{memory:.2f}" if memory else "-"
    return [*keys, f"{found[c.HOST]['ms']:.3g}", *map(ratio, c.CONTENDERS), last]


def print_report(results: Sequence[dict[str, Any]], calls: Sequence[dict[str, Any]]) -> None:
    rows = [row(result) for result in results]
    widths = [max(map(len, column)) for column in zip(HEADER, *rows, strict=True)]
    for line in (HEADER, [f"{'-' * (width - 1)}:" for width in widths], *rows):
        cells = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        print(f"| {' | '.join(cells)} |")
    print(f"\n{NOTES}\n\nFirst forward, from an empty Inductor cache: trace, rewrite, compile, run")
    for call in calls:
        seconds = call["seconds"]
        print(
            f"  {call['seeds']:>6,} seeds at {call['features']:>6,} features, one in 16 active, "
            f"telemetry: {statistics.median(seconds):.1f} s (n = {len(seconds)})"
        )


def check(results: Sequence[dict[str, Any]]) -> bool:
    """Print each bound beside what was measured; are all met?"""
    met = True
    for active, name, bound in BOUNDS:
        key = (4096, 1024, active, "forward")
        mine = [r for r in results if (r["features"], r["seeds"], r["active"], r["mode"]) == key]
        measured = mine[0]["contenders"][name]["ratio"]
        met = met and measured <= bound
        verdict = "met" if measured <= bound else "EXCEEDED"
        print(f"bound: {active} of 1,024 active, {name}: {measured:.3f} <= {bound}: {verdict}")
    return met

"""Ratios that are kept in the repository, and whether a run is worse than they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _contenders as c

#: How much larger than the kept one a ratio may be.
ALLOWED = 1.15
KEPT = (c.KASMINA, c.KASMINA_TELEMETRY)


def ratios(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return what a run measured of ours, by case and contender."""
    return {
        f"{case['features']} features, {case['seeds']} seeds, {case['active']} active, "
        f"{case['mode']}: {name}": round(case["contenders"][name]["ratio"], 3)
        for case in results
        for name in KEPT
    }


def keep(path: Path, results: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """Write the ratios of a run, and on what it was measured."""
    path.write_text(json.dumps({"machine": about, "ratios": ratios(results)}, indent=1) + "\n")


def compare(path: Path, results: Sequence[dict[str, Any]]) -> bool:
    """Print each ratio beside the kept one; is none more than ALLOWED times as large?"""
    kept, good = json.loads(path.read_text()), True
    print("kept: measured on " + ", ".join(f"{k} {v}" for k, v in kept["machine"].items()))
    for case, ratio in ratios(results).items():
        before = kept["ratios"].get(case)
        worse = before is not None and ratio > ALLOWED * before
        good = good and not worse
        said = "new" if before is None else f"kept {before:.3f}" + (" WORSE" if worse else "")
        print(f"{case}: {ratio:.3f} ({said})")
    return good

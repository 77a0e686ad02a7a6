"""`benchmarks/growth.py`: its intervals are right, and a tiny run of it prints every row."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARMS = {
    "training": 7,
    "freezing": 4,
    "chunks": 6,
    "adapting": 21,
    "sequence": 4,
    "removing": 9,
    "layers": 6,
    "widths": 4,
    "choosing": 4,
    "language": 3,
}


@pytest.fixture
def growth(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("sklearn", "scipy", "peft"):
        pytest.importorskip(name)
    known = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("growth")
    for name in set(sys.modules) - known:
        if name.startswith("_") or name == "growth":
            del sys.modules[name]


@pytest.mark.slow  # imports peft, and with it transformers
def test_a_difference_is_taken_in_pairs(growth: Any) -> None:
    found = [{"": {"a": float(n), "b": n + 1.0 + 0.1 * (n % 2)}} for n in range(4)]
    # Differences 1, 1.1, 1, 1.1: mean 1.05, standard error 0.02887, t(3) = 3.1824.
    assert growth.rows("x", found) == [
        "| x | a | 1.50 ± 2.05 |  | 4 |",
        "| x | b | 2.55 ± 2.10 | +1.05 ± 0.09 | 4 |",
    ]


@pytest.mark.slow
@pytest.mark.untraced
def test_a_tiny_run_prints_each_row(tmp_path: Path) -> None:
    for name in ("sklearn", "scipy", "peft"):
        pytest.importorskip(name)
    kept = tmp_path / "growth.json"
    command = [
        sys.executable,
        "benchmarks/growth.py",
        "--quick",
        "--replicates",
        "1",
        "--workers",
        "1",
    ]
    done = subprocess.run(
        [*command, "--json", str(kept)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(kept.read_text())["results"]
    assert {name: sum(map(len, one[0].values())) for name, one in results.items()} == ARMS
    for name, count in ARMS.items():
        assert done.stdout.count(f"\n| {name} |") == count


@pytest.mark.slow
def test_a_replicate_that_is_late_does_not_begin(
    growth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiments = {name: lambda number, _: {"": {"arm": float(number)}} for name in "ab"}
    monkeypatch.setattr(growth, "EXPERIMENTS", experiments)
    assert growth.replicate(3, ["a"], None, -float("inf")) is None
    found = growth.replicate(3, ["a", "b"], None, float("inf"))
    assert found == {"a": {"": {"arm": 3.0}}, "b": {"": {"arm": 3.0}}}

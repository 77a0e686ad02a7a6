"""`benchmarks/criteria.py`: each of its checks can fail, and a tiny run of it prints the table."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def properties(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    known = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("_properties")
    for name in set(sys.modules) - known:
        if name.startswith("_"):
            del sys.modules[name]


def test_a_number_that_goes_to_the_host_is_counted(properties: Any) -> None:
    x = torch.ones(3, requires_grad=True)
    with properties._Counting() as mode:
        x.sum().backward()
    assert mode.syncs.total() == 0
    with properties._Counting() as mode:
        x.sum().item()
        x.nonzero()
    assert mode.syncs == {"_local_scalar_dense": 1, "nonzero": 1}


def test_threads_leave_no_half_change(properties: Any) -> None:
    torn, race = properties.atomic(20, "cpu")
    assert (torn.met, race.met) == (True, True)
    assert race.found == "20 wins, 20 seeds"


def test_a_half_change_is_seen(properties: Any) -> None:
    crowd = properties.Crowd(1, "cpu")
    crowd._read()
    assert crowd.torn == []
    crowd.layer.set_alpha(0, 0.25)  # and not the other one
    crowd._read()
    assert crowd.torn == [0.75]


def test_times_that_grow_with_the_square_are_no_line(
    properties: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaling: Any = sys.modules["_scaling"]
    base, slope = scaling.fitted({10: 12.0, 100: 30.0, 1000: 210.0})
    assert (base, slope) == (pytest.approx(10.0), pytest.approx(0.2))

    def found(times: dict[int, float]) -> list[bool | None]:
        monkeypatch.setattr(scaling, "_interleaved", lambda *_: {n: [t] for n, t in times.items()})
        return [line.met for line in scaling.scaling((10, 100), 2, "cpu", 1, time.process_time)]

    assert found({10: 1.0, 100: 10.0}) == [None, True, True, True, True]
    assert found({10: 1.0, 100: 100.0}) == [None, True, False, False, False]
    # A step may be as steep as a plain module of its width, which is as steep here.


@pytest.mark.slow
@pytest.mark.untraced
def test_a_tiny_run_prints_each_line_with_its_verdict(tmp_path: Path) -> None:
    kept = tmp_path / "criteria.json"
    command = [sys.executable, "benchmarks/criteria.py", "--quick", "--json", str(kept)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode in (0, 1), done.stderr  # so small, overhead is all that there is
    criteria = json.loads(kept.read_text())["criteria"]
    assert len(criteria) > 40
    for line in criteria:
        verdict = {True: "pass", False: "MISS", None: ""}[line["met"]]
        assert f"| {line['criterion']} | {line['found']} |" in done.stdout
        assert verdict in done.stdout
    for what in ("atomic", "parity", "no sync"):
        assert all(line["met"] for line in criteria if line["criterion"].startswith(what))

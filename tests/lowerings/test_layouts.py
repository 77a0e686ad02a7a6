"""How Triton lays a tile's loads over the lanes of a warp: compiled for a GPU, on any machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kasmina_fx

pytest.importorskip("triton")
COMPILED = Path(kasmina_fx.__file__).parents[1] / "benchmarks" / "compiled.py"


@pytest.mark.untraced
def test_lanes_lie_along_rows() -> None:
    """Triton 3.6 lays them down 16 rows unless it is told of contiguous columns; 3.9 does not."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(  # a process in which kernels are no functions of the interpreter
        [sys.executable, str(COMPILED), "--json", "--chunks", "3", "12"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert len(found) == 12
    for kernel in found:
        counts = kernel["layouts"]
        assert kernel["hints"] == (kernel["chunk"] == 3), kernel  # chunks that no vector fits
        assert sum(counts.values()) >= 2, kernel
        assert all(layout.startswith("rows") for layout in counts), kernel

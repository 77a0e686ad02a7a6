"""The demo prints what it promises."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "grow_digits.py"


@pytest.mark.slow
def test_the_demo_grows_compiles_four_graphs_and_classifies() -> None:
    for needed in ("rich", "sklearn"):
        pytest.importorskip(needed)
    run = subprocess.run([sys.executable, str(DEMO)], capture_output=True, text=True, check=True)
    assert "Graphs compiled in all: 4 " in run.stdout
    before, after = (
        float(found)
        for found in re.findall(r"accuracy (?:before|after) growing: +([\d.]+)%", run.stdout)
    )
    assert min(before, after) > 90
    assert "16 seeds germinate" in run.stdout
    assert "64 seeds germinate" in run.stdout

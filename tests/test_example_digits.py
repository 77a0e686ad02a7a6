"""The demo does what it says: it learns, it grows, and four graphs are all that it compiles."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich", reason="the demo extra")
pytest.importorskip("sklearn", reason="the demo extra")

DEMO = Path(__file__).resolve().parents[1] / "examples" / "digits.py"


def found(pattern: str, text: str) -> list[Any]:
    groups: list[Any] = re.findall(pattern, text)
    assert groups, f"no {pattern!r} in:\n{text}"
    return groups


@pytest.mark.slow
def test_the_demo_grows_and_compiles_four_graphs(tmp_path: Path) -> None:
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}  # cold: every graph is compiled
    done = subprocess.run([sys.executable, DEMO], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text = done.stdout

    assert "\x1b" not in text, "control characters in a pipe"
    assert max(map(len, text.splitlines())) <= 100
    for what in ("before growing", "after growing", "twin, trained as long"):
        (accuracy,) = found(rf"{what}: +([\d.]+)%", text)
        assert float(accuracy) > 90, text
    rows = found(r"(?m)^ +(0|16|80) .* (\d+) *$", text)
    assert [tuple(map(int, row)) for row in rows] == [(0, 2), (16, 4), (80, 4)]
    assert found(r"Graphs compiled in all: (\d+)", text) == ["4"]
    assert found(r"(\d+) seeds germinate", text) == ["16", "64"]
    for line in (
        "-%blend = kasmina.blend.default(",
        "+return (%linear)",
        "kasmina.gather.default(",
    ):
        assert line in text

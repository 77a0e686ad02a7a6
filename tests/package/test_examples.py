"""The demos print what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
CAMERAS = "original", "rotated", "inverted", "permuted"


def printed_by(name: str, *arguments: str) -> str:
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, text
    return float(found[1])


@pytest.mark.slow
def test_the_demo_grows_compiles_four_graphs_and_classifies() -> None:
    for needed in ("rich", "sklearn"):
        pytest.importorskip(needed)
    printed = printed_by("grow_digits.py")
    assert "Graphs compiled in all: 4 " in printed
    before, after = (
        float(found)
        for found in re.findall(r"accuracy (?:before|after) growing: +([\d.]+)%", printed)
    )
    assert min(before, after) > 90
    assert "16 seeds germinate" in printed
    assert "64 seeds germinate" in printed


@pytest.mark.slow
def test_one_recogniser_serves_four_cameras(tmp_path: Path) -> None:
    for needed in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(needed)
    picture = tmp_path / "cameras.png"
    printed = printed_by("four_cameras.py", "--png", str(picture))

    def scores(way: str) -> dict[str, float]:
        row = next(line for line in printed.splitlines() if line.strip().startswith(f"{way} "))
        means = re.findall(r"([\d.]+)±", row)
        return dict(zip((*CAMERAS, "mean"), map(float, means), strict=True))

    host, packs = scores("nothing done"), scores("packs, switched")
    assert packs["original"] == host["original"] > 93
    assert all(packs[name] > max(80, host[name] + 50) for name in CAMERAS[1:])
    assert packs["mean"] > scores("tuned in sequence")["mean"] + 20
    assert packs["mean"] > scores("head only")["mean"]
    for name in CAMERAS[1:]:
        assert scores(f"pack {name}")[name] == packs[name]
    bits = dict(re.findall(r"^ *([a-z, ]+?) {2,}.* (yes|no) .*$", printed, re.MULTILINE))
    assert bits["packs, switched"] == "yes"
    assert bits["tuned in sequence"] == "no"

    assert number(r"Graphs compiled in all: (\d+)", printed) <= 4
    assert number(r"logits at most (\S+) from ours", printed) < 1e-4
    assert picture.read_bytes().startswith(b"\x89PNG")

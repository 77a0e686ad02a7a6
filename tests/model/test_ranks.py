"""Two processes that train one model hold the same seeds, or are told that they don't."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import rank_cases

pytestmark = pytest.mark.untraced


def said(scenario: str, folder: Path) -> list[str]:
    """What each of two processes said; errors of other kinds show in the second's output."""
    paths = [*sys.path, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    command = [sys.executable, rank_cases.__file__, scenario]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(folder)],
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=180)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    return [(folder / f"said_{rank}").read_text() for rank in range(2)]


@pytest.mark.parametrize(
    "scenario",
    ["same seeds", pytest.param("not compared", marks=pytest.mark.slow), "ddp, reserved"],
)
def test_the_same_commands_make_the_same_model_whatever_each_rank_draws(
    scenario: str, tmp_path: Path
) -> None:
    first, second = said(scenario, tmp_path)
    assert first == second
    assert float(first)


def test_other_seeds_on_another_rank_are_named(tmp_path: Path) -> None:
    first, second = said("other seeds", tmp_path)
    assert first.startswith("ranks 0 and 1 hold different seeds in ['0']")
    assert second.startswith("ranks 1 and 0 hold different seeds in ['0']")


@pytest.mark.parametrize("alone", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_changes_alone_is_told(alone: int, tmp_path: Path) -> None:
    messages = said(f"rank {alone} alone", tmp_path)
    assert f"ranks [{1 - alone}] did not get to a forward with other seeds" in messages[alone]
    assert messages[1 - alone] == "no error"


def test_stacks_that_ddp_does_not_know_are_refused(tmp_path: Path) -> None:
    for message in said("ddp", tmp_path):
        assert "4 stacks of blueprints are not known to the DistributedDataParallel" in message
        assert "reserve" in message

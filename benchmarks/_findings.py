"""A line of the table of `criteria.py`, and the table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Finding(NamedTuple):
    """A line of the table: what was asked, what was found, and whether that is allowed."""

    criterion: str
    found: str
    spread: str
    allowed: str
    met: bool | None  # None: for information


HEADER = ("criterion", "measured", "spread, or how", "allowed", "")


def verdict(finding: Finding) -> str:
    return "" if finding.met is None else "pass" if finding.met else "MISS"


def row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def print_head() -> None:
    print(f"{row(HEADER)}\n|{'---|' * len(HEADER)}", flush=True)


def print_line(finding: Finding) -> None:
    print(row((*finding[:4], verdict(finding))), flush=True)

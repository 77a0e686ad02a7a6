"""Charts of what `overhead.py` measured: ratio to the host over seeds, and over the active share.

Of the two, what was measured at more than one point.

    python benchmarks/overhead.py --device cuda --json cuda.json
    python benchmarks/chart.py cuda.json docs/charts/cuda.svg

Wants matplotlib (the extra `bench`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import _contenders as c
import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "kasmina"  # the same file from the same numbers
mpl.rcParams["svg.fonttype"] = "none"

from matplotlib import pyplot as plt  # noqa: E402 - after use()

SHOWN = (c.LOOP, c.LOOP_COMPILED, c.VMAP, c.LORA, c.KASMINA, c.KASMINA_TELEMETRY)
#: Columns: title, along what, and which cases belong.
SEEDS, SHARE = "seeds", "active"
MODES = ("forward", "training")


def lines(cases: list[dict[str, Any]], mode: str, along: str) -> dict[str, list[tuple[Any, float]]]:
    """Return of each contender its points in one panel."""
    fixed = {SEEDS: ("active", "6 %"), SHARE: ("seeds", 1024)}[along]
    mine = [one for one in cases if one["mode"] == mode and one[fixed[0]] == fixed[1]]
    found: dict[str, list[tuple[Any, float]]] = {name: [] for name in SHOWN}
    for one in mine:
        for name in set(SHOWN) & set(one["contenders"]):
            found[name].append((str(one[along]), one["contenders"][name]["ratio"]))
    return found


def draw(everything: dict[str, Any], path: Path) -> None:
    """Write a chart of two rows (modes) and up to two columns (over seeds, over the share)."""
    titles = {SEEDS: "one seed in 16 active, over seeds", SHARE: "1,024 seeds, over those active"}
    cases = everything["cases"]
    columns = [n for n in titles if max(map(len, lines(cases, MODES[0], n).values())) > 1]
    size = (2 + 4 * len(columns), 7)
    figure, axes = plt.subplots(
        2, len(columns), figsize=size, sharey="row", layout="constrained", squeeze=False
    )
    for row, mode in zip(axes, MODES, strict=True):
        for axis, along in zip(row, columns, strict=True):
            title = titles[along]
            for name, points in lines(cases, mode, along).items():
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o", label=name)
            axis.axhline(1, color="grey", linewidth=0.8)
            axis.set(title=f"{mode}, {title}", yscale="log", ylabel="times the plain host")
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.grid(alpha=0.3, which="both")
    axes[0][-1].legend(fontsize="small")
    about = everything["machine"]
    words = (about.get("gpu") or about["cpu"], f"torch {about['torch']}", about["date"])
    figure.suptitle(", ".join(words), fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="Charts of overhead.py's numbers.")
    parser.add_argument("numbers", type=Path, help="what overhead.py --json wrote")
    parser.add_argument("chart", type=Path, help="the SVG file to write")
    args = parser.parse_args()
    draw(json.loads(args.numbers.read_text()), args.chart)


if __name__ == "__main__":
    main()

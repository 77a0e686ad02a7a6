"""What ``four_cameras.py`` prints, and its picture."""

import statistics
from pathlib import Path
from typing import NamedTuple

import torch
from _cameras import CAMERAS, HELD_OUT, SHIFTED, Result, Samples, parameters_and_bytes
from _show import console, rule
from matplotlib.figure import Figure
from rich import box
from rich.columns import Columns
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text
from torch import Tensor, nn

from kasmina_fx import host_parameters, kasmina_layers

SHADES = " ░▒▓█"  # dark to light
SAMPLES = 6  # of each camera in the PNG


class Exported(NamedTuple):
    """What a process without the package made of an exported pack."""

    name: str
    nbytes: int  # of the file
    apart: float  # largest difference of its logits from the compiled model's
    accuracy: float  # per cent


def setup(model: nn.Module, replicates: int) -> None:
    rule("One recogniser, four cameras")
    parameters, nbytes = parameters_and_bytes(list(host_parameters(model)))
    seeds = " and ".join(f"{layer.num_seeds}" for layer in kasmina_layers(model).values())
    console.print(
        f"A frozen classifier of digits: {parameters:,} parameters, {nbytes:,} bytes; {seeds} "
        f"seeds on its hidden layers\n{SHIFTED:,} samples of each new camera to learn from, "
        f"{HELD_OUT} held out; {replicates} replicates, each of its own split, weights and batches",
        soft_wrap=True,
    )


def replicate_done(replicate: int, found: dict[str, Result], rotated: Tensor) -> None:
    """``rotated``: the host's logits for rotated images."""
    packed = ", ".join(f"{value:.1f}" for value in found["packs, switched"].accuracy)
    answers = rotated.argmax(1).bincount(minlength=10)
    host = f"the host calls {answers.max()} rotated images a {answers.argmax()}"
    console.print(f"replicate {replicate}: packs, switched: {packed} %; {host}")


def shaded(values: Tensor) -> Text:
    """A picture ``[rows, columns]`` of values 0 to 1, two characters for each."""
    levels = (values.clamp(0, 1) * (len(SHADES) - 1)).round().int().tolist()
    return Text("\n".join("".join(SHADES[level] * 2 for level in row) for row in levels))


def brightness(moved: dict[str, list[Tensor]]) -> Tensor:
    """Seeds as a picture: a row for each pack, a column for each seed, the largest is 1."""
    found = torch.stack([torch.cat(layers) for layers in moved.values()])
    return found / found.max().clamp_min(1e-12)


def pictures(cameras: dict[str, Samples], moved: dict[str, list[Tensor]]) -> None:
    rule("What the cameras see")
    digits = [
        Panel.fit(shaded(camera.held_x[0].view(8, 8)), title=name, box=box.SQUARE)
        for name, camera in cameras.items()
    ]
    console.print(Columns(digits))
    rule("What the seeds do: how far each moves its 32 features (rms)")
    first = next(iter(moved.values()))
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("pack")
    for layer, seeds in enumerate(first):
        for seed in range(len(seeds)):
            table.add_column(f"layer {layer + 1} seed {seed}", justify="right")
    for (name, layers), lights in zip(moved.items(), brightness(moved), strict=True):
        values = torch.cat(layers).tolist()
        cells = [
            f"{shaded(light.view(1, 1)).plain} {value:.2f}"
            for light, value in zip(lights, values, strict=True)
        ]
        table.add_row(name, *cells)
    console.print(table)


def png(path: Path, cameras: dict[str, Samples], moved: dict[str, list[Tensor]]) -> None:
    """Digits as each camera sees them; below, the seeds of each pack."""
    figure = Figure(figsize=(8, 8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(3, 2))
    rows = above.subplots(len(cameras), SAMPLES)
    for axes, (name, camera) in zip(rows, cameras.items(), strict=True):
        for axis, image in zip(axes, camera.held_x, strict=False):
            axis.imshow(image.view(8, 8).numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        axes[0].set_ylabel(name)
    axis = below.subplots()
    values = torch.stack([torch.cat(layers) for layers in moved.values()])
    shown = axis.imshow(values.numpy(), cmap="viridis", vmin=0)
    of = next(iter(moved.values()))
    names = [f"{layer + 1}.{seed}" for layer, seeds in enumerate(of) for seed in range(len(seeds))]
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(moved)), list(moved))
    axis.set_xlabel("hidden layer and seed")
    below.colorbar(shown, label="how far it moves its chunk (rms)")
    figure.savefig(path, dpi=120)


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f}±{statistics.stdev(values):.1f}"


def verdict(results: list[dict[str, Result]], way: str) -> str:
    same = [result[way].same_bits for result in results]
    return "" if None in same else "yes" if all(same) else "no"


def table(results: list[dict[str, Result]], samples: int) -> None:
    """A row for each way: held-out accuracy in per cent, mean and deviation over replicates."""
    rule("Held-out accuracy in per cent, on each camera")
    heads = "original", *CAMERAS, "mean", "same\nbits", "parameters", "bytes"
    grid = Table(Column("", no_wrap=True), box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for head in heads:
        grid.add_column(head, justify="right", no_wrap=True)
    for way, last in results[-1].items():
        scores = [result[way].accuracy for result in results]
        means = [statistics.mean(score) for score in scores]
        columns = [spread(list(column)) for column in zip(*scores, strict=True)]
        sizes = f"{last.parameters:,}", f"{last.nbytes:,}"
        grid.add_row(way, *columns, spread(means), verdict(results, way), *sizes)
    console.print(grid, crop=False)
    console.print(
        "Same bits: are the outputs for the original what they were. ±: standard deviation.\n"
        "Parameters and bytes: what is kept for each new camera.\n"
        f"Ways that learn saw {samples:,} images of each, in the same batches."
    )


def ending(exported: Exported, graphs: int, seconds: list[float], path: Path) -> None:
    console.print(
        f"Graphs compiled in all: {graphs} (host, packs in training, packs in evaluation)\n"
        f"A switch of packs took {1e3 * statistics.median(seconds):.1f} ms, and compiled nothing\n"
        f"Pack {exported.name}, finalised and exported: {exported.nbytes:,} bytes; a process that "
        f"can't import kasmina_fx gets {exported.accuracy:.1f} % right,\n"
        f"logits at most {exported.apart:.1e} from ours\n"
        f"Picture: {path}",
        soft_wrap=True,
    )


def times(seconds: float, cpu: float) -> None:
    console.print(f"{seconds:.0f} s in all, compiling included; {cpu:.0f} s of this process's CPU")

"""What ``grow_digits.py`` prints."""

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text
from torch import Tensor, nn

from kasmina_fx import SeedLifecycle, capture, graph_diff, kasmina_layers, rewrite, unobserved
from kasmina_fx.controllers import Decision

# Of a long diff: as many lines as one of the two sizes of chunk takes, without those that compute
# nothing.
DIFF_LINES = 28
VIEW = re.compile(
    r"= aten\.(view|permute|slice|unsqueeze|transpose|detach|sym_size|sym_numel)\.|= mul\("
)

console = Console(width=None if Console().is_terminal else 100)  # a pipe has no width of its own


class Phase(NamedTuple):
    """What there is to say at the end of a phase."""

    active: int  # seeds that are blended
    accuracy: float  # held out
    twins: float
    graphs: int  # compiled so far


def blended(network: nn.Module) -> int:
    """Seeds that have a say in what the network computes."""
    return sum(int(layer.state.blended.sum()) for layer in kasmina_layers(network).values())


def rule(title: str) -> None:
    console.print()
    console.rule(f"[bold]{title}", align="left", characters="-")


def setup(network: nn.Module, trained_on: int, held_out: int) -> None:
    rule("Setup")
    console.print(f"{trained_on} handwritten digits to train on, {held_out} held out")
    for name, layer in kasmina_layers(network).items():
        sizes = Counter(layer.chunks.sizes).items()
        chunks = " and ".join(f"{count} of {size}" for size, count in sizes)
        console.print(f"{name}: {layer.chunks.layer_dim} features, a seed on each chunk: {chunks}")


def decisions(made: list[Decision]) -> None:
    """A line for each stage that seeds entered."""
    for stage in dict.fromkeys(decision.stage for decision in made):
        entered = [decision for decision in made if decision.stage is stage]
        where = " and ".join(f"{len(d.seeds)} in {d.layer}" for d in entered)
        count = sum(len(decision.seeds) for decision in entered)
        verb = "germinate" if stage is SeedLifecycle.GERMINATED else f"-> {stage.name}"
        console.print(f"{count} seeds {verb}, {where}: {entered[0].reason}")


@contextmanager
def progress(network: nn.Module, steps: int) -> Iterator[Callable[[], None]]:
    """Show a bar inside; what it yields is to be called after each step."""
    rule("Training")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("", total=steps)
        yield lambda: bar.update(task, advance=1, description=f"{blended(network):2} seeds blended")


def diff(title: str, network: nn.Module, images: Tensor) -> None:
    """One layer's graph as Dynamo hands it to the passes (-), and as they leave it (+)."""
    layer = kasmina_layers(network)["hidden1"]
    with unobserved(layer):  # the arithmetic of its statistics is some 70 lines more
        before = capture(layer, images)
    found = graph_diff(before, rewrite(before).graph_module)
    lines = [re.sub(" {2,}", "  ", line) for line in str(found).splitlines()[2:]]
    lines = [line for line in lines if line[0] in "+-" and not VIEW.search(line)]
    rule(f"Graph before (-) and after (+) the passes: {title}")
    for line in lines[:DIFF_LINES]:
        text = Text(line, style="green" if line[0] == "+" else "red")
        console.print(text, no_wrap=True, overflow="ellipsis")
    views = sum(count for op, count in found.op_counts.items() if VIEW.search(f"= {op}("))
    if len(lines) > DIFF_LINES:
        more = len(lines) - DIFF_LINES
        console.print(f"... {more} lines more for the other chunks, and {views} views and sizes")


def medians_ms(seconds: list[float], phases: int) -> list[float]:
    """Of the steps of each phase; all have as many."""
    each = len(seconds) // phases
    parts = (seconds[phase * each : (phase + 1) * each] for phase in range(phases))
    return [1e3 * statistics.median(part) for part in parts]


def results(
    phases: list[Phase], ours: list[float], twins: list[float], held_out: int, seconds: float
) -> None:
    """A row for each phase, of which ``ours`` and ``twins`` are the seconds of all steps."""
    rule("Results")
    heads = "active seeds", "accuracy", "twin's", "step", "twin's", "ratio", "graphs so far"
    table = Table(*(Column(head, justify="right") for head in heads), box=box.SIMPLE_HEAD)
    steps = medians_ms(ours, len(phases)), medians_ms(twins, len(phases))
    for phase, step, twin_step in zip(phases, *steps, strict=True):
        scores = f"{phase.accuracy:.2%}", f"{phase.twins:.2%}"
        times = f"{step:.1f} ms", f"{twin_step:.1f} ms", f"{step / twin_step:.2f}"
        table.add_row(str(phase.active), *scores, *times, str(phase.graphs))
    console.print(table)
    first, last = phases[0], phases[-1]
    console.print(
        f"Held-out accuracy before growing: {first.accuracy:.2%}\n"
        f"Held-out accuracy after growing:  {last.accuracy:.2%}\n"
        f"Plain twin, trained as long:      {last.twins:.2%} (one image is {1 / held_out:.2%})\n"
        f"Graphs compiled in all: {last.graphs} (dormant and growing, each for training and "
        "evaluation, make 4)\n"
        "A step is forward, backward and optimizer, which also ramps alpha; the median of a phase."
        "\nThe twin is compiled. The controller comes on top, in every seventh step.\n"
        f"{seconds:.0f} s in all, compiling included",
        soft_wrap=True,
    )

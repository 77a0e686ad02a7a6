"""Grow a network while it trains, on real data: ``make demo``, or ``python examples/digits.py``.

Read it from top to bottom. A small classifier of handwritten digits gets a thousand dormant seeds a
hidden layer. While it trains, a controller reads its health report: seeds germinate in the sickest
chunks, 16 and later 64 more, learn to reconstruct them, blend in, and stay or go. Beside it trains
its plain compiled twin, from the same weights on the same batches, for two comparisons: what a step
costs, and how much of a better accuracy is due to more training alone.
"""

import copy
import re
import statistics
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from kasmina_fx import (
    GraftingConfig,
    SeedConfig,
    SeedLifecycle,
    capture,
    graph_diff,
    kasmina_layers,
    kasminify,
    optim,
    rewrite,
)
from kasmina_fx.controllers import Decision, HealthController

NUM_SEEDS = 1000  # in each hidden layer of 1,024 features
BATCH = 64
HELD_OUT = 448  # 7 whole batches: one shape throughout, so no graph is compiled for another
GROWTH = (0, 16, 64)  # seeds that germinate at the start of each phase
EPOCHS = 5  # of a phase
RAMP_STEPS = 42  # over which a seed's alpha goes from 0 to 1; a phase has 105
ROUND = 7  # steps between two looks of the controller
LEARNING_RATE = 3e-4
SEED = 0

# Of a long diff: as many lines as one of the two sizes of chunk takes, without those that compute
# nothing.
DIFF_LINES = 28
VIEW = re.compile(
    r"= aten\.(view|permute|slice|unsqueeze|transpose|detach|sym_size|sym_numel)\.|= mul\("
)

console = Console(width=None if Console().is_terminal else 100)  # a pipe has no width of its own


# 1. The data: 1,797 images of 8 x 8 pixels, which scikit-learn brings along.


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images to train on, float32 (n, 64) from 0 to 1, and their labels; the same, held out."""
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels, labels, test_size=HELD_OUT, stratify=labels, random_state=SEED)
    train_x, held_x, train_y, held_y = (torch.from_numpy(part) for part in parts)
    return train_x.float() / 16, train_y, held_x.float() / 16, held_y


def batches(
    images: Tensor, labels: Tensor, shuffle: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a phase; rows of an epoch that fill no batch are dropped."""
    for _ in range(EPOCHS):
        order = torch.randperm(len(labels), generator=shuffle)
        whole = order[: len(labels) - len(labels) % BATCH]
        yield from ((images[rows], labels[rows]) for rows in whole.split(BATCH))


# 2. The network. Nothing in it knows of seeds.


def make_network() -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            hidden1=nn.Linear(64, 1024),
            gelu1=nn.GELU(),
            hidden2=nn.Linear(1024, 1024),
            gelu2=nn.GELU(),
            output=nn.Linear(1024, 10),
        )
    )


def is_hidden(module: nn.Module, name: str) -> bool:
    """Which layers may grow. Not the output layer: its 10 features are the answer itself."""
    return name.startswith("hidden")


# 3. Training, the same for the growing network and for its twin.


class Trainee:
    """A network, its optimizer, and what each step took and yielded."""

    def __init__(self, network: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        self.network, self.forward = network, forward
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, fused=True)
        self.seconds: list[float] = []
        self.losses: list[Tensor] = []

    def step(self, images: Tensor, labels: Tensor) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.forward(images), labels)
        loss.backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.detach())

    def median_ms(self) -> float:
        """Of the steps since it was last asked."""
        seconds, self.seconds = self.seconds, []
        return 1e3 * statistics.median(seconds)


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images that the network classifies right."""
    layers = kasmina_layers(network).values()
    network.eval()
    for layer in layers:
        layer.telemetry_enabled = False  # held-out images must not help to pick seeds
    pairs = zip(images.split(BATCH), labels.split(BATCH), strict=True)
    right = sum(int((network(x).argmax(1) == y).sum()) for x, y in pairs)
    for layer in layers:
        layer.telemetry_enabled = True
    network.train()
    return right / len(labels)


# 4. Growing. 1,024 features and 1,000 seeds make 24 chunks of 2 features and 976 of 1.


def make_controller(network: nn.Module) -> HealthController:
    """Rules that come with the package; a policy of your own would have the same one method.

    Health is a chunk's variance beside its layer's median: 0.5 is typical, and near 0 is a chunk
    that says the same of every image. The sickest get a blueprint each, the default "mlp": linear,
    ReLU, linear. As alpha goes to 1 it *replaces* what the host computes for the chunk. A sick
    chunk is where that costs least. ("lora" or "affine" would add to the chunk instead.)
    """
    return HealthController(
        network, budget=0, pace=64, tolerance=0.1, train_epochs=2, settle_epochs=1
    )


def grow(controller: HealthController, trainee: Trainee) -> list[Decision]:
    """Let the controller decide, between two steps. Nothing that it does compiles anything."""
    loss = float(torch.stack(trainee.losses[-3 * ROUND :]).mean())  # of an epoch
    decisions = controller.step({"loss": loss})
    # The first germination adds stacks of parameters, which no optimizer knows yet.
    optim.sync(trainee.optimizer, trainee.network)
    return decisions


# 5. The story: three phases, without a stop between them.


def main() -> None:
    started = time.perf_counter()
    torch.manual_seed(SEED)
    # Enough for a network of this size, and steadier where other programs share the cores.
    torch.set_num_threads(1)
    train_x, train_y, held_x, held_y = load()
    network = make_network()
    plain = copy.deepcopy(network)
    twin = Trainee(plain, torch.compile(plain))
    grower = Trainee(network, network)

    # From this line on the network can grow. It is the same object around the same parameters.
    ramp = SeedConfig(grafting=GraftingConfig(fixed_steps=RAMP_STEPS), ramp_every="step")
    kasminify(network, num_seeds=NUM_SEEDS, filter_fn=is_hidden, config=ramp)
    controller = make_controller(network)
    print_setup(network, train_y)
    print_diff("hidden1, all seeds dormant", network, train_x[:BATCH])

    # Compile the twin, with no step. Each graph that anything compiles from here on is counted.
    rule("Training")
    twin.forward(train_x[:BATCH]).sum().backward()
    not_ours = counters["stats"]["unique_graphs"]

    shuffle = torch.Generator().manual_seed(SEED)  # its own: growing draws no batch's numbers
    phases: list[Phase] = []
    with progress_bar() as progress:
        bar = progress.add_task("", total=len(GROWTH) * EPOCHS * (len(train_y) // BATCH))
        for count in GROWTH:
            controller.budget += count
            for step, (images, labels) in enumerate(batches(train_x, train_y, shuffle)):
                if step % ROUND == 0 and grower.losses:
                    print_decisions(grow(controller, grower))
                # In turns, each first every second time: whatever else is running slows both.
                for trainee in (grower, twin) if step % 2 else (twin, grower):
                    trainee.step(images, labels)
                progress.update(bar, advance=1, description=f"{blended(network):2} seeds blended")
            ours = accuracy(network, held_x, held_y), grower.median_ms()
            its = accuracy(plain, held_x, held_y), twin.median_ms()
            graphs = counters["stats"]["unique_graphs"] - not_ours
            phases.append(Phase(blended(network), ours, its, graphs))

    print_diff("hidden1, growing", network, train_x[:BATCH])
    print_results(phases)
    console.print(f"{time.perf_counter() - started:.0f} s in all, compiling included")


# 6. What is printed.


class Phase(NamedTuple):
    """What there is to say at the end of a phase."""

    active: int  # seeds that are blended
    ours: tuple[float, float]  # held-out accuracy, median milliseconds of a step
    twin: tuple[float, float]
    graphs: int  # compiled so far


def rule(title: str) -> None:
    console.print()
    console.rule(f"[bold]{title}", align="left", characters="-")


def print_setup(network: nn.Module, train_y: Tensor) -> None:
    rule("Setup")
    console.print(f"{len(train_y)} handwritten digits to train on, {HELD_OUT} held out")
    for name, layer in kasmina_layers(network).items():
        sizes = Counter(layer.chunks.sizes).items()
        chunks = " and ".join(f"{count} of {size}" for size, count in sizes)
        console.print(f"{name}: {layer.chunks.layer_dim} features, a seed on each chunk: {chunks}")


def blended(network: nn.Module) -> int:
    return sum(int(layer.state.blended.sum()) for layer in kasmina_layers(network).values())


def print_decisions(decisions: list[Decision]) -> None:
    """A line for each stage that seeds entered."""
    for stage in dict.fromkeys(decision.stage for decision in decisions):
        made = [decision for decision in decisions if decision.stage is stage]
        where = " and ".join(f"{len(d.seeds)} in {d.layer}" for d in made)
        count = sum(len(decision.seeds) for decision in made)
        verb = "germinate" if stage is SeedLifecycle.GERMINATED else f"-> {stage.name}"
        console.print(f"{count} seeds {verb}, {where}: {made[0].reason}")


def progress_bar() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, TimeElapsedColumn(), console=console)


def print_diff(title: str, network: nn.Module, images: Tensor) -> None:
    """One layer's graph as Dynamo hands it to the passes (-), and as they leave it (+)."""
    layer = kasmina_layers(network)["hidden1"]
    layer.telemetry_enabled = False  # the arithmetic of its statistics is some 70 lines more
    before = capture(layer, images)
    layer.telemetry_enabled = True
    diff = graph_diff(before, rewrite(before).graph_module)
    lines = [re.sub(" {2,}", "  ", line) for line in str(diff).splitlines()[2:]]
    lines = [line for line in lines if line[0] in "+-" and not VIEW.search(line)]
    rule(f"Graph before (-) and after (+) the passes: {title}")
    for line in lines[:DIFF_LINES]:
        text = Text(line, style="green" if line[0] == "+" else "red")
        console.print(text, no_wrap=True, overflow="ellipsis")
    views = sum(count for op, count in diff.op_counts.items() if VIEW.search(f"= {op}("))
    if len(lines) > DIFF_LINES:
        more = len(lines) - DIFF_LINES
        console.print(f"... {more} lines more for the other chunks, and {views} views and sizes")


def print_results(phases: list[Phase]) -> None:
    rule("Results")
    heads = "active seeds", "accuracy", "twin's", "step", "twin's", "ratio", "graphs so far"
    table = Table(*(Column(head, justify="right") for head in heads), box=box.SIMPLE_HEAD)
    for active, (accuracy_, step), (twin_accuracy, twin_step), graphs in phases:
        scores = f"{accuracy_:.2%}", f"{twin_accuracy:.2%}"
        times = f"{step:.1f} ms", f"{twin_step:.1f} ms", f"{step / twin_step:.2f}"
        table.add_row(str(active), *scores, *times, str(graphs))
    console.print(table)
    first, last = phases[0], phases[-1]
    console.print(
        f"Held-out accuracy before growing: {first.ours[0]:.2%}\n"
        f"Held-out accuracy after growing:  {last.ours[0]:.2%}\n"
        f"Plain twin, trained as long:      {last.twin[0]:.2%} (one image is {1 / HELD_OUT:.2%})\n"
        f"Graphs compiled in all: {last.graphs} (dormant and growing, each for training and "
        "evaluation, make 4)\n"
        "A step is forward, backward and optimizer, which also ramps alpha; the median of a phase."
        "\nThe twin is compiled. The controller comes on top, in every seventh step.",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()

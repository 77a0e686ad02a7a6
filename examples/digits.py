"""Grow a network while it trains, on real data: ``make demo``, or ``python examples/digits.py``.

Read it from top to bottom. A small classifier of handwritten digits gets a thousand dormant seeds a
hidden layer. It trains; its health report names the sickest chunks; seeds germinate there, 16 and
later 64 more, and blend in step by step while training goes on. Beside it trains its plain compiled
twin, from the same weights on the same batches, for two comparisons: what a step costs, and how
much of a better accuracy is due to more training alone.
"""

import copy
import re
import statistics
import time
from collections import OrderedDict
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.syntax import Syntax
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import kasmina_fx
from kasmina_fx import GraphDiff, SeedLifecycle, kasmina_layers, kasminify

NUM_SEEDS = 1000  # in each hidden layer of 1,024 features
BATCH = 64
HELD_OUT = 448  # 7 whole batches: one shape in training and evaluation, so one graph for each
EPOCHS = 5  # in each of three phases: dormant, 16 seeds, 64 more
RAMP_STEPS = 60  # over which alpha goes from 0 to 1; a phase has 105
SEED = 0

console = Console(width=None if Console().is_terminal else 100)  # a pipe has no width of its own
Picked = dict[str, list[int]]  # seed ids by layer


# 1. The data: 1,797 images of 8 x 8 pixels that scikit-learn brings along.


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images to train on, float32 (n, 64) from 0 to 1, their labels, and the same held out."""
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels, labels, test_size=HELD_OUT, stratify=labels, random_state=SEED)
    train_x, held_x, train_y, held_y = (torch.from_numpy(part) for part in parts)
    return train_x.float() / 16, train_y, held_x.float() / 16, held_y


def shuffled_batches(count: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers; what is left of an epoch after its last whole batch is dropped."""
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % BATCH].split(BATCH)


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
    """What is to grow. Not the output layer: its 10 features are the answer itself."""
    return name.startswith("hidden")


# 3. One step of training, for the growing network and for its twin alike.


class Trainee:
    """A network with its optimizers and the times of its steps."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.optimizers = [torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)]
        self.seconds: list[float] = []

    def step(self, images: Tensor, labels: Tensor) -> None:
        start = time.perf_counter()
        F.cross_entropy(self.network(images), labels).backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of the images that it classifies right."""
        self.network.eval()
        # Held-out images must not help to pick the seeds: keep them out of the statistics.
        for layer in kasmina_layers(self.network).values():
            layer.telemetry_enabled = False
        right = sum(
            int((self.network(x).argmax(1) == y).sum())
            for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True)
        )
        for layer in kasmina_layers(self.network).values():
            layer.telemetry_enabled = True
        self.network.train()
        return right / len(labels)


# 4. Growing. 1,024 features and 1,000 seeds make 24 chunks of 2 features and 976 of 1.


def find_sickest(network: nn.Module, count: int) -> Picked:
    """The dormant seeds of lowest health in the whole network.

    Health is a chunk's variance beside its layer's median, 0.5 for a typical chunk and near 0 for
    one that says nearly the same about every image. So it compares across layers.
    """
    ranked = []
    for name, layer in kasmina_layers(network).items():
        report = layer.get_health_report()
        dormant = (report["stage"] == SeedLifecycle.DORMANT).nonzero().flatten().tolist()
        ranked += [(float(report["health"][seed]), name, seed) for seed in dormant]
    picked: Picked = {}
    for health, name, seed in sorted(ranked)[:count]:
        picked.setdefault(name, []).append(seed)
    return picked


def germinate(trainee: Trainee, picked: Picked) -> None:
    """Wake seeds at alpha 0, and train their blueprints from now on.

    Each gets a blueprint of its own, the default ``mlp``: linear, ReLU, linear. As alpha goes to 1
    it *replaces* what the host makes of the chunk. A sick chunk is where that costs least, and adds
    what a linear layer can't do. ("lora", "affine" and "bottleneck" add to the chunk instead.)
    """
    layers = kasmina_layers(trainee.network)
    for name, seeds in picked.items():
        layers[name].request_germination(seeds, "mlp")
        layers[name].advance(seeds, SeedLifecycle.TRAINING)
        layers[name].advance(seeds, SeedLifecycle.GRAFTING)
    # A layer's blueprints are stacked, and a stack that is full makes way for a larger one, a new
    # Parameter. An optimizer from before would not know it, so make another. (With
    # kasminify(..., reserve=128) all would be there from the start, and one optimizer enough.)
    stacks = [stack for layer in layers.values() for stack in layer.blueprint_parameters()]
    trainee.optimizers[1:] = [torch.optim.AdamW(stacks, lr=1e-3, weight_decay=0.0, fused=True)]


def ramp(network: nn.Module, picked: Picked, step: int) -> None:
    """Blend new seeds in a little further. Alpha is data to the compiled graph."""
    layers = kasmina_layers(network)
    for name, seeds in picked.items():
        if step < RAMP_STEPS:
            layers[name].set_alpha(seeds, (step + 1) / RAMP_STEPS)


# 5. What is shown.


def progress_bar() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, TimeElapsedColumn(), console=console)


def print_picked(network: nn.Module, picked: Picked) -> None:
    for name, seeds in picked.items():
        health = kasmina_layers(network)[name].get_health_report()["health"][seeds]
        console.print(
            f"  {name}: {len(seeds)} seeds germinate, {seeds[:4]} first; "
            f"health {health.min():.3f} to {health.max():.3f}"
        )


def diff_of(network: nn.Module, images: Tensor) -> GraphDiff:
    """What the passes make of the first hidden layer, as Dynamo hands it to them."""
    layer = kasmina_layers(network)["hidden1"]
    layer.telemetry_enabled = False  # its statistics are 70 lines more
    before = kasmina_fx.capture(layer, images)
    layer.telemetry_enabled = True
    return kasmina_fx.graph_diff(before, kasmina_fx.rewrite(before).graph_module)


def print_diff(title: str, diff: GraphDiff, limit: int) -> None:
    lines = [re.sub("  +", "  ", line) for line in str(diff).splitlines()[3:]]
    short = [line if len(line) < 97 else line[:93] + " ..." for line in lines[:limit]]
    console.rule(title)
    console.print(Syntax("\n".join(short), "diff", background_color="default"))
    if len(lines) > limit:
        console.print(f"... {len(lines) - limit} lines more. In all:")
    console.print(", ".join(f"{n:+} {op}" for op, n in diff.op_counts.items()), style="dim")


# 6. The story.


def main() -> None:
    started = time.perf_counter()
    torch.manual_seed(SEED)
    train_x, train_y, held_x, held_y = load()
    network = make_network()
    twin = Trainee(copy.deepcopy(network))
    grower = Trainee(network)  # so its first optimizer has the host's parameters

    # Now the network can grow. It stays the same object around the same parameters.
    kasminify(network, num_seeds=NUM_SEEDS, filter_fn=is_hidden)
    twin.network.compile()
    print_diff("dormant", diff_of(network, train_x[:BATCH]), 12)

    # Both kinds of the twin's graphs are compiled before the counting starts, without a step.
    twin.network(train_x[:BATCH])
    twin.accuracy(held_x[:BATCH], held_y[:BATCH])
    before = counters["stats"]["unique_graphs"]

    growth = Table("seeds active", "held-out accuracy", "plain twin", "graphs compiled in all")
    times = Table("seeds active", "training step", "plain twin", "ratio")
    generator = torch.Generator().manual_seed(SEED)
    active = 0
    with progress_bar() as progress:
        bar = progress.add_task("", total=3 * EPOCHS * (len(train_y) // BATCH))
        for more in (0, 16, 64):
            active += more
            progress.update(bar, description=f"{active} seeds active")
            picked = find_sickest(network, more)
            print_picked(network, picked)
            if picked:
                germinate(grower, picked)
            grower.seconds, twin.seconds = [], []
            for step, rows in enumerate(shuffled_batches(len(train_y), EPOCHS, generator)):
                ramp(network, picked, step)
                # In turns, each first every second time: what else the machine does hits both.
                for trainee in (grower, twin) if step % 2 else (twin, grower):
                    trainee.step(train_x[rows], train_y[rows])
                progress.advance(bar)
            ours, plain = (statistics.median(t.seconds) for t in (grower, twin))
            times.add_row(str(active), f"{ours*1e3:.1f} ms", f"{plain*1e3:.1f} ms", f"{ours/plain:.2f}")
            scores = (f"{t.accuracy(held_x, held_y):.2%}" for t in (grower, twin))
            compiled = counters["stats"]["unique_graphs"] - before
            growth.add_row(str(active), *scores, str(compiled))
    console.print(growth)
    console.print(times)
    print_diff("80", diff_of(network, train_x[:BATCH]), 30)
    console.print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()

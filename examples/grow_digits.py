"""Grow a network while it trains: the end of ``make demo``, or ``python examples/grow_digits.py``.

Read it from top to bottom; ``_show.py`` beside it prints. A small classifier of handwritten digits
gets 1,000 dormant seeds a hidden layer. While it trains, a controller lets 16 and later 64 of them
germinate, and blends in what they grew. It shows what growing costs, and that nothing recompiles
after it began, and not that it pays: the accuracy of a plain twin stands beside.
"""

import copy
import time
from collections import OrderedDict

import _show as show
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from kasmina_fx import GraftingConfig, SeedConfig, compiles, kasminify, optim, unobserved
from kasmina_fx.controllers import HealthController

BATCH, HELD_OUT = 64, 448  # 7 whole batches: one shape throughout, so no graph for another
GROWTH, EPOCHS, EPOCH = (0, 16, 64), 5, 21  # germinations by phase; its epochs; steps of an epoch
started = time.perf_counter()
torch.manual_seed(0)
torch.set_num_threads(1)  # enough at this size, and steadier where other programs share the cores

# The data: 1,797 images of 8 x 8 pixels, which scikit-learn brings along.
pixels, digits = load_digits(return_X_y=True)
parts = train_test_split(pixels, digits, test_size=HELD_OUT, stratify=digits, random_state=0)
train_x, held_x, train_y, held_y = (torch.from_numpy(part) for part in parts)
train_x, held_x = train_x.float() / 16, held_x.float() / 16


class Trainee:
    def __init__(self, network: nn.Module, forward: nn.Module) -> None:
        self.network, self.forward, self.losses, self.seconds = network, forward, [], []
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4, fused=True)

    def step(self, images: Tensor, labels: Tensor) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.forward(images), labels)
        loss.backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.detach())

    @torch.no_grad()
    def held_out_accuracy(self) -> float:
        self.network.eval()
        answers = [self.network(images).argmax(1) for images in held_x.split(BATCH)]
        self.network.train()
        return int((torch.cat(answers) == held_y).sum()) / HELD_OUT


# The host, which knows nothing of seeds, and for honesty its plain compiled twin: from the same
# weights, on the same batches. What does a step cost, and how much is due to more training alone?
body = {"hidden1": nn.Linear(64, 1024), "gelu1": nn.GELU(), "hidden2": nn.Linear(1024, 1024)}
network = nn.Sequential(OrderedDict(body, gelu2=nn.GELU(), output=nn.Linear(1024, 10)))
plain = copy.deepcopy(network)
grower, twin = Trainee(network, network), Trainee(plain, torch.compile(plain))

# From here on the same object can grow, but for its output: 10 features that are the answer itself.
ramp = SeedConfig(grafting=GraftingConfig(fixed_steps=42), ramp_every="step")  # alpha from 0 to 1
kasminify(network, num_seeds=1000, filter_fn=lambda _, name: "hidden" in name, config=ramp)
# Chosen chunks get a "residual_mlp" each, the default: it starts as the identity.
controller = HealthController(network, budget=0, pace=64, tolerance=0.1, settle_epochs=1)
show.setup(network, len(train_y), HELD_OUT)
show.diff("hidden1, all seeds dormant", network, train_x[:BATCH])
twin.forward(train_x[:BATCH]).sum().backward()  # compiled, with no step: all later graphs are ours
not_ours, phases = compiles(), []
shuffle = torch.Generator().manual_seed(0)  # its own: growing draws no batch's numbers
with show.progress(network, len(GROWTH) * EPOCHS * EPOCH) as advance:
    for count in GROWTH:
        controller.budget += count
        orders = [torch.randperm(len(train_y), generator=shuffle) for _ in range(EPOCHS)]
        batches = torch.cat([order[: EPOCH * BATCH] for order in orders]).split(BATCH)
        for step, rows in enumerate(batches):
            if step % 7 == 0 and grower.losses:
                loss = torch.stack(grower.losses[-EPOCH:]).mean()
                show.decisions(controller.step({"loss": float(loss)}))
                optim.sync(grower.optimizer, network)  # the first germination adds parameters
            for trainee in (grower, twin) if step % 2 else (twin, grower):  # in turns: fair
                trainee.step(train_x[rows], train_y[rows])
            advance()
        with unobserved(network):  # held-out images must not help to pick seeds
            scores = grower.held_out_accuracy(), twin.held_out_accuracy()
        phases.append(show.Phase(show.blended(network), *scores, compiles() - not_ours))
show.diff("hidden1, growing", network, train_x[:BATCH])
show.results(phases, grower.seconds, twin.seconds, HELD_OUT, time.perf_counter() - started)

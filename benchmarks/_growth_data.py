"""Data, hosts and training loops that the experiments of `growth.py` share."""

from __future__ import annotations

import copy
import functools
import pydoc_data.topics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

BATCH, HELD_OUT, SHIFTED = 64, 450, 1000
CONDITIONS = ("rotated", "inverted", "permuted")


@dataclass(frozen=True)
class Scale:
    """How long to train: a run that only shows that everything works takes a twentieth."""

    quick: bool = False

    def steps(self, count: int) -> int:
        return max(3, count // 20) if self.quick else count


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1,797 images of 8 x 8 pixels, pixels 0 to 1, split anew for each replicate."""

    train_x: Tensor
    train_y: Tensor
    held_x: Tensor
    held_y: Tensor
    permutation: Tensor

    @classmethod
    def of(cls, replicate: int) -> Digits:
        pixels, labels = load_digits(return_X_y=True)
        parts = train_test_split(
            pixels / 16, labels, test_size=HELD_OUT, stratify=labels, random_state=replicate
        )
        train_x, held_x, train_y, held_y = map(torch.from_numpy, parts)
        order = torch.randperm(64, generator=generator(replicate))
        return cls(train_x.float(), train_y, held_x.float(), held_y, order)

    def shifted(self, condition: str) -> Digits:
        """The first 1,000 samples to learn from, and all that are held out, as another camera."""

        def see(x: Tensor) -> Tensor:
            if condition == "rotated":
                return x.view(-1, 8, 8).rot90(1, (1, 2)).flatten(1)
            return 1 - x if condition == "inverted" else x[:, self.permutation]

        few_x, few_y = self.train_x[:SHIFTED], self.train_y[:SHIFTED]
        return replace(self, train_x=see(few_x), train_y=few_y, held_x=see(self.held_x))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def classifier(width: int, seed: int) -> nn.Sequential:
    """A host 64-width-width-10; what it draws depends on the seed alone."""
    torch.manual_seed(seed)
    hidden = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(width, 10))


def is_hidden(_: nn.Module, name: str) -> bool:
    return name in ("0", "2")


def parameters(model: nn.Module, trained: bool = True) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def adamw(of: Iterable[nn.Parameter], lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(of, lr=lr, weight_decay=0.0)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Digits,
    steps: int,
    draws: int | torch.Generator,
    penalty: Callable[[], Tensor] | None = None,
) -> None:
    """Take steps on batches that depend on the seed, or the generator, alone."""
    if isinstance(draws, int):
        draws = generator(draws)
    for _ in range(steps):
        rows = torch.randint(len(data.train_y), (BATCH,), generator=draws)
        loss = F.cross_entropy(model(data.train_x[rows]), data.train_y[rows])
        if penalty is not None:
            loss = loss + penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    """Per cent of the held-out images."""
    model.eval()
    right = (model(data.held_x).argmax(1) == data.held_y).float().mean()
    model.train()
    return 100 * float(right)


@functools.lru_cache(maxsize=2)
def wide_host(replicate: int, scale: Scale) -> nn.Sequential:
    """The host 64-128-128-10 of the adaptations, trained on the original digits: copy it."""
    host = classifier(128, replicate)
    train(host, adamw(host.parameters(), 1e-3), Digits.of(replicate), scale.steps(800), replicate)
    return host


def frozen_copy(host: nn.Module) -> nn.Module:
    return copy.deepcopy(host).requires_grad_(False)


@functools.cache
def text() -> Tensor:
    """The help texts that ship with Python, as bytes, int64."""
    joined = "\n".join(pydoc_data.topics.topics.values()).encode()
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8).long()

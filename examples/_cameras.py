"""Data, networks and training of ``four_cameras.py``, and what packs are compared with."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

BATCH = 64
HELD_OUT = 448  # 7 whole batches: one shape throughout, so no graph for another
SHIFTED = 1000  # samples of each new camera to learn from
CAMERAS = ("rotated", "inverted", "permuted")
# As in benchmarks/growth.py, which says how they were chosen, but for the head's: 3e-2 there, which
# is 1.3 points better by benchmarks/growth_rates.py. In sequence slower learning forgets less.
LR, HEAD_LR, HOST_LR, SEQUENCE_LR = 3e-3, 1e-2, 1e-3, 1e-3


class Samples(NamedTuple):
    """What one camera sees: images ``[n, 64]`` of pixels 0 to 1, and their digits ``[n]``."""

    train_x: Tensor
    train_y: Tensor
    held_x: Tensor
    held_y: Tensor


class Result(NamedTuple):
    """What became of one way to serve four cameras."""

    accuracy: list[float]  # per cent held out: of the original, then of each of CAMERAS
    same_bits: bool | None  # are the original's outputs what they were; None: not its task
    parameters: int  # kept for each new camera
    nbytes: int  # of these


def photograph(replicate: int) -> dict[str, Samples]:
    """The digits of scikit-learn, split anew for each replicate, as four cameras see them."""
    pixels, digits = load_digits(return_X_y=True)
    parts = train_test_split(
        pixels / 16, digits, test_size=HELD_OUT, stratify=digits, random_state=replicate
    )
    train_x, held_x, train_y, held_y = map(torch.from_numpy, parts)
    train_x, held_x = train_x.float(), held_x.float()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(replicate))
    see: dict[str, Callable[[Tensor], Tensor]] = {
        "rotated": lambda x: x.unflatten(1, (8, 8)).rot90(1, (1, 2)).flatten(1),
        "inverted": lambda x: 1 - x,
        "permuted": lambda x: x[:, order],
    }
    few_x, few_y = train_x[:SHIFTED], train_y[:SHIFTED]
    found = {"original": Samples(train_x, train_y, held_x, held_y)}
    for name in CAMERAS:
        found[name] = Samples(see[name](few_x), few_y, see[name](held_x), held_y)
    return found


def classifier(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    hidden = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(128, 10))


def learn(model: nn.Module, camera: Samples, steps: int, lr: float, seed: int) -> None:
    """Train whatever is trainable, on batches that depend on the seed alone."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0, fused=True)
    draws = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(camera.train_y), (BATCH,), generator=draws)
        loss = nn.functional.cross_entropy(model(camera.train_x[rows]), camera.train_y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def outputs(model: nn.Module, camera: Samples) -> Tensor:
    """The logits of all held-out images, ``[448, 10]``."""
    model.eval()
    found = torch.cat([model(images) for images in camera.held_x.split(BATCH)])
    model.train()
    return found


def accuracy(model: nn.Module, camera: Samples) -> float:
    return 100 * float((outputs(model, camera).argmax(1) == camera.held_y).float().mean())


def parameters_and_bytes(parameters: list[nn.Parameter]) -> tuple[int, int]:
    """How many elements they have, and bytes."""
    return sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)


def nothing_done(host: nn.Module, cameras: dict[str, Samples], steps: int, seed: int) -> Result:
    return Result([accuracy(host, camera) for camera in cameras.values()], True, 0, 0)


def in_sequence(host: nn.Module, cameras: dict[str, Samples], steps: int, seed: int) -> Result:
    """One network is fine-tuned for each camera in turn, and then judged on all four."""
    model = copy.deepcopy(host).requires_grad_(True)
    for name in CAMERAS:
        learn(model, cameras[name], steps, SEQUENCE_LR, seed)
    same = outputs(model, cameras["original"]).equal(outputs(host, cameras["original"]))
    return Result([accuracy(model, camera) for camera in cameras.values()], same, 0, 0)


def full_copies(host: nn.Module, cameras: dict[str, Samples], steps: int, seed: int) -> Result:
    """A fine-tuned copy of the whole network for each camera."""
    return _apart(host, cameras, steps, seed, lr=LR, part="")


def head_only(host: nn.Module, cameras: dict[str, Samples], steps: int, seed: int) -> Result:
    """A last layer of its own for each camera; the others stay."""
    return _apart(host, cameras, steps, seed, lr=HEAD_LR, part="4")


def _apart(
    host: nn.Module, cameras: dict[str, Samples], steps: int, seed: int, lr: float, part: str
) -> Result:
    before = outputs(host, cameras["original"])
    found = []
    for name in CAMERAS:
        model = copy.deepcopy(host)
        model.get_submodule(part).requires_grad_(True)
        learn(model, cameras[name], steps, lr, seed)
        found.append(accuracy(model, cameras[name]))
    same = outputs(host, cameras["original"]).equal(before)
    kept = parameters_and_bytes(list(host.get_submodule(part).parameters()))
    return Result([accuracy(host, cameras["original"]), *found], same, *kept)


# Each is trained on the same batches, for as many steps.
OTHERS = {
    "tuned in sequence": in_sequence,
    "full copies": full_copies,
    "head only": head_only,
}

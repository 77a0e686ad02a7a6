"""A grown model, its checkpoint, and what is equal where every bit is."""

from __future__ import annotations

import copy
import functools
import io
import tempfile
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kasmina_fx import (
    checkpoint,
    kasmina_layers,
    kasminify,
)
from kasmina_fx.checkpoint.sealed_file import Sealing
from kasmina_fx.errors import CheckpointError
from kasmina_fx.testing import graft


def network(num_seeds: int = 4, **kwargs: Any) -> Any:
    net = nn.Sequential(nn.Linear(5, 14), nn.LayerNorm(14), nn.GELU(), nn.Linear(14, 6))
    return kasminify(net, num_seeds=num_seeds, compile=False, **kwargs)


def grown(**kwargs: Any) -> Any:
    """Private and shared blueprints in several stages, and some telemetry."""
    return copy.deepcopy(template(**kwargs))


@functools.cache
def template(**kwargs: Any) -> Any:
    model = network(**kwargs)
    first, last = kasmina_layers(model).values()
    graft(first, [0, 3], "mlp", 0.4)
    graft(first, 1, "lora", 0.9)
    graft(last, [0, 2], last.register_blueprint("affine"), 0.5)
    last.request_germination([1, 3], "lora")
    with torch.no_grad():
        for layer in kasmina_layers(model).values():
            for parameter in layer.blueprint_parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    model(torch.randn(7, 5))
    return model


def bits(value: Any) -> Any:
    """Something that is equal where every bit is."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), repr(value.tolist())
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    return [bits(item) for item in value] if isinstance(value, (list, tuple)) else value


def everything(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Any:
    """Bits, and identities of parameters: equal only if nothing at all has changed."""
    host = [(layer.state.stages, layer.state.alphas) for layer in kasmina_layers(model).values()]
    groups = [] if optimizer is None else [g["params"] for g in optimizer.param_groups]
    return [
        bits(model.state_dict()),
        bits(host),
        [(name, id(p)) for name, p in model.named_parameters()],
        None if optimizer is None else bits(optimizer.state_dict()),
        [[id(p) for p in group] for group in groups],
    ]


def used(model: nn.Module) -> Any:
    """What a checkpoint restores whatever the capacity: all but empty banks and free slots."""
    saved = {k: bits(v) for k, v in model.state_dict().items() if ".kasmina." not in k}
    for name, layer in kasmina_layers(model).items():
        saved[name] = bits([layer.state.state_tensor, layer.state.alpha])
        saved[name + "telemetry"] = bits(layer.kasmina.telemetry.state_dict())
        saved[name + "blueprints"] = dict(layer.kasmina.blueprints)
        for seed in range(layer.num_seeds):
            held = layer.bank_of(seed)
            saved[f"{name}:{seed}"] = held and bits(held[0].slot_tensors(held[1]))
    return saved


def forge(path: Path, contents: Any) -> None:
    """A file that is sealed as it should be, with any contents."""
    with open(path, "wb") as file:
        sealing = Sealing(file)
        torch.save(contents, sealing)  # type: ignore[arg-type]  # write and flush are all it calls
        sealing.seal()


def contents_of(path: Path) -> Any:
    return torch.load(path, weights_only=True)


@functools.cache
def saved_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(grown(), Path(folder, "net.pt"))
        return Path(folder, "net.pt").read_bytes()


def saved_contents() -> Any:
    """What the file of a grown model holds."""
    return torch.load(io.BytesIO(saved_bytes()), weights_only=True)


class Number(IntEnum):
    ONE = 1


def refused(path: Path, match: str, **kwargs: Any) -> None:
    model = grown()
    before = everything(model)
    with pytest.raises(CheckpointError, match=match) as caught:
        checkpoint.load(model, path, **kwargs)
    assert str(path) in str(caught.value)
    assert everything(model) == before

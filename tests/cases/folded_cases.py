"""Finished models, and what folding may cost in accuracy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune

from kasmina_fx import (
    KasminaLayer,
    SeedLifecycle,
    kasmina_layers,
    kasminify,
)
from kasmina_fx.reference import reference_mode
from kasmina_fx.seeds.folded import Folded
from kasmina_fx.testing import graft

S = SeedLifecycle


class Root(nn.Sequential):
    """A model whose forward is not torch's: ``torch.compile`` calls it, and inlines torch's own."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x)  # type: ignore[no-untyped-call]  # torch's, unannotated


class CallsWithOthers(nn.Module):
    """A model that runs a layer of its own with other parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        other = {"weight": torch.ones(8, 6)}
        first: Tensor = functional_call(self.fc, other, (x,))
        out: Tensor = first + self.fc(x)
        return out


def fossils(layer: KasminaLayer, seeds: Any, kind: str | int, alpha: float = 0.7) -> None:
    graft(layer, seeds, kind, alpha, S.FOSSILIZED)
    with torch.no_grad():
        for parameter in layer.blueprint_parameters(False):
            parameter.normal_(std=0.5)


def three(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return Root(
        nn.Linear(6, 12, bias=bias), nn.GELU(), nn.Linear(12, 10, bias=bias), nn.Linear(10, 4)
    )


def finished(
    plain: nn.Module | None = None,
    grow: Callable[[KasminaLayer], None] | None = None,
    **settings: Any,
) -> Any:
    """A model in evaluation whose first layer has fossils."""
    given = {"num_seeds": 4, "compile": False, "telemetry": False} | settings
    model: Any = kasminify(three() if plain is None else plain, **given)
    layer = next(iter(kasmina_layers(model).values()))
    if grow is None:
        fossils(layer, [0], "affine")
        fossils(layer, [2, 3], "lora", 0.4)
    else:
        grow(layer)
    return model.eval()


def held(model: nn.Module, name: str = "0") -> Folded | None:
    return kasmina_layers(model)[name].kasmina.folded


def evaluated(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(x)
    return out


def is_folded(model: nn.Module, x: Tensor, name: str = "0") -> bool:
    """Whether a layer runs folded when its model is evaluated."""
    evaluated(model, x)
    folded = held(model, name)
    return folded is not None and folded.weight is not None


def by_reference(model: nn.Module, x: Tensor) -> Tensor:
    with reference_mode(model):
        return evaluated(model, x)


def exact(model: nn.Module, x: Tensor) -> Tensor:
    """What the definition gives in float64, of the same numbers."""
    return by_reference(copy.deepcopy(model).double(), x.double())


def assert_as_reference(model: nn.Module, x: Tensor, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(
        evaluated(model, x), by_reference(model, x), atol=tolerance, rtol=tolerance
    )


def magnitudes(layer: KasminaLayer, x: Tensor, *, blended: bool = False) -> Tensor:
    """``|A| (|W| |x| + |b|) + alpha |t|`` of a linear layer: what rounding errors are parts of.

    ``blended``: those of the definition, which adds ``alpha`` times a change to the output: where
    the two nearly cancel, ``|A|`` is less than what it rounds.
    """
    base: Any = layer
    width = layer.chunks.layer_dim
    mixing, added = torch.eye(width).double(), torch.zeros(width).double()
    for seed in layer.state.blended.nonzero().flatten().tolist():
        found = layer.bank_of(seed)
        assert found is not None
        own = {name: t.detach().double() for name, t in found[0].slot_tensors(found[1]).items()}
        chunk, alpha = layer.chunks.chunk_slice(seed), float(layer.state.alphas[seed])
        eye = torch.eye(layer.chunks.sizes[seed]).double()
        change = (
            own["scale"].diag() - eye
            if found[0].spec.kind == "affine"
            else own["up.weight"] @ own["down.weight"]
        )
        mixing[chunk, chunk] = eye + alpha * (change.abs() if blended else change)
        if "shift" in own:
            added[chunk] = alpha * own["shift"].abs()
    host = x.double().abs() @ base.weight.detach().double().abs().mT
    if base.bias is not None:
        host = host + base.bias.detach().double().abs()
    parts: Tensor = host @ mixing.abs().mT + added
    return parts


X = torch.linspace(-2, 2, 30).view(5, 6)


def pruned(model: Any) -> None:
    prune.l1_unstructured(model[0], "weight", 0.3)


def by_an_optimizer(model: Any) -> None:
    optimizer = torch.optim.SGD([model[0].weight], lr=0.5)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    optimizer.step()


def by_other_memory(model: Any) -> None:
    model[0].weight.data = model[0].weight.data + 0.5


def by_a_write_to_a_blueprint(model: Any) -> None:
    with torch.no_grad():
        for stack in model[0].blueprint_parameters(False):
            stack.add_(0.3)

"""Files that the release before layers were swapped in place wrote load after it.

``written_before/`` holds them: a model whose layers ``kasminify`` had put around bases, and one
with a layer made by hand; each with private and shared blueprints in several stages, after three
steps of AdamW. ``*_plain.pt`` are ``torch.save`` of its state dicts, of an input and of the output.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kasmina_fx import (
    KasminaLayer,
    SeedLifecycle,
    checkpoint,
    host_state_dict,
    kasmina_layers,
    kasminify,
)

FOLDER = Path(__file__).parent / "written_before"


class Hand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = KasminaLayer(nn.Linear(6, 9), 4, layer_id="fc")
        self.out = nn.Linear(9, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.out(torch.relu(self.fc(x)))


def fresh(name: str) -> nn.Module:
    if name == "hand":
        return Hand()
    plain = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 4))
    return kasminify(plain, num_seeds=4, compile=False)


def check(model: nn.Module, plain: dict[str, Any]) -> None:
    S = SeedLifecycle
    layer = next(iter(kasmina_layers(model).values()))
    assert layer.state.stages.tolist() == [S.GRAFTING, S.FOSSILIZED, S.FINE_TUNING, S.TRAINING]
    torch.testing.assert_close(model.eval()(plain["x"]), plain["y"])
    assert {k: tuple(v.shape) for k, v in host_state_dict(model).items()} == {
        k: tuple(v.shape) for k, v in plain["host"].items()
    }
    seals = {f"{name}.kasmina.seal" for name in kasmina_layers(model)}  # not known then
    assert set(model.state_dict()) == set(plain["state"]) | seals


@pytest.mark.parametrize("name", ["swapped", "hand"])
def test_a_checkpoint_with_its_optimizer(name: str) -> None:
    model = fresh(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loaded = checkpoint.load(model, FOLDER / f"{name}.pt", optimizer=optimizer)
    assert loaded == {"name": name}
    plain = torch.load(FOLDER / f"{name}_plain.pt", weights_only=True)
    check(model, plain)
    # Every moment is at its parameter: in the order of the file.
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(parameters) == len(plain["optimizer"]["param_groups"][0]["params"])
    for number, state in plain["optimizer"]["state"].items():
        now = optimizer.state[parameters[number]]
        torch.testing.assert_close(now["exp_avg"], state["exp_avg"])
        assert parameters[number].shape == state["exp_avg"].shape
    model.train()(plain["x"]).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["swapped", "hand"])
def test_a_state_dict_strictly(name: str) -> None:
    model = fresh(name)
    plain = torch.load(FOLDER / f"{name}_plain.pt", weights_only=True)
    assert not any(model.load_state_dict(plain["state"], strict=True))
    check(model, plain)
    assert list(kasmina_layers(model)) == (["fc"] if name == "hand" else ["0", "2"])

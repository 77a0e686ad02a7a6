"""What ``torch.set_default_device`` and ``set_default_dtype`` say is for the user's tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kasmina_fx
from kasmina_fx import SeedLifecycle as S
from kasmina_fx import checkpoint, kasmina_layers, kasminify, reference
from kasmina_fx.controllers import HealthController
from kasmina_fx.testing import RecordingBackend, graft

# Coverage doubles the time that torch takes to compile; the files beside this one cover the lines.
pytestmark = pytest.mark.untraced


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str, autouse=True)
def _defaults(request: pytest.FixtureRequest) -> Iterator[None]:
    """Nothing can be read from the meta device, so what lands there by mistake fails."""
    torch.set_default_device("meta")
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


class Mine(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x).tanh()
        return out


KINDS = (None, "lora", "affine", "bottleneck")


@pytest.mark.parametrize(
    "_defaults",
    [torch.float64, pytest.param(torch.bfloat16, marks=pytest.mark.slow)],
    ids=str,
    indirect=True,
)
def test_a_whole_life(path: Path) -> None:
    host = nn.Sequential(
        nn.Linear(8, 21, device="cpu", dtype=torch.float32), nn.GELU(),
        nn.Linear(21, 4, device="cpu", dtype=torch.float32),
    )  # fmt: skip
    model = kasminify(host, num_seeds=10, filter_fn=lambda m, name: name == "0", compile=False)
    layer = kasmina_layers(model)["0"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x = torch.randn(3, 8, device="cpu", dtype=torch.float32)
    run: Any = torch.compile(model, backend=RecordingBackend("aot_eager"))

    def step() -> None:
        for forward in (model, run):
            optimizer.zero_grad()
            forward(x).sum().backward()
            optimizer.step()

    step()
    shared = layer.register_blueprint(Mine)
    for seed, kind in enumerate(KINDS):
        assert layer.request_germination([seed, seed + 5], kind, "DRIFT_CONTROLLED")
    assert layer.request_germination([4, 9], shared)
    kasmina_fx.optim.sync(optimizer, model)
    layer.advance(range(10), S.TRAINING)
    step()
    layer.advance(range(5), S.GRAFTING)
    kasmina_fx.step_epoch(model)
    step()
    snapshot = layer.snapshot()
    layer.set_alpha([0, 1], torch.tensor([0.25, 0.5], device="cpu"))
    layer.rollback(snapshot, 2)
    layer.rollback(snapshot)
    assert layer.cancel_germination([5])
    layer.reserve(16)
    checkpoint.save(model, path, optimizer=optimizer)
    checkpoint.load(model, path, optimizer=optimizer)
    layer.reset([6])
    HealthController(model, budget=10).step({"loss": 1.0})
    step()
    torch.testing.assert_close(layer(x), reference.forward(layer, x))
    assert layer.get_health_report()["mean"].dtype == torch.float32
    assert layer.seeds[1].get_state().stage is S.GRAFTING
    for name, value in model.state_dict().items():
        assert value.device.type == "cpu", name
        kinds = (torch.float32, torch.int32, torch.int64)
        assert value.dtype in kinds or name.endswith("_extra_state"), name


def test_random_numbers_are_drawn_on_the_cpu_in_float32() -> None:
    values = []
    for device in ("meta", "cpu"):
        with torch.device(device):
            torch.manual_seed(0)
            base = nn.Linear(4, 8, device="cpu", dtype=torch.float32)
            layer = kasmina_fx.KasminaLayer(base, 4, layer_id="fc")
            graft(layer, [1, 2], layer.register_blueprint(Mine, name=f"mine-{device}"))
            held = layer.bank_of(1)
            assert held is not None
            values.append(held[0].slot_tensors(held[1])["linear.weight"])
    assert torch.equal(*values)


@pytest.mark.gpu
def test_cuda_as_the_default_device() -> None:
    torch.set_default_device("cuda")
    torch.set_default_dtype(torch.float32)
    net = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4))
    model = kasminify(net, num_seeds=8, filter_fn=lambda m, name: name == "0")
    layer, x = kasmina_layers(model)["0"], torch.randn(3, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    state = torch.cuda.get_rng_state()
    graft(layer, [1, 2], layer.register_blueprint(Mine))
    graft(layer, [3, 4], "mlp", stage=S.TRAINING)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    kasmina_fx.optim.sync(optimizer, model)
    model(x).sum().backward()
    optimizer.step()
    kasmina_fx.step_epoch(model)
    assert layer.get_health_report()["errors"].tolist() == [0] * 8
    assert layer.state.rows.device.type == "cpu"
    with reference.reference_mode(model):
        expected = model(x)
    torch.testing.assert_close(model(x), expected)

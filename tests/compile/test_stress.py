"""Four controllers change seeds from threads of their own while a compiled model trains."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch
from torch import Tensor, nn

import kasmina_fx
from kasmina_fx import KasminaLayer, SeedConfig, kasmina_layers, kasminify
from kasmina_fx.lifecycle import BLENDED
from kasmina_fx.lifecycle import SeedLifecycle as S
from kasmina_fx.testing import assert_no_recompiles

SEEDS, CONTROLLERS, SIZE = 64, 4, 2
GRAIN = 64  # alphas are multiples of 1/64, which float32 holds


class Twins(nn.Module):
    """Two layers whose chunks are all ones; what a seed adds takes its alpha away from them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(4, SIZE * SEEDS) for _ in range(2))
        for parameter, value in ((p, p.dim() == 1) for p in self.parameters()):
            nn.init.constant_(parameter, value)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


class Controller(threading.Thread):
    """Random legal commands on a share of the seeds, the same for both layers at once."""

    def __init__(self, model: nn.Module, number: int, until: float) -> None:
        super().__init__(daemon=True)
        self.model, self.number, self.until = model, number, until
        self.layers = list(kasmina_layers(model).values())
        self.seeds = list(range(number, SEEDS, CONTROLLERS))
        self.random = random.Random(number)
        self.stages, self.alphas = (
            dict.fromkeys(self.seeds, S.DORMANT),
            dict.fromkeys(self.seeds, 0.0),
        )
        self.commands = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while time.monotonic() < self.until:
                self.command()
                self.check()
                time.sleep(0.001)
        except BaseException as error:
            self.error = error

    def command(self) -> None:
        seed = self.random.choice(self.seeds)
        stage, alpha = self.stages[seed], self.random.randint(0, GRAIN) / GRAIN
        following = sorted(kasmina_fx.lifecycle.LEGAL[stage]) or [S.DORMANT]
        target, abort = self.random.choice(following), self.random.random() < 0.1
        try:
            with kasmina_fx.transaction(self.model):
                for layer in self.layers:
                    self.apply(layer, seed, stage, target, alpha)
                if abort:
                    raise InterruptedError
        except InterruptedError:
            return
        self.commands += 1
        self.stages[seed] = target
        blends = target in BLENDED
        self.alphas[seed] = alpha if blends else 0.0

    def apply(self, layer: KasminaLayer, seed: int, stage: S, target: S, alpha: float) -> None:
        if stage is S.DORMANT:
            assert layer.request_germination(seed, "affine", self.number)
            held = layer.bank_of(seed)
            assert held is not None
            for tensor in held[0].slot_tensors(held[1]).values():
                tensor.data.zero_()
        elif target is S.DORMANT:
            layer.reset(seed)
        else:
            layer.advance(seed, target)
        if target in BLENDED:
            layer.set_alpha(seed, alpha)
        elif target not in (S.DORMANT, S.CULLED, S.CANCELLED):
            layer.set_alpha(seed, 0.0)

    def check(self) -> None:
        """No command of this thread is lost, nor half done."""
        for layer in self.layers:
            state = layer.state.get_seed_state(seed := self.random.choice(self.seeds))
            assert state["lifecycle_state"] == self.stages[seed]
            assert state["alpha"] == self.alphas[seed]


def check_rows(rows: Tensor) -> None:
    """Columns that are written together agree."""
    for seed, (stage, blueprint, _, strategy) in enumerate(rows.tolist()):
        idle = stage == S.DORMANT
        assert (blueprint > 0) != idle
        assert strategy == (0 if idle else seed % CONTROLLERS)


@pytest.mark.parametrize(
    ("device", "mode", "seconds"),
    [
        pytest.param("cpu", None, 30, marks=pytest.mark.slow),
        pytest.param("cuda", None, 10, marks=pytest.mark.gpu),
        pytest.param("cuda", "reduce-overhead", 10, marks=pytest.mark.gpu),
    ],
)
def test_four_controllers_and_a_training_loop(device: str, mode: str | None, seconds: int) -> None:
    config = SeedConfig(error_limit=None, embargo_epochs=0)
    model = kasminify(Twins().to(device), num_seeds=SEEDS, config=config, mode=mode)
    layers = list(kasmina_layers(model).values())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step() -> None:
        optimizer.zero_grad()
        torch.compiler.cudagraph_mark_step_begin()
        outs = model(torch.randn(3, 4, device=device))
        sum(out.sum() for out in outs).backward()
        optimizer.step()
        a, b = (out.detach()[0].view(SEEDS, SIZE) for out in outs)
        assert torch.equal(a, b)  # two layers of one transaction: both or none
        assert torch.equal(a[:, 0], a[:, 1])
        grains = (1 - a[:, 0]) * GRAIN
        assert torch.equal(grains, grains.round())
        for layer in layers:
            check_rows(layer.state.rows)
            check_rows(layer.state.state_tensor)

    for layer in layers:  # the growing graph
        layer.request_germination(0, "affine")
        layer.reset(0)
    kasmina_fx.optim.sync(optimizer, model)
    step()
    until = time.monotonic() + seconds
    controllers = [Controller(model, number, until) for number in range(CONTROLLERS)]
    steps = 0
    with assert_no_recompiles():
        for controller in controllers:
            controller.start()
        while any(controller.is_alive() for controller in controllers):
            step()
            steps += 1
    for controller in controllers:
        assert controller.error is None, controller.error
        assert controller.commands > 100
        for layer in layers:
            for seed in controller.seeds:
                state = layer.state.get_seed_state(seed)
                assert state["lifecycle_state"] == controller.stages[seed]
                assert state["alpha"] == controller.alphas[seed]
    assert steps > 100

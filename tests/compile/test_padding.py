"""Tables padded for CUDA graphs: few shapes, the same numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from layer_cases import assert_same, perturb, training_step
from torch import Tensor, nn
from torch._inductor.cudagraph_trees import CUDAGraphNode

from kasmina_fx import InvalidArgument, KasminaLayer, SeedConfig, explain, kasmina_layers, kasminify
from kasmina_fx import SeedLifecycle as S
from kasmina_fx.banks.bank import Bank
from kasmina_fx.testing import graft

SEEDS = 40


def layer(pad: bool | None, reserve: int = 0) -> KasminaLayer:
    torch.manual_seed(0)
    base = nn.Linear(4, 2 * SEEDS).double()
    config = SeedConfig(pad=pad)
    made = KasminaLayer(base, SEEDS, config=config, layer_id="fc")
    if reserve:
        made.reserve(reserve, "mlp")
    return made


def bank_of(layer: KasminaLayer, key: str = "mlp_run0") -> Bank:
    return next(bank for bank in layer.kasmina.bank_list() if bank.key == key)


def sizes(bank: Bank) -> tuple[int, ...]:
    return (*bank.seeds.shape, len(bank.trainees))


def mixed(layer: KasminaLayer) -> None:
    """Private and shared blueprints, some of which train."""
    torch.manual_seed(1)
    graft(layer, [0, 7, 9], "mlp", 0.3)
    graft(layer, [1, 2, 3, 4, 5], "mlp", stage=S.TRAINING)
    shared = layer.register_blueprint("mlp")
    graft(layer, [20, 22, 24], shared, 0.6)
    graft(layer, [21, 23], shared, stage=S.TRAINING)
    perturb(layer)


def test_sizes_are_powers_of_two_and_no_more_than_the_capacity() -> None:
    life = layer(True, reserve=12)
    bank = bank_of(life)
    found = set()
    for seed in range(SEEDS):
        graft(life, seed, "mlp", stage=S.TRAINING)
        height, width, trainees = sizes(bank)
        assert width == 1
        rounded = next(size for size in (2, 4, 8, 16, 32, 64) if size > seed)
        assert (height, trainees) == (min(bank.capacity, rounded), rounded)
        assert int((bank.trainees >= 0).sum()) == seed + 1
        found.add(sizes(bank))
    assert bank.capacity == 48  # 12, doubled twice
    assert len(found) <= 8
    shared = life.register_blueprint("affine")
    life.reset(range(5))
    graft(life, range(5), shared)
    assert sizes(bank_of(life, "affine_shared_run0")) == (1, 8, 2)


def test_padding_changes_no_number() -> None:
    x = torch.randn(6, 4, dtype=torch.float64)
    plain, padded = layer(False), layer(True)
    results, reports = [], []
    for each in (plain, padded):
        mixed(each)
        results.append(training_step(each, each, (x,)))
        report = each.get_health_report()
        reports.append({name: value for name, value in report.items() if "layer" not in name})
    assert sizes(bank_of(plain)) == (8, 1, 5)
    assert sizes(bank_of(padded)) == (8, 1, 8)
    assert sizes(bank_of(plain, "mlp_shared_run0")) == (1, 5, 2)
    assert sizes(bank_of(padded, "mlp_shared_run0")) == (1, 8, 2)
    assert_same(results[1], results[0], 1e-12)
    torch.testing.assert_close(reports[1], reports[0], equal_nan=True)


def test_what_an_empty_place_holds_reaches_nothing() -> None:
    padded = layer(True, reserve=16)
    graft(padded, range(9), "mlp", 0.5)
    bank = bank_of(padded)
    assert len(bank.seeds) == 16
    clean = copy.deepcopy(padded)
    for stack in bank.tensors():
        stack.data[9:] = torch.nan
    x = torch.randn(3, 4, dtype=torch.float64)
    results = [training_step(each, each, (x,)) for each in (padded, clean)]
    assert_same(results[0], results[1], 0.0)
    assert not padded.get_health_report()["errors"].any()


@pytest.mark.parametrize(
    ("mode", "given", "pads"),
    [
        ("reduce-overhead", None, True),
        ("max-autotune", None, True),
        ("default", None, None),
        (None, None, None),
        ("reduce-overhead", False, False),
        (None, True, True),
    ],
)
def test_cuda_graphs_ask_for_padding(mode: str | None, given: bool | None, pads: Any) -> None:
    config = None if given is None else SeedConfig(pad=given)
    net = kasminify(nn.Sequential(nn.Linear(4, 8)), num_seeds=4, mode=mode, config=config)
    found = kasmina_layers(net)["0"]
    assert found.config.pad is pads
    assert found.kasmina.pads is bool(pads)


def test_an_option_of_inductor_asks_for_it_too() -> None:
    net = kasminify(nn.Sequential(nn.Linear(4, 8)), options={"triton.cudagraphs": True})
    assert kasmina_layers(net)["0"].config.pad is True


def test_explain_says_so() -> None:
    net = nn.Sequential(layer(True, reserve=16))
    graft(kasmina_layers(net)["0"], range(5), "mlp")
    x: Tensor = torch.randn(3, 4, dtype=torch.float64)
    assert explain(net, x).layers[0].slots == {"mlp_run0": "5/16 (padded to 8)"}


@pytest.mark.gpu
def test_cuda_graphs_are_recorded_for_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[object] = []
    record = CUDAGraphNode.__init__

    def counted(self: CUDAGraphNode, *args: Any, **kwargs: Any) -> None:
        recorded.append(self)
        record(self, *args, **kwargs)

    monkeypatch.setattr(CUDAGraphNode, "__init__", counted)
    net = nn.Sequential(nn.Linear(8, 2 * SEEDS), nn.GELU(), nn.Linear(2 * SEEDS, 4)).cuda()
    net = kasminify(
        net, num_seeds=SEEDS, mode="reduce-overhead", filter_fn=lambda module, name: name == "0"
    )
    found = kasmina_layers(net)["0"]
    found.reserve(SEEDS, "mlp")

    def train() -> None:
        for _ in range(3):  # a shape is run, recorded, then replayed
            torch.compiler.cudagraph_mark_step_begin()
            net(torch.randn(16, 8, device="cuda")).square().mean().backward()
            net.zero_grad()

    train()
    shapes = {sizes(bank_of(found))}
    for seed in range(SEEDS):
        graft(found, seed, "mlp", stage=S.TRAINING)
        train()
        shapes.add(sizes(bank_of(found)))
    assert len(shapes) == 6
    assert len(recorded) == 2 * len(shapes)  # forward and backward


@pytest.mark.parametrize("given", ["yes", 2, 0.5])
def test_a_bad_value_is_refused(given: Any) -> None:
    with pytest.raises(InvalidArgument, match="pad="):
        SeedConfig(pad=given)

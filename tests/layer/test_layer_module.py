"""What PyTorch does with modules: copies, state dicts, casts, attributes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from layer_cases import (
    CASES,
    MIXES,
    all_builtins,
    every_seed,
    grown,
    perturb,
    shared,
    through,
    user_module,
)
from torch import Tensor, nn

from kasmina_fx import (
    KasminaLayer,
    SeedLifecycle,
    reference,
)
from kasmina_fx.banks.stack import StackedParameter
from kasmina_fx.testing import graft


def _copied(layer: KasminaLayer) -> KasminaLayer:
    return copy.deepcopy(layer)


def _pickled(layer: KasminaLayer) -> KasminaLayer:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded: KasminaLayer = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [_copied, _pickled])
@pytest.mark.parametrize("mix", [all_builtins, shared, user_module])
def test_a_copy_is_equal_and_independent(
    copied: Callable[[KasminaLayer], KasminaLayer], mix: Callable[[KasminaLayer], None]
) -> None:
    layer = grown(CASES["linear, does not divide"], mix, torch.float64)
    x = torch.randn(3, 7, dtype=torch.float64)
    out = layer(x).detach()
    twin = copied(layer)
    assert torch.equal(twin(x), out)
    assert all(isinstance(p, StackedParameter) for p in twin.blueprint_parameters())
    ours = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    assert ours.isdisjoint(t.data_ptr() for t in (*twin.parameters(), *twin.buffers()))

    twin.set_alpha(0, 1.0)
    twin.request_germination(5 if bool(twin.state.stages[5] == 0) else 1, "affine")
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert torch.equal(layer(x), out)
    changed = twin(x)
    layer.set_alpha(0, 0.1)
    assert torch.equal(twin(x), changed)
    assert not torch.equal(layer(x), out)  # the original goes on working


@pytest.mark.parametrize("pickled", [False, True])
def test_the_layers_of_a_copied_model_start_growing_together(pickled: bool) -> None:
    first, second = KasminaLayer(nn.Linear(4, 8), 4), KasminaLayer(nn.Linear(8, 6), 3)
    model: Any = nn.Sequential(first, second)
    second.siblings = first.siblings
    second.publish()
    if pickled:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copy.deepcopy(model)
    assert isinstance(twin[0], KasminaLayer)
    assert isinstance(twin[1], KasminaLayer)
    assert twin[0].siblings is twin[1].siblings
    assert twin[0].siblings is not first.siblings
    assert set(twin[0].siblings) == {twin[0].kasmina, twin[1].kasmina}
    twin[0].request_germination(0)
    assert list(twin[1].kasmina.banks) == ["residual_mlp_run0"]
    assert len(first.kasmina.banks) == len(second.kasmina.banks) == 0


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix.__name__.strip("_"))
def test_a_state_dict_restores_a_grown_layer_in_a_fresh_one(
    mix: Callable[[KasminaLayer], None], assign: bool
) -> None:
    case = CASES["linear, does not divide"]
    layer = grown(case, mix, torch.float64)
    x = torch.randn(3, 7, dtype=torch.float64)
    out = layer(x)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    # Of the same name, from which the values of new blueprints follow.
    fresh = KasminaLayer(case.base().double(), case.num_seeds, layer_id=layer.layer_id)
    result = fresh.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert result.missing_keys == result.unexpected_keys == []
    # The step above is in the telemetry that was saved.
    assert torch.equal(fresh.kasmina.telemetry.accumulated, layer.kasmina.telemetry.accumulated)
    assert torch.equal(fresh(x), out)
    assert all(isinstance(p, StackedParameter) for p in fresh.blueprint_parameters())
    assert fresh.get_layer_stats()["stages"] == layer.get_layer_stats()["stages"]
    for seed in range(case.num_seeds):
        assert fresh.seeds[seed].blueprint_id == layer.seeds[seed].blueprint_id

    # And it goes on growing: no id is given twice, shared ones are known.
    for each in (layer, fresh):
        free = (
            int(each.state.find_seeds_by_state(SeedLifecycle.DORMANT)[0])
            if mix is not every_seed
            else None
        )
        if free is not None:
            torch.manual_seed(3)
            graft(each, free, "mlp", 0.5)
        if each.kasmina.blueprints:
            each.advance(0, SeedLifecycle.CULLED)
            each.reset(0)
            graft(each, 0, next(iter(each.kasmina.blueprints)), 1.0)
    assert torch.equal(fresh(x), layer(x))


def test_loading_replaces_what_the_layer_had_grown() -> None:
    """Slots of the old life must not blend into the new one, even where ids coincide."""
    source, target = (KasminaLayer(nn.Linear(4, 12).double(), 4) for _ in range(2))
    graft(source, [0, 1], "mlp", 0.5)
    graft(target, [0, 1, 2], "affine", 1.0)
    graft(target, 3, target.register_blueprint("lora"), 1.0)
    perturb(source)
    perturb(target)
    x = torch.randn(3, 4, dtype=torch.float64)
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(target(x), source(x), atol=0, rtol=0)
    torch.testing.assert_close(target(x), reference.forward(target, x))
    used = {name: bank["used"] for name, bank in target.get_layer_stats()["banks"].items()}
    assert {name: n for name, n in used.items() if n} == {"mlp_run0": 2}


@pytest.mark.parametrize("capacity", [2, 8])
def test_loading_another_capacity_keeps_the_dtype_of_the_layer(capacity: int) -> None:
    source = KasminaLayer(nn.Linear(4, 24), 8)
    graft(source, range(capacity))
    target = KasminaLayer(nn.Linear(4, 24), 8)
    graft(target, range(4))
    target.double()
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 4)
    assert {p.dtype for p in target.parameters()} == {torch.float64}
    torch.testing.assert_close(target(x.double()).float(), source(x))


def test_a_state_dict_is_a_dict_of_tensors() -> None:
    layer = grown(CASES["linear, 2-D"], shared, torch.float32)
    saved = layer.state_dict()
    own = sorted(key for key in saved if "banks" not in key)
    assert own == [
        "bias",
        "kasmina._extra_state",
        "kasmina.grad_norm",
        "kasmina.seal",
        "kasmina.state.alpha",
        "kasmina.state.state_tensor",
        "kasmina.telemetry.accumulated",
        "kasmina.telemetry.faults",
        "kasmina.telemetry.previous_loss",
        "weight",
    ]
    assert all(isinstance(v, Tensor) for v in saved.values())
    assert saved["kasmina.state.state_tensor"].dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_casting_keeps_alpha_and_telemetry_in_float32(dtype: torch.dtype) -> None:
    layer = grown(CASES["linear, does not divide"], all_builtins, torch.float32)
    layer.set_alpha(0, 0.3)  # not a bfloat16 number
    layer(torch.randn(3, 7))
    accumulated = layer.kasmina.telemetry.accumulated.clone()
    model = nn.Sequential(layer).to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert layer.state.alpha.dtype == torch.float32
    assert layer.state.alpha[0] == torch.tensor(0.3)
    assert layer.kasmina.telemetry.accumulated.dtype == torch.float32
    assert torch.equal(layer.kasmina.telemetry.accumulated, accumulated)
    for bank in layer.kasmina.bank_list():
        assert bank.slots.dtype == bank.seeds.dtype == bank.positions.dtype == torch.int64
    assert layer.state.state_tensor.dtype == torch.int32
    x = torch.randn(5, 7, dtype=dtype)
    out = layer(x)
    assert out.dtype == dtype
    tolerance = 1e-10 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(out, reference.forward(layer, x), atol=tolerance, rtol=tolerance)
    layer.request_germination(5, "mlp")
    assert {p.dtype for p in layer.blueprint_parameters()} == {dtype}


def test_the_device_of_a_meta_model_is_kept() -> None:
    layer = KasminaLayer(nn.Linear(4, 12, device="meta"), 4)
    assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {"meta"}
    layer.to_empty(device="cpu")
    layer.request_germination(0)
    assert layer.state.state_tensor[:, 0].tolist() == [1, 0, 0, 0]


def test_attributes_of_the_base_are_read_and_set_through_the_layer() -> None:
    base = nn.Linear(4, 12)
    layer = KasminaLayer(base, 4)
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert (layer.in_features, layer.out_features) == (4, 12)
    tied = nn.Parameter(torch.randn(12, 4))
    layer.weight = tied
    assert base.weight is tied
    assert "weight" not in layer._parameters
    x = torch.randn(2, 4)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, tied, base.bias))
    layer.bias = None
    assert base.bias is None
    with pytest.raises(AttributeError, match="nothing"):
        layer.nothing  # noqa: B018
    assert not hasattr(layer, "_nothing")


@pytest.fixture
def _default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("_default_dtype")
def test_a_base_without_parameters_takes_the_default_dtype() -> None:
    layer = through(3)
    graft(layer, 0, "mlp")
    assert {p.dtype for p in layer.blueprint_parameters()} == {torch.float64}
    assert layer.state.alpha.dtype == torch.float32
    assert layer(torch.randn(2, 12)).dtype == torch.float64


def test_a_blueprint_can_be_tried_on_a_dimension_far_back() -> None:
    layer = KasminaLayer(nn.Linear(4, 6), 3, feature_dim=9)
    layer.register_blueprint("affine")

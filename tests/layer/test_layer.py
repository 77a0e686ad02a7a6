"""A layer's outputs and gradients equal the reference's."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from layer_cases import (
    BUILTINS,
    CASES,
    MIXES,
    Case,
    all_builtins,
    assert_bitwise,
    assert_same,
    grown,
    no_seed,
    perturb,
    scale,
    through,
    training_step,
)
from torch import nn

from kasmina_fx import (
    KasminaLayer,
    SeedLifecycle,
    UnknownBlueprint,
    reference,
)
from kasmina_fx.testing import graft

ODD_BITS = (-0.0, float("inf"), float("-inf"), float("nan"))
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
mixes = pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix.__name__.strip("_"))


@mixes
@cases
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"]
)
def test_outputs_and_gradients_equal_the_reference(
    case: Case, mix: Callable[[KasminaLayer], None], dtype: torch.dtype, tolerance: float
) -> None:
    layer = grown(case, mix, dtype)
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in case.inputs())
    if dtype == torch.float32:
        tolerance *= 10  # sums over some dozens of elements
    got = training_step(layer, layer, inputs)
    expected = training_step(layer, lambda *xs: reference.forward(layer, *xs), inputs)
    assert_same(got, expected, tolerance)


@cases
def test_blended_seeds_change_their_chunks_and_no_other(case: Case) -> None:
    layer = grown(case, all_builtins, torch.float64)
    inputs = case.inputs()
    out, plain = (
        o[0] if isinstance(o, tuple) else o for o in (layer(*inputs), layer.base(*inputs))
    )
    changed = {
        i
        for i, (a, b) in enumerate(
            zip(layer.chunks.split_tensor(out), layer.chunks.split_tensor(plain), strict=True)
        )
        if not torch.equal(a, b)
    }
    assert changed == {0, 1, 2, 4}  # seed 3 has alpha 0


def test_gradients_reach_base_blueprints_and_input() -> None:
    layer = grown(CASES["linear, 2-D"], all_builtins, torch.float64)
    found = training_step(layer, layer, CASES["linear, 2-D"].inputs())
    expected = {name for name, _ in layer.named_parameters()} | {"input 0", "out 0"}
    assert found.keys() == expected
    for kind in ("mlp", "lora", "bottleneck"):
        assert any(
            t.abs().sum() > 0 for n, t in found.items() if n.startswith(f"kasmina.banks.{kind}")
        )


def test_one_step_by_hand() -> None:
    base = nn.Linear(2, 4, bias=False)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 0]]))
    layer = KasminaLayer(base, 2)
    graft(layer, 1, "affine", 0.25)
    with torch.no_grad():
        for name, parameter in layer.kasmina.banks["affine_run0"].named_parameters():
            parameter[0] = torch.tensor([3.0, 2.0] if name == "scale" else [1.0, -1.0])
    # base [1, 2, 3, 2]; chunk 1: B = [3*3+1, 2*2-1] = [10, 3]; 3 + .25*7, 2 + .25*1
    assert layer(torch.tensor([[1.0, 2.0]])).tolist() == [[1.0, 2.0, 4.75, 2.25]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_all_dormant_is_the_base_bit_for_bit(dtype: torch.dtype) -> None:
    layer = through(3)
    x = torch.randn(5, 12, dtype=dtype)
    x.view(-1)[: len(ODD_BITS)] = torch.tensor(ODD_BITS, dtype=dtype)
    assert_bitwise(layer(x), x)


@cases
def test_all_dormant_equals_each_kind_of_base(case: Case) -> None:
    layer = grown(case, no_seed, torch.float64).eval()
    inputs = case.inputs()
    out, plain = layer(*inputs), layer.base(*inputs)
    for a, b in zip(*((o if isinstance(o, tuple) else (o,)) for o in (out, plain)), strict=True):
        assert_bitwise(a, b)


@pytest.mark.parametrize("kind", BUILTINS)
def test_dormant_again_after_a_life_is_the_base_bit_for_bit(kind: str) -> None:
    layer = through(3)
    graft(layer, [0, 2], kind, 0.7)
    graft(layer, 1, layer.register_blueprint(kind), 0.7)
    perturb(layer)
    x = torch.randn(5, 12)
    x.view(-1)[: len(ODD_BITS)] = torch.tensor(ODD_BITS)
    assert not torch.equal(layer(x)[:, 3:9], x[:, 3:9])
    layer.advance([0, 1, 2], SeedLifecycle.CULLED)
    layer.reset([0, 1, 2])
    assert_bitwise(layer(x), x)
    assert layer.state.get_state_distribution() == {"DORMANT": 4}


@pytest.mark.parametrize("kind", BUILTINS)
@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
@pytest.mark.parametrize("stage", [SeedLifecycle.GERMINATED, SeedLifecycle.TRAINING])
def test_unblended_chunks_keep_their_bits_beside_blended_ones(
    kind: str, shared: bool, stage: SeedLifecycle
) -> None:
    layer = through(4)
    blueprint: int | str = layer.register_blueprint(kind) if shared else kind
    graft(layer, [1, 2], blueprint, 0.5)
    layer.request_germination(3, blueprint)
    if stage is SeedLifecycle.TRAINING:
        layer.advance(3, stage)
    layer.set_alpha(3, 1.0)  # not blended yet: must not matter
    perturb(layer)
    x = torch.randn(4, 16)
    x[:, :4] = torch.tensor(ODD_BITS)  # seed 0, dormant
    x[:, 12:] = torch.tensor(ODD_BITS)  # seed 3
    out = layer(x)
    for chunk in (slice(0, 4), slice(12, 16)):
        assert_bitwise(out[:, chunk], x[:, chunk])
    assert not torch.equal(out[:, 4:12], x[:, 4:12])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", [*BUILTINS, "user"])
@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_a_blueprint_with_non_finite_weights_falls_back_and_harms_nothing(
    kind: str, shared: bool, value: float
) -> None:
    layer = KasminaLayer(nn.Linear(5, 14).double(), 6)
    if kind == "user":
        layer.register_blueprint(scale, name="user")
    for seed in (0, 4, 5):
        graft(layer, seed, layer.register_blueprint(kind) if shared else kind, 0.5)
    perturb(layer)
    healthy = copy.deepcopy(layer)
    healthy.advance(4, SeedLifecycle.CULLED)
    healthy.reset(4)
    held = layer.bank_of(4)
    assert held is not None
    bank, slot = held
    assert bank.run.size == 2  # a run of its own beside seed 0's: seed 5 shares the bank

    x = torch.randn(6, 5, dtype=torch.float64)
    expected = training_step(healthy, healthy, (x,))
    trained = [tensor for tensor in bank.tensors() if tensor.requires_grad]
    if kind in ("mlp", "user") and not math.isnan(value):
        trained = trained[-2:]  # a ReLU or a tanh makes something finite of an Inf before it
    for tensor in trained:
        before = tensor.detach().clone()
        with torch.no_grad():
            tensor[slot] = value
        layer.kasmina.telemetry.reset()
        got = training_step(layer, layer, (x,))
        layer.zero_grad()
        assert_bitwise(
            got["out 0"][:, layer.seeds[4].chunk], layer.base(x)[:, layer.seeds[4].chunk]
        )
        assert layer.get_health_report()["rejected"].tolist() == [0, 0, 0, 0, 1, 0]
        for name, grad in got.items():
            key = name.removeprefix("kasmina.banks.").split(".")[0]
            if name.startswith("kasmina.") and key == bank.key:
                other = healthy.bank_of(5)
                assert other is not None
                torch.testing.assert_close(grad[other[1]], expected[name][other[1]])
            else:
                assert bool(grad.isfinite().all()), name
                torch.testing.assert_close(grad, expected[name], msg=name)
        with torch.no_grad():
            tensor.copy_(before)


def test_an_element_that_overflows_is_kept_from_the_host_and_no_other() -> None:
    layer = through(2)
    graft(layer, [0, 1], "affine", 1.0)
    with torch.no_grad():
        layer.kasmina.banks["affine_run0"].get_parameter("scale").fill_(2.0)
    x = torch.ones(3, 8)
    x[1, 0] = 3e38  # twice that overflows
    out = layer(x)
    expected = 2 * x[:, :4]
    expected[1, 0] = x[1, 0]
    assert torch.equal(out[:, :4], expected)
    assert layer.get_health_report()["errors"].tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("kind", ["none", *BUILTINS])
def test_an_empty_batch_passes(kind: str) -> None:
    layer = KasminaLayer(nn.Linear(5, 12), 4)
    if kind != "none":
        graft(layer, 0, kind)
    layer(torch.randn(3, 5))
    before = layer.kasmina.telemetry.accumulated.clone()
    assert layer(torch.randn(0, 5)).shape == (0, 12)
    assert torch.equal(layer.kasmina.telemetry.accumulated, before)


def test_forward_writes_neither_to_its_input_nor_to_what_the_base_returned() -> None:
    layer = through(2)
    graft(layer, [0, 1, 2, 3], "mlp", 1.0)
    x = torch.randn(3, 8)
    version, before = x._version, x.clone()
    out = layer(x)
    assert x._version == version
    assert torch.equal(x, before)
    assert out.data_ptr() != x.data_ptr()


def test_alpha_one_is_the_blueprint_alone_and_zero_the_base() -> None:
    layer = KasminaLayer(nn.Linear(5, 12).double(), 4)
    graft(layer, [0, 1], "bottleneck")
    perturb(layer)
    layer.set_alpha([0, 1], torch.tensor([0.0, 1.0]))
    x = torch.randn(3, 5, dtype=torch.float64)
    y, out = layer.base(x), layer(x)
    held = layer.bank_of(1)
    assert held is not None
    module = held[0].blueprint.module(3).double()
    module.load_state_dict(held[0].slot_tensors(held[1]))
    torch.testing.assert_close(out[:, :3], y[:, :3], atol=0, rtol=0)
    torch.testing.assert_close(out[:, 3:6], module(y[:, 3:6]), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("base", [nn.Linear(4, 6), nn.Conv2d(3, 6, 1), nn.Conv1d(3, 6, 1)])
def test_input_without_a_batch_dimension_works_as_it_does_in_the_base(base: nn.Module) -> None:
    layer = KasminaLayer(base.double(), 3)
    graft(layer, [0, 2], "mlp")
    shape = {nn.Linear: (4,), nn.Conv2d: (3, 4, 5), nn.Conv1d: (3, 7)}[type(base)]
    x = torch.randn(shape, dtype=torch.float64)
    batched = layer(x.unsqueeze(0)).squeeze(0)
    torch.testing.assert_close(layer(x), batched)


def test_dropout_of_a_user_module_follows_train_and_eval() -> None:
    layer = through(8)
    layer.register_blueprint(lambda size: nn.Dropout(0.5), name="drop")
    graft(layer, [0, 1], "drop", 1.0)
    x = torch.randn(4, 32)
    assert not torch.equal(layer.train()(x), x)
    assert torch.equal(layer.eval()(x), x)


def test_a_user_module_without_tensors_works() -> None:
    layer = through(2)
    layer.register_blueprint(lambda size: nn.Softplus(), name="softplus")
    graft(layer, [0, 2, 3], "softplus", 0.5)
    x = torch.randn(3, 8)
    torch.testing.assert_close(layer(x), reference.forward(layer, x))
    assert not torch.equal(layer(x), x)


def test_a_user_module_may_have_an_attribute_named_dim() -> None:
    layer = KasminaLayer(nn.Conv1d(2, 8, 1), 4)
    layer.register_blueprint(lambda size: nn.Softmax(dim=-1), name="softmax")
    graft(layer, [0, 2], "softmax", 0.5)
    x = torch.randn(3, 2, 5)
    torch.testing.assert_close(layer(x), reference.forward(layer, x))


def test_a_module_instance_serves_only_the_chunks_that_it_fits_and_is_copied() -> None:
    layer = KasminaLayer(nn.Linear(5, 11), 4)  # 3, 3, 3, 2
    mine = nn.Linear(3, 3)
    number = layer.register_blueprint(mine, name="mine")
    graft(layer, 0, number, 1.0)
    graft(layer, 1, "mine", 1.0)
    with pytest.raises(UnknownBlueprint, match="2 features"):
        layer.request_germination([2, 3], "mine")
    x = torch.randn(3, 5)
    y = layer.base(x)
    expected = mine(y[:, :3])
    torch.testing.assert_close(layer(x)[:, :3], expected)
    torch.testing.assert_close(layer(x)[:, 3:6], mine(y[:, 3:6]))
    with torch.no_grad():
        mine.weight.zero_()
    torch.testing.assert_close(layer(x)[:, :3], expected)

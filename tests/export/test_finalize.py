"""What finalize makes computes what the definition says, of any base and any mix of seeds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blueprint_cases import BUILTINS
from folded_cases import exact, finished, fossils, three
from host_cases import by_reference, frozen_copy, grown_network
from layer_cases import CASES, MIXES, Case, grown
from torch import Tensor, nn
from torch.fx import GraphModule

from kasmina_fx import KasminaLayer, SeedLifecycle, finalize, kasmina_layers, kasminify, reference
from kasmina_fx.blueprints import register
from kasmina_fx.blueprints.builtin import MlpBlueprint
from kasmina_fx.testing import graft

S = SeedLifecycle
X = torch.linspace(-2, 2, 30).view(5, 6)


def assert_plain(model: nn.Module) -> None:
    """No class and no name of the package is in a model."""
    kinds = {type(m).__module__.split(".")[0] for m in model.modules()}
    assert "kasmina_fx" not in kinds
    assert not [name for name in model.state_dict() if "kasmina" in name]
    assert not [key for m in model.modules() for key in m.__dict__ if "kasmina_call" in key]


def tensors(out: Any) -> list[Tensor]:
    return [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix.__name__)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_any_base_and_any_mix_by_the_reference_in_float64(
    case: Case, mix: Callable[[KasminaLayer], None]
) -> None:
    layer, inputs = grown(case, mix, torch.float64).eval(), case.inputs()
    model = finalize(layer, growing="freeze", example_inputs=inputs)
    assert type(model) is type(case.base())
    for got, want in zip(
        tensors(model(*inputs)), tensors(reference.forward(layer, *inputs)), strict=True
    ):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", BUILTINS)
@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_every_built_in_blueprint_of_a_kasminified_model(kind: str, alpha: float) -> None:
    model = finished(grow=lambda layer: fossils(layer, [0, 2], kind, alpha))
    plain = finalize(model)
    assert_plain(plain)
    assert (kind in ("affine", "lora")) is not hasattr(plain[0], "grown")
    for rows in (X, X[0], X.view(5, 1, 6), X[:0]):
        want = exact(model, rows)
        torch.testing.assert_close(
            finalize(copy.deepcopy(model).double())(rows.double()), want, atol=1e-12, rtol=1e-12
        )
        torch.testing.assert_close(plain(rows).double(), want, atol=2e-6, rtol=2e-6)


def test_the_model_is_not_changed_and_shares_nothing() -> None:
    model = grown_network()
    before, x = frozen_copy(model), torch.randn(3, 5)
    plain = finalize(model, growing="freeze", example_inputs=(x,))
    assert frozen_copy(model) == before
    assert model.training
    assert not plain.training
    own = {t.data_ptr() for t in (*model.parameters(), *model.buffers()) if t.numel()}
    assert not own & {t.data_ptr() for t in (*plain.parameters(), *plain.buffers())}
    assert_plain(plain)
    torch.testing.assert_close(plain(x), by_reference(model.eval(), x))
    assert kasmina_layers(plain) == {}
    with torch.no_grad():
        plain[0].weight.zero_()
    assert bool(model[0].weight.any())


def test_what_folds_leaves_the_plain_models_names_alone() -> None:
    model = finished(three(bias=False))
    assert [*finalize(model).state_dict()] == [
        "0.weight",
        "0.bias",
        "2.weight",
        "3.weight",
        "3.bias",
    ]
    assert "bias" not in finished(three(bias=False)).state_dict()


def test_what_grew_wants_no_gradient_and_hosts_want_what_they_did() -> None:
    model = finished(grow=lambda layer: fossils(layer, 1, "mlp"))
    model[2].weight.requires_grad_(False)
    wants = {name: p.requires_grad for name, p in finalize(model).named_parameters()}
    assert wants.pop("2.weight") is False
    assert {wants.pop(name) for name in list(wants) if ".grown." in name} == {False}
    assert set(wants.values()) == {True}


def test_seeds_that_share_a_blueprint_share_its_numbers() -> None:
    def grow(layer: KasminaLayer) -> None:
        fossils(layer, [0, 1, 3], layer.register_blueprint("mlp"))

    model = finished(grow=grow)
    plain = finalize(model, example_inputs=(X,))
    (up,) = (p for name, p in plain.named_parameters() if name.endswith("up_weight"))
    assert up.shape == (1, 6, 3)
    torch.testing.assert_close(plain(X).double(), exact(model, X), atol=2e-6, rtol=2e-6)


class OwnMlp(MlpBlueprint):
    kind = "own_mlp"


def test_a_blueprint_class_of_a_users_runs_as_its_module() -> None:
    case = CASES["linear, does not divide"]
    kind = register(OwnMlp())
    layer = grown(case, lambda layer: graft(layer, [0, 4], kind, 0.6), torch.float64).eval()
    inputs = case.inputs()
    torch.testing.assert_close(
        finalize(layer, growing="freeze")(*inputs),
        reference.forward(layer, *inputs),
        atol=1e-12,
        rtol=1e-12,
    )


def test_a_model_of_many_seeds_is_as_many_nodes_as_one_of_few() -> None:
    counts = []
    for seeds in (4, 64):
        model = kasminify(nn.Sequential(nn.Linear(4, 128)), num_seeds=seeds, compile=False)
        fossils(kasmina_layers(model)["0"], range(seeds), "mlp")
        grown: Any = finalize(model)[0].grown
        assert isinstance(grown, GraphModule)
        counts.append(len(grown.graph.nodes))
    assert counts[0] == counts[1] < 60


def test_a_blueprint_with_nan_does_not_run_and_no_nan_of_one_gets_out() -> None:
    def grow(layer: KasminaLayer) -> None:
        fossils(layer, [0, 1, 2], "mlp")
        with torch.no_grad():
            found = layer.bank_of(1)
            assert found is not None
            next(iter(found[0].slot_tensors(found[1]).values())).fill_(torch.nan)

    model = finished(grow=grow)
    plain = finalize(model)
    assert all(bool(t.isfinite().all()) for t in plain.state_dict().values())
    torch.testing.assert_close(plain(X).double(), exact(model, X), atol=2e-6, rtol=2e-6)


class Root(nn.Module):
    """NaN of what is negative."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt()


@pytest.mark.parametrize("alpha", [0.7, 1.0])
def test_elements_that_come_out_nan_or_inf_stay_the_hosts(alpha: float) -> None:
    kind = register(lambda size: Root())

    def grow(layer: KasminaLayer) -> None:
        fossils(layer, [0, 1], "mlp", alpha)
        fossils(layer, [2], kind, alpha)
        with torch.no_grad():
            for stack in layer.blueprint_parameters(False):
                stack.mul_(1e25)  # its products are beyond float32

    model = finished(grow=grow)
    got, want = finalize(model)[0](X), by_reference(model[0], X)
    host = nn.functional.linear(X, model[0].weight, model[0].bias)
    same = (got == host).view(5, 4, 3).any(2)
    assert bool(same[:, :3].any()), "some element was refused"
    assert bool(got.isfinite().all())
    torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["mlp", "lora", "bottleneck"])
def test_half_types_are_blended_in_float32(dtype: torch.dtype, kind: str) -> None:
    model = finished(grow=lambda layer: fossils(layer, [0, 2], kind)).to(dtype)
    plain = finalize(model, example_inputs=(X.to(dtype),))
    assert hasattr(plain[0], "grown") is (kind != "lora" or dtype == torch.float16)
    got, want = plain[0](X.to(dtype)), by_reference(model[0], X.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, atol=0.03, rtol=0.03)


def test_autocast_runs_what_grew_as_it_runs_the_host() -> None:
    model = finished(grow=lambda layer: fossils(layer, [0, 2], "bottleneck"))
    plain = finalize(model)
    with torch.autocast("cpu", torch.bfloat16):
        got = plain(X)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), exact(model, X), atol=0.05, rtol=0.05)


def test_a_compiled_model_and_one_inside_of_another_lose_their_calls() -> None:
    inner = kasminify(nn.Sequential(nn.Linear(6, 8)), num_seeds=4)
    graft(kasmina_layers(inner)["0"], [0], "mlp", 1.0, S.FOSSILIZED)
    whole = nn.Sequential(inner, nn.Tanh())
    model: Any
    for model in (inner, torch.compile(inner), whole):
        plain = finalize(model)
        assert_plain(plain)
        assert plain._compiled_call_impl is None
        assert all(m._compiled_call_impl is None for m in plain.modules())


def test_what_was_written_to_registered_state_is_taken_over() -> None:
    model = finished(grow=lambda layer: fossils(layer, [0, 2], "mlp", 0.4))
    other = copy.deepcopy(model)
    kasmina_layers(other)["0"].set_alpha([0, 2], 0.9)
    with torch.no_grad():  # as an average of models does
        for mine, theirs in zip(model.buffers(), other.buffers(), strict=True):
            mine.copy_(theirs)
    torch.testing.assert_close(finalize(model)(X).double(), exact(other, X), atol=2e-6, rtol=2e-6)

"""A target becomes a subclass of its own class: what asks for the module meets the module."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.parametrize import is_parametrized

import kasmina_fx
from kasmina_fx import (
    InvalidArgument,
    KasminaLayer,
    TelemetryPolicy,
    kasmina_layers,
    kasminify,
    reference,
    unkasminify,
)
from kasmina_fx.class_swap import SwappedLayer, swap_in, swap_out, swapped_class
from kasmina_fx.layer import SeededModule
from kasmina_fx.testing import graft


def net() -> Any:
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2))


def swapped(model: nn.Module | None = None, **options: Any) -> Any:
    model = net() if model is None else model
    return kasminify(model, num_seeds=3, **({"compile": False} | options))


def by_reference(model: nn.Module, x: Tensor) -> Tensor:
    with reference.reference_mode(model):
        out: Tensor = model(x)
    return out


def test_the_object_its_class_and_its_names_stay() -> None:
    model = net()
    linear, names = model[0], [name for name, _ in model.named_parameters()]
    swapped(model)
    assert model[0] is linear
    assert isinstance(linear, nn.Linear)
    assert isinstance(linear, KasminaLayer)
    assert type(linear).__mro__[-3:] == nn.Linear.__mro__
    assert [name for name, _ in model.named_parameters()] == names
    assert "in_features=4, out_features=6, bias=True, '0', seeds=3" in repr(linear)
    assert unkasminify(model)[0] is linear
    assert type(linear) is nn.Linear
    assert set(linear.__dict__) == set(nn.Linear(4, 6).__dict__)
    assert [name for name, _ in model.named_modules()] == ["", "0", "1", "2"]


def test_attributes_are_looked_up_as_ever() -> None:
    layer: Any = swapped()[0]
    for name in ("__getattr__", "__delattr__"):
        assert getattr(type(layer), name) is getattr(nn.Module, name)
    with pytest.raises(AttributeError, match="'KasminaLinear' object has no attribute 'nothing'"):
        _ = layer.nothing


def test_a_shallow_copy_takes_nothing_from_the_layer() -> None:
    layer = swapped()[0]
    shallow = copy.copy(layer)
    assert torch.equal(shallow(torch.ones(1, 4)), layer(torch.ones(1, 4)))
    del shallow
    assert layer.kasmina.host.base is layer
    graft(layer, [0], "mlp")


def test_one_class_for_each_class_whatever_the_number_of_layers() -> None:
    model = swapped()
    assert type(model[0]) is type(model[2]) is swapped_class(nn.Linear)


def test_shared_modules_stay_one_and_tied_weights_stay_tied() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(4, 4))
    model[3].weight = shared.weight
    swapped(model)
    assert model[0] is model[2]
    assert list(kasmina_layers(model)) == ["0", "3"]
    assert model[3].weight is shared.weight
    graft(kasmina_layers(model)["0"], [0], "affine")
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), by_reference(model, x))


def test_attributes_that_one_sets_are_what_runs() -> None:
    conv = nn.Conv2d(1, 4, 3)
    model = swapped(nn.Sequential(conv), targets=[nn.Conv2d])
    model[0].stride = (2, 2)
    assert model(torch.randn(1, 1, 9, 9)).shape == (1, 4, 4, 4)
    model[0].my_flag = "mine"
    assert conv.my_flag == "mine"
    norm = swapped(nn.Sequential(nn.BatchNorm1d(4)), targets=[nn.BatchNorm1d])
    norm[0].momentum = 1.0
    x = torch.randn(8, 4) + 3
    norm(x)
    torch.testing.assert_close(norm[0].running_mean, x.mean(0))


def test_parameters_are_deleted_replaced_and_registered_as_ever() -> None:
    model = swapped()
    del model[0].bias
    model[0].register_parameter("bias", None)
    assert [n for n, _ in model[0].named_parameters()] == ["weight"]
    x = torch.randn(3, 4)
    torch.testing.assert_close(model[0](x), x @ model[0].weight.T)
    tied = nn.Parameter(torch.zeros(6, 4))
    model[0].weight = tied
    assert not model[0](x).any()
    assert dict(model.named_parameters())["0.weight"] is tied


def test_init_functions_and_type_filters_meet_a_linear() -> None:
    model = swapped()
    graft(model[0], [0], "affine")

    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 0.5)

    model.apply(init)
    assert bool((model[0].weight == 0.5).all())
    decay = [p for m in model.modules() if isinstance(m, nn.Linear) for p in (m.weight,)]
    assert {id(p) for p in decay} == {id(model[0].weight), id(model[2].weight)}


def test_hooks_see_the_layer_and_what_it_returns() -> None:
    model = swapped()
    graft(model[0], [0], "affine", alpha=1.0)
    with torch.no_grad():
        for parameter in model[0].blueprint_parameters():
            parameter.zero_()
    seen: list[tuple[nn.Module, Tensor]] = []
    model[0].register_forward_hook(lambda module, args, out: seen.append((module, out)))
    model(torch.randn(3, 4))
    ((module, out),) = seen
    assert module is model[0]
    assert not out[:, :2].any()


def _pruned(module: nn.Module) -> None:
    prune.l1_unstructured(module, "weight", amount=0.5)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "prune": _pruned,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old spectral_norm": torch.nn.utils.spectral_norm,
}


@pytest.mark.parametrize("first", ["change", "swap"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_computes_a_weight_goes_on_doing_so(
    change: Callable[[nn.Module], object], first: str
) -> None:
    torch.manual_seed(1)
    plain = net().eval()
    model = copy.deepcopy(plain)
    torch.manual_seed(2)
    change(plain[0])
    torch.manual_seed(2)
    if first == "change":
        change(model[0])
        swapped(model)
    else:
        swapped(model)
        change(model[0])
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), plain(x), atol=0, rtol=0)
    assert isinstance(model[0], nn.Linear)
    assert isinstance(model[0], KasminaLayer)
    host = {k for k in model.state_dict() if ".kasmina." not in k}
    assert host == set(plain.state_dict())
    graft(model[0], [0, 1], "affine")
    torch.testing.assert_close(model(x), by_reference(model, x))
    if is_parametrized(model[0]):  # torch copies no module whose weight is an attribute
        twin = copy.deepcopy(model)
        torch.testing.assert_close(twin(x), by_reference(model, x))
        assert twin[0].kasmina.host.base is twin[0]
        twin[0].set_alpha([0, 1], 0.0)
        assert model[0].state.alphas.tolist() == [0.5, 0.5, 0]
    model[0].reset([0, 1])
    unkasminify(model)
    torch.testing.assert_close(model(x), plain(x), atol=0, rtol=0)
    assert not isinstance(model[0], SeededModule)
    assert type(model[0]).__name__ == type(plain[0]).__name__


@pytest.mark.parametrize("first", ["change", "swap"])
def test_a_parametrization_is_removed_as_ever(first: str) -> None:
    model = net()
    if first == "change":
        parametrizations.weight_norm(model[0])
        swapped(model)
    else:
        swapped(model)
        parametrizations.weight_norm(model[0])
    weight = model[0].weight.detach().clone()
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is swapped_class(nn.Linear)
    torch.testing.assert_close(model[0].weight, weight)
    assert type(unkasminify(model)[0]) is nn.Linear


def pickled(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("root", [False, True], ids=["in a model", "root"])
def test_copies_are_layers_of_their_own(copied: Callable[[Any], Any], root: bool) -> None:
    model = swapped(nn.Linear(4, 6) if root else net())
    layer = next(iter(kasmina_layers(model).values()))
    graft(layer, [0], "mlp")
    x = torch.randn(3, 4)
    twin = copied(model)
    other = next(iter(kasmina_layers(twin).values()))
    assert type(other) is type(layer)
    assert other.kasmina.host.base is other
    assert torch.equal(twin(x), model(x))
    before = model(x)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    other.set_alpha([0], 1.0)
    assert torch.equal(model(x), before)
    assert not torch.equal(twin(x), before)
    layer.reset([0])
    assert type(unkasminify(model)) is type(nn.Linear(1, 1) if root else net())


def test_base_is_the_plain_module_on_the_same_tensors() -> None:
    model = swapped()
    graft(model[0], [0], "mlp")
    base, x = model[0].base, torch.randn(3, 4)
    assert type(base) is nn.Linear
    torch.testing.assert_close(base(x), x @ model[0].weight.T + model[0].bias)
    assert base.weight is model[0].weight
    assert list(base.state_dict()) == ["weight", "bias"]
    assert not list(base.children())
    base.weight = nn.Parameter(torch.zeros(6, 4))
    assert not model[0].weight.any()


def test_swap_out_is_the_inverse_of_swap_in() -> None:
    linear = nn.Linear(4, 6)
    before = dict(linear.__dict__)
    layer = swap_in(linear, 3, reserve=2)
    assert swap_out(layer) is linear
    assert type(linear) is nn.Linear
    assert linear.__dict__ == before


class Configured(nn.Linear):
    """A user's layer with names of its own that ours has too."""

    def __init__(self) -> None:
        super().__init__(4, 6)
        self.config = {"mine": True}


class Widths(nn.Sequential):
    out_features = 6


def _with_own_forward() -> nn.Module:
    linear = nn.Linear(4, 6)
    linear.forward = lambda x: x  # type: ignore[assignment]
    return linear


def _scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.13 deprecates it
        scripted: nn.Module = torch.jit.script(nn.Linear(4, 6))
    return scripted


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Configured(), "has config of its own"),
        (Widths(nn.Linear(4, 6)), "runs all its children"),
        (_with_own_forward(), "has a forward of its own"),
        (_scripted(), "is compiled already"),
    ],
    ids=["names", "container", "forward", "script"],
)
def test_what_can_not_be_swapped_is_refused_in_words(module: nn.Module, words: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), module)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(InvalidArgument, match=words) as caught:
        kasminify(model, targets=[nn.Linear, type(module)], num_seeds=2)
    assert str(caught.value).startswith("1: ")
    assert [type(m) for m in model.modules()] == kinds
    with pytest.raises(InvalidArgument, match=words):
        swap_in(module, 2)


def test_a_class_that_can_not_be_subclassed_is_refused() -> None:
    class Final(nn.Linear):
        def __init_subclass__(cls) -> None:
            raise TypeError("final")

    with pytest.raises(InvalidArgument, match="can't be subclassed"):
        swap_in(Final(2, 2), 2)


def test_a_class_changed_by_others_since_is_refused() -> None:
    layer = swap_in(nn.Linear(2, 2), 2)
    layer.__class__ = type("Sharded", (type(layer),), {})
    with pytest.raises(InvalidArgument, match="by somebody else"):
        swap_out(layer)


def test_a_swapped_layer_can_do_what_a_layer_by_hand_can() -> None:
    ours = {name for name in dir(KasminaLayer) if not name.startswith("_")}
    assert ours <= set(dir(SwappedLayer))
    for name in ("kasmina", "seeds", "state", "chunks", "base", "request_germination", "advance"):
        assert hasattr(swapped()[0], name)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_root_may_be_the_target(compiled: bool) -> None:
    linear, x = nn.Linear(4, 6), torch.randn(3, 4)
    expected = linear(x)
    if compiled:
        torch.compile(linear, backend="eager")(x)
    assert swapped(linear) is linear
    assert torch.equal(linear(x), expected)
    assert list(kasmina_fx.host_state_dict(linear)) == ["weight", "bias"]
    linear.load_state_dict(nn.Linear(4, 6).state_dict())


def test_what_the_seeds_call_their_host_has_nothing_of_the_seeds() -> None:
    model = swapped()
    graft(model[0], [0, 1], "mlp")
    host = model[0].kasmina.host
    assert list(host.modules()) == [model[0]]
    assert [id(p) for p in host.parameters()] == [id(model[0].weight), id(model[0].bias)]
    norm = swapped(nn.Sequential(nn.BatchNorm1d(6, affine=False)), targets=[nn.BatchNorm1d])
    graft(norm[0], [0], "affine")
    assert list(norm[0].kasmina.host.parameters()) == []
    assert norm[0].kasmina.host.like is norm[0].running_mean
    parametrizations.weight_norm(model[0])
    model(torch.randn(3, 4)).sum().backward()
    own = [p.grad for n, p in model[0].named_parameters() if not n.startswith("kasmina.")]
    expected = torch.stack([g.norm() for g in own if g is not None]).norm()
    torch.testing.assert_close(host.gradient_norm(), expected)


def test_a_module_that_is_resized_has_seeds_with_the_same_settings_and_siblings() -> None:
    policy = TelemetryPolicy(fraction=0.5, in_eval=True)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    kasminify(model, num_seeds=6, telemetry=policy, compile=False)
    resized, other = kasmina_layers(model).values()
    plain: Any = model[0]
    plain.weight, plain.bias = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
    plain.out_features = 4
    assert (resized.num_seeds, resized.chunks.layer_dim) == (4, 4)  # capped, as by kasminify
    store = resized.kasmina
    assert (store.observed, store.one_in, store.in_eval) == (True, 2, True)
    assert resized(torch.ones(2, 4)).shape == (2, 4)
    graft(other, [0], "affine")  # which allocates in every layer of the model
    assert store.has_bank("affine", shared=False)
    graft(resized, [1], "affine")
    with pytest.raises(InvalidArgument, match="out_features can't become 8, seeds have grown"):
        plain.out_features = 8
    assert plain.out_features == 4

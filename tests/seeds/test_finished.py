"""A finished model runs folded: when, how right, and never with what was before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from folded_cases import (
    X,
    assert_as_reference,
    evaluated,
    exact,
    finished,
    fossils,
    held,
    is_folded,
    magnitudes,
    three,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kasmina_fx import (
    KasminaLayer,
    host_state_dict,
    kasmina_layers,
    kasminify,
)

# How right.


@given(data=st.data())
def test_the_error_of_a_folded_layer_is_within_its_bound(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    inputs, seeds = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 6))
    features = data.draw(st.integers(seeds, 30))
    kinds = data.draw(st.lists(st.sampled_from(["affine", "lora", ""]), min_size=seeds))[:seeds]
    torch.manual_seed(data.draw(st.integers(0, 99)))
    model: Any = nn.Sequential(nn.Linear(inputs, features, bias=data.draw(st.booleans())))
    model = kasminify(model.to(dtype), num_seeds=seeds, compile=False).eval()
    (layer,) = kasmina_layers(model).values()
    for seed, kind in enumerate(kinds):
        if kind:
            fossils(layer, seed, kind, data.draw(st.sampled_from([0.0, 0.3, 1.0])))
    x = torch.randn(7, inputs).to(dtype)
    assert is_folded(model, x) == any(kinds)
    error = (evaluated(model, x).double() - exact(model, x)).abs()
    roundings = (inputs + 3) * torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    part = roundings / (1 - roundings)
    if dtype is torch.bfloat16:  # the weight and the output are rounded
        part += 2.01 * 2.0**-8
    judge = (inputs + 40) * torch.finfo(torch.float64).eps / 2 * magnitudes(layer, x, blended=True)
    assert bool((error <= part * magnitudes(layer, x) + judge + torch.finfo(dtype).tiny).all())


def test_shared_blueprints_fold_with_an_alpha_for_each_seed() -> None:
    def shared(layer: KasminaLayer) -> None:
        fossils(layer, [0, 1, 3], layer.register_blueprint("lora"), 0.8)
        layer.set_alpha(1, 0.2)

    model = finished(grow=shared)
    assert is_folded(model, X)
    assert_as_reference(model, X)


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "conv1d": (lambda: nn.Conv1d(3, 11, 3, padding=1), (2, 3, 9), "lora"),
    "conv2d": (lambda: nn.Conv2d(3, 11, 3, stride=2), (2, 3, 9, 8), "affine"),
    "conv2d, no batch dim": (lambda: nn.Conv2d(3, 11, 3), (3, 9, 8), "lora"),
    "conv2d, circular": (
        lambda: nn.Conv2d(3, 11, 3, padding=1, padding_mode="circular", bias=False),
        (2, 3, 9, 8),
        "affine",
    ),
    "conv3d": (lambda: nn.Conv3d(2, 11, 2), (2, 2, 4, 4, 5), "lora"),
    "grouped": (lambda: nn.Conv2d(6, 12, 3, groups=3), (2, 6, 5, 5), "lora"),
    "depthwise": (lambda: nn.Conv2d(11, 11, 3, groups=11), (2, 11, 5, 5), "affine"),
}


@pytest.mark.parametrize(("make", "shape", "kind"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions_fold(make: Callable[[], nn.Module], shape: Any, kind: str) -> None:
    targets = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    model = finished(
        nn.Sequential(make()), lambda layer: fossils(layer, [0, 2], kind), num_seeds=3,
        targets=targets,
    )  # fmt: skip
    x = torch.randn(shape)
    assert is_folded(model, x)
    assert_as_reference(model, x)


def test_a_copy_lies_in_memory_as_the_host_does() -> None:
    plain: Any = nn.Sequential(nn.Conv2d(4, 8, 3))
    plain.to(memory_format=torch.channels_last)
    model = finished(plain, lambda layer: fossils(layer, [0], "lora"), targets=(nn.Conv2d,))
    x = torch.randn(2, 4, 6, 6)
    assert_as_reference(model, x)
    copied = held(model)
    assert copied is not None
    assert copied.weight is not None
    assert copied.weight.stride() == model[0].weight.stride()


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_without_seeds_in_use_is_its_host_to_the_bit(bias: bool) -> None:
    model, plain = finished(three(bias)), three(bias)
    plain.load_state_dict(host_state_dict(model))
    seen: list[Tensor] = []
    model[2].register_forward_hook(lambda module, args, out: seen.extend([*args, out]))
    assert is_folded(model, X, "2")
    assert torch.equal(seen[1], evaluated(plain[2], seen[0]))
    folded = held(model, "2")
    assert folded is not None
    assert folded.bias is not None
    assert bias or bool((folded.bias == 0).all() and folded.bias.signbit().all())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("kind", ["affine", "lora"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_blueprint_that_is_not_finite_does_not_run(
    kind: str, value: float, which: int, bias: bool
) -> None:
    model = finished(three(bias), lambda layer: fossils(layer, [1, 3], kind))
    with torch.no_grad():
        list(model[0].blueprint_parameters(False))[which][0].view(-1)[0] = value
    assert is_folded(model, X)
    folded = held(model)
    assert folded is not None
    assert folded.weight is not None
    assert torch.equal(folded.weight[3:6], model[0].weight[3:6])
    assert not torch.equal(folded.weight[9:12], model[0].weight[9:12])
    assert_as_reference(model, X)


def test_a_blueprint_that_would_overflow_the_weight_does_not_run() -> None:
    model = finished(grow=lambda layer: fossils(layer, [1], "affine", 1.0))
    with torch.no_grad():
        model[0].weight.fill_(1e5)
        for stack in model[0].blueprint_parameters(False):
            stack.fill_(1e38)
    evaluated(model, X)
    folded = held(model)
    assert folded is not None
    assert folded.weight is not None
    assert torch.equal(folded.weight, model[0].weight)
    assert bool(folded.bias is not None and torch.equal(folded.bias, model[0].bias))

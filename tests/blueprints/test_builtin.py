"""Built-in blueprints: one module, and a stack of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blueprint_cases import BUILTINS, user
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from kasmina_fx.blueprints import Blueprint, lookup, register
from kasmina_fx.blueprints.base import as_rows, from_rows

#: Shape of one chunk with its feature dim: rows, rows of tokens, a convolution's.
CHUNKS = {
    "2-D": ((5,), ()),
    "3-D": ((2, 3), ()),
    "conv": ((2,), (3, 4)),
    "features alone": ((), ()),
}


def _blueprint(kind: str) -> Blueprint:
    return lookup(register(user, name="user") if kind == "user" else kind)


def _stacks(blueprint: Blueprint, size: int, count: int) -> list[Tensor]:
    """Initial values, moved away from where residual blueprints do nothing."""
    stacks = []
    for spec, stack in zip(blueprint.specs(size), blueprint.initial(size, count), strict=True):
        if stack.is_floating_point():
            stack = stack.double() + 0.3 * torch.randn_like(stack, dtype=torch.float64)
        stacks.append(stack.requires_grad_(spec.trainable))
    return stacks


@pytest.mark.parametrize("shape", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize("kind", [*BUILTINS, "user"])
@pytest.mark.parametrize(("slots", "members"), [(1, 1), (3, 1), (2, 4), (1, 2)])
def test_a_stack_equals_its_modules_one_by_one(
    kind: str,
    size: int,
    shape: tuple[tuple[int, ...], tuple[int, ...]],
    slots: int,
    members: int,
) -> None:
    before, after = shape
    dim = -1 - len(after)
    blueprint = _blueprint(kind)
    stacks = _stacks(blueprint, size, slots)
    chunks = torch.randn(
        slots, members, *before, size, *after, dtype=torch.float64, requires_grad=True
    )
    got = blueprint.stacked(stacks, chunks, dim)
    assert got.shape == chunks.shape

    module: Any = blueprint.module(size).double()
    if hasattr(module, "dim"):
        module.dim = dim
    spec_names = [spec.name for spec in blueprint.specs(size)]
    expected = torch.stack(
        [
            torch.stack(
                [
                    functional_call(
                        module,
                        dict(zip(spec_names, (stack[k] for stack in stacks), strict=True)),
                        chunks[k, m],
                    )
                    for m in range(members)
                ]
            )
            for k in range(slots)
        ]
    )
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)

    leaves = [chunks, *(stack for stack in stacks if stack.requires_grad)]
    weight = torch.linspace(-1, 2, got.numel(), dtype=torch.float64).reshape(got.shape)
    ours = torch.autograd.grad((got * weight).sum(), leaves)
    theirs = torch.autograd.grad((expected * weight).sum(), leaves)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("size", [1, 2, 5, 16])
@pytest.mark.parametrize("kind", [*BUILTINS, "user"])
def test_initial_values_have_the_shapes_of_the_specs(kind: str, size: int) -> None:
    blueprint = _blueprint(kind)
    specs = blueprint.specs(size)
    for count in (0, 1, 3):
        if count == 0 and kind == "user":
            continue  # a bank asks for none
        initial = blueprint.initial(size, count)
        assert [tuple(t.shape) for t in initial] == [(count, *spec.shape) for spec in specs]
        assert all(not t.requires_grad for t in initial)
    module = blueprint.module(size)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert [spec.name for spec in specs] == list(tensors)
    for spec in specs:
        tensor = tensors[spec.name]
        assert tuple(tensor.shape) == spec.shape
        assert spec.trainable == tensor.requires_grad
        assert spec.dtype == (None if tensor.is_floating_point() else tensor.dtype)


def test_asking_for_specs_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    for kind in (*BUILTINS, "user"):
        _blueprint(kind).specs(4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["lora", "affine", "bottleneck"])
@pytest.mark.parametrize("dim", [-1, -3])
def test_residual_blueprints_start_as_the_identity(kind: str, dim: int) -> None:
    blueprint = lookup(kind)
    shape = [2, 3, 4, 5, 6]
    x = torch.randn(shape, dtype=torch.float64)
    initial = [t.double() for t in blueprint.initial(shape[dim], 2)]
    assert torch.equal(blueprint.stacked(initial, x, dim), x)
    module = blueprint.module(6).double()
    assert torch.equal(module(x), x)


@pytest.mark.parametrize("kind", ["mlp", "lora", "bottleneck"])
def test_fresh_weights_are_drawn_as_torch_draws_them(kind: str) -> None:
    size, count = 16, 200
    blueprint = lookup(kind)
    for spec, stack in zip(blueprint.specs(size), blueprint.initial(size, count), strict=True):
        modules = [blueprint.module(size) for _ in range(count)]
        theirs = torch.stack([m.get_parameter(spec.name).detach() for m in modules])
        torch.testing.assert_close(stack.amax(), theirs.amax(), atol=0.01, rtol=0.05)
        torch.testing.assert_close(stack.std(), theirs.std(), atol=0.002, rtol=0.05)
        if bool(stack[0].std() > 0):
            assert not torch.equal(stack[0], stack[1])


def test_the_mlp_and_the_affine_by_hand() -> None:
    x = torch.tensor([[[[1.0, -2.0]]]])  # one slot, one member, one row of two features
    up = torch.tensor([[[1.0, 0], [0, 1], [-1, 0], [0, -1]]])
    down = torch.tensor([[[1.0, 0, -1, 0], [0, 1, 0, -1]]])
    zeros = [torch.zeros(1, 4), torch.tensor([[0.0, 0.5]])]
    out = lookup("mlp").stacked([up, zeros[0], down, zeros[1]], x, -1)
    assert out.tolist() == [[[[1.0, -1.5]]]]  # relu(x) - relu(-x) = x, plus the bias
    affine = [torch.tensor([[2.0, 3.0]]), torch.tensor([[1.0, 0.0]])]
    assert lookup("affine").stacked(affine, x, -1).tolist() == [[[[3.0, -6.0]]]]


def test_the_bottleneck_normalises_features_alone() -> None:
    params = [t.double() for t in lookup("bottleneck").initial(4, 1)]
    params[4] = torch.randn(1, 4, 2, dtype=torch.float64)
    x = torch.randn(1, 1, 3, 4, dtype=torch.float64)
    delta = lookup("bottleneck").stacked(params, x, -1) - x
    scaled = lookup("bottleneck").stacked(params, x * 50 + 7, -1) - (x * 50 + 7)
    torch.testing.assert_close(delta, scaled, atol=1e-3, rtol=1e-3)
    hidden = F.gelu(F.linear(F.layer_norm(x, (4,)), params[2][0], params[3][0]))
    torch.testing.assert_close(delta, F.linear(hidden, params[4][0]))


@given(
    st.integers(1, 3),
    st.lists(st.integers(1, 3), max_size=2),
    st.integers(1, 4),
    st.lists(st.integers(1, 3), max_size=2),
)
def test_rows_and_back(slots: int, before: list[int], size: int, after: list[int]) -> None:
    chunks = torch.randn(slots, *before, size, *after)
    dim = -1 - len(after)
    rows = as_rows(chunks, dim)
    assert rows.dim() == 3
    assert (rows.shape[0], rows.shape[2]) == (slots, size)
    assert torch.equal(from_rows(rows, chunks, dim), chunks)

"""The operator that decides which gradients leave a blueprint."""

from __future__ import annotations

import pytest
import torch
from operator_cases import BLAMES, INF, MODES, NAN, POSITIONS, F, L, R, bank, guarded
from torch import Tensor
from torch._inductor.utils import fresh_cache

from kasmina_fx.physical import operators
from kasmina_fx.physical.operators import DECOMPOSITIONS, GUARD, RECONSTRUCT


def test_guard_is_the_identity_on_copies() -> None:
    tensors, faults = bank(), torch.zeros(5, requires_grad=True)
    for run in (GUARD, DECOMPOSITIONS[GUARD], operators._plain_guard):
        *same, alone, sane = run(tensors, MODES, POSITIONS, faults, BLAMES)
        assert len(same) == len(tensors)
        assert all(torch.equal(a, b) for a, b in zip(same, tensors, strict=True))
        assert alone.tolist() == [0, 1, 1, 1]
        assert alone.dtype == torch.float32
        assert sane.tolist() == [True] * 4
    copies = GUARD(tensors, MODES, POSITIONS, faults, BLAMES)[:-2]
    assert all(a is not b for a, b in zip(copies, tensors, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_guard_passes_opcheck(dtype: torch.dtype) -> None:
    tensors = [t.detach().to(dtype).requires_grad_() for t in bank()]
    faults = torch.zeros(5, requires_grad=True)
    torch.library.opcheck(GUARD, (tensors, MODES, POSITIONS, faults, BLAMES))


def test_guard_lets_gradients_through_by_mode() -> None:
    tensors = bank()
    grads = [torch.randn_like(t) for t in tensors]
    (rows, *params), faults = guarded(tensors, grads)
    for slot, (to_host, to_params) in enumerate([(1, 1), (1, 0), (0, 1), (1, 0)]):
        assert torch.equal(rows[slot], grads[0][slot] * to_host)
        for passed, grad in zip(params, grads[1:], strict=True):
            assert torch.equal(passed[slot], grad[slot] * to_params)
    assert faults == [0] * 5


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("which", [1, 2], ids=["first", "second"])
@pytest.mark.parametrize("slot", [0, 1, 2])
def test_guard_stops_the_parameters_of_a_slot_together(slot: int, which: int, value: float) -> None:
    tensors = bank()
    grads = [torch.randn_like(t) for t in tensors]
    (rows, *clean), _ = guarded(tensors, grads)
    grads[which][slot].view(-1)[-1] = value
    (same, *passed), faults = guarded(tensors, grads)
    assert torch.equal(same, rows)
    for now, before in zip(passed, clean, strict=True):
        assert not now[slot].any()
        others = [i for i in range(4) if i != slot]
        assert torch.equal(now[others], before[others])
    learns = bool((MODES[slot] != F).any())  # else nobody asked for them
    assert faults == [float(position == slot and learns) for position in POSITIONS.tolist()]


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("slot", [0, 1, 2])
def test_guard_stops_each_element_of_the_rows_for_itself(slot: int, value: float) -> None:
    tensors = bank()
    grads = [torch.randn_like(t) for t in tensors]
    (rows, *clean), _ = guarded(tensors, grads)
    grads[0][slot].view(-1)[-1] = value
    (now, *passed), faults = guarded(tensors, grads)
    rows[slot].view(-1)[-1] = 0.0
    assert torch.equal(now, rows)
    assert all(torch.equal(a, b) for a, b in zip(passed, clean, strict=True))
    assert faults == [float(position == slot) for position in POSITIONS.tolist()]


@pytest.mark.parametrize("op", [GUARD, RECONSTRUCT], ids=lambda op: op.name())
def test_inductor_finds_what_is_not_finite(op: torch._ops.OpOverload) -> None:
    # It folds ``x * 0`` to 0, so a check by that product passes everywhere but there.
    def step(*given: Tensor) -> Tensor:
        *tensors, weight, faults = given
        if op is GUARD:
            rows, *_ = op(tensors, MODES, POSITIONS, faults, BLAMES)
        else:
            rows = tensors[0]
            zeros, ran = torch.zeros_like(rows), BLAMES[:, 0]
            rows = op(rows, zeros, torch.tensor([-1]), torch.ones(()), ran, ran)
        total: Tensor = (rows * weight).sum()
        return total

    tensors, weight = bank(), torch.ones(4, 1, 3, 2, dtype=torch.float64)
    weight[0, 0, 1, 1], weight[2, 0, 0, 0] = INF, NAN
    faults = torch.zeros(5, requires_grad=True)
    leaves = [tensors[0], faults] if op is GUARD else [tensors[0]]
    with fresh_cache():  # plain Inductor's knows an operator by its name, whatever its backward
        out = torch.compile(step, fullgraph=True)(*tensors, weight, faults)
        found = torch.autograd.grad(out, leaves)
    expected = torch.autograd.grad(step(*tensors, weight, faults), leaves)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert expected[0].isfinite().all()
    kept = torch.where(weight.isfinite(), weight, 0.0)
    if op is GUARD:
        kept = kept * (MODES != R).view(4, 1, 1, 1)
    assert torch.equal(expected[0], kept)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_guard_says_which_slots_have_finite_parameters(value: float) -> None:
    rows, first, second = (t.detach() for t in bank())
    first[1].view(-1)[0], second[2].view(-1)[-1], rows[3] = value, value, value
    faults = torch.zeros(5, requires_grad=True)
    for run in (GUARD, DECOMPOSITIONS[GUARD], operators._plain_guard):
        *_, sane = run([rows, first, second], MODES, POSITIONS, faults, BLAMES)
        assert sane.tolist() == [True, False, False, True]


def test_a_slot_that_did_not_run_is_not_blamed() -> None:
    tensors = bank()
    with torch.no_grad():
        tensors[1][0] = NAN
    grads = [torch.full_like(t, NAN) for t in tensors]
    _, faults = guarded(tensors, grads)
    assert faults == [float(position in (1, 2)) for position in POSITIONS.tolist()]


def test_a_fault_in_a_free_slot_is_nobodys() -> None:
    tensors = bank()
    grads = [torch.randn_like(t) for t in tensors]
    grads[0][3] = NAN
    passed, faults = guarded(tensors, grads)
    assert not passed[0][3].any()
    assert faults == [0] * 5


def test_seeds_that_share_a_slot_have_their_own_rows_and_one_set_of_parameters() -> None:
    tensors = [torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)]
    grads = [torch.randn_like(t) for t in tensors]
    modes, positions = torch.tensor([[F, R, L], [F, F, F]]), torch.tensor([1, 0, 2, 3])
    (rows, param), faults = guarded(tensors, grads, modes, positions)
    assert torch.equal(rows, grads[0] * (modes != R).unsqueeze(-1))
    assert torch.equal(param[0], grads[1][0])
    assert not param[1].any()
    grads[0][0, 2, 1] = INF
    (rows, param), faults = guarded(tensors, grads, modes, positions)
    assert rows[0, 2, 1] == 0
    assert torch.equal(rows[0, 2, 2:], grads[0][0, 2, 2:])
    assert torch.equal(param[0], grads[1][0])
    assert torch.equal(rows[1], grads[0][1])
    assert faults == [1, 1, 1, 0]
    grads[1][0, 1] = NAN
    (rows, param), faults = guarded(tensors, grads, modes, positions)
    assert not param.any()
    assert faults == [1, 1, 1, 0]


def test_guard_blames_a_blueprint_for_nothing_but_its_own_faults() -> None:
    tensors = bank()
    grads = [torch.full_like(t, NAN) for t in tensors]
    blames = torch.tensor([[True], [False], [True], [True]])
    (rows, *params), faults = guarded(tensors, grads, blames=blames)
    assert not any(t.any() for t in (rows, *params))
    assert faults == [1, 0, 1, 0, 0]  # slots 2 and 0; 1 is not blamed


def test_guard_undoes_what_gradients_were_scaled_down_by() -> None:
    tensors = bank()
    grads = [torch.randn_like(t) for t in tensors]
    (rows, *params), _ = guarded(tensors, grads, less=torch.tensor([0.0, 0.0, 7.0, 0.0]))
    (same, *before), _ = guarded(tensors, grads)
    assert torch.equal(rows, same)
    for now, then in zip(params, before, strict=True):
        assert torch.equal(now, then * torch.tensor([1, 1, 8, 1]).view(-1, *[1] * (now.dim() - 1)))


def test_guard_takes_tensors_that_have_no_gradient() -> None:
    rows, weight = (torch.randn(4, 1, 2, requires_grad=True), torch.randn(4, 2, requires_grad=True))
    counter = torch.arange(4)
    faults = torch.zeros(5, requires_grad=True)
    out = GUARD([rows, weight, counter], MODES, POSITIONS, faults, BLAMES)
    assert torch.equal(out[2], counter)
    (out[0].sum() + out[1].sum()).backward()
    assert weight.grad is not None
    assert weight.grad.any(1).tolist() == [True, False, True, False]


def test_a_blueprint_that_ignores_its_chunk_sends_it_no_gradient_and_is_blamed_all_the_same() -> (
    None
):
    tensors, faults = bank(), torch.zeros(5, requires_grad=True)
    _, first, *_ = GUARD(tensors, MODES, POSITIONS, faults, BLAMES)
    factor = torch.ones_like(first)
    factor[0, 1] = NAN
    (first * factor).sum().backward()
    assert tensors[0].grad is None
    assert tensors[2].grad is None
    assert tensors[1].grad is not None
    assert tensors[1].grad.tolist() == [[0, 0], [0, 0], [1, 1], [0, 0]]
    assert faults.grad is not None
    assert faults.grad.tolist() == [float(position == 0) for position in POSITIONS.tolist()]


@pytest.mark.parametrize("capacity", [5, 9])
def test_parameters_of_slots_not_in_use_stay_outside_and_get_no_gradient(capacity: int) -> None:
    tensors = [torch.randn(4, 1, 2, requires_grad=True)]
    tensors += [torch.randn(capacity, *rest, requires_grad=True) for rest in ((2,), (2, 3))]
    with torch.no_grad():
        tensors[1][4:] = NAN  # nobody asks
    faults = torch.zeros(5, requires_grad=True)
    for run in (GUARD, DECOMPOSITIONS[GUARD], operators._plain_guard):
        _, first, second, _, sane = run(tensors, MODES, POSITIONS, faults, BLAMES)
        assert torch.equal(first, tensors[1][:4])
        assert torch.equal(second, tensors[2][:4])
        assert sane.tolist() == [True] * 4
    grads = [torch.randn(4, *t.shape[1:]) for t in tensors]
    passed, counted = guarded(tensors, grads)
    exact, _ = guarded([t[:4].detach().requires_grad_() for t in tensors], grads)
    for found, expected in zip(passed, exact, strict=True):
        assert torch.equal(found[:4], expected)
        assert not found[4:].any()
    assert counted == [0] * 5


def test_guard_takes_parameters_of_one_number() -> None:
    tensors = [torch.randn(4, 1, 2, requires_grad=True), torch.randn(4, requires_grad=True)]
    (_, gain), faults = guarded(tensors, [torch.ones_like(t) for t in tensors])
    assert gain.tolist() == [1, 0, 1, 0]
    assert faults == [0] * 5


def test_guard_without_its_operator_has_the_same_gradients_where_they_are_finite() -> None:
    tensors = bank()
    grads = [torch.randn_like(t) for t in tensors]
    expected, _ = guarded(tensors, grads)
    faults = torch.zeros(5, requires_grad=True)
    found = torch.autograd.grad(
        operators._plain_guard(tensors, MODES, POSITIONS, faults, BLAMES)[:-2], tensors, grads
    )
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)

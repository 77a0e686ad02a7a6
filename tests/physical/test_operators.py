"""The operators that move rows, guard and reconstruct."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache

from kasmina_fx.lifecycle import Mode
from kasmina_fx.physical import moves, operators
from kasmina_fx.physical.operators import DECOMPOSITIONS, GATHER, GUARD, PULL, RECONSTRUCT

F, L, R = Mode.FROZEN, Mode.LEARNS, Mode.RECONSTRUCTS
F, L, R = Mode.FROZEN, Mode.LEARNS, Mode.RECONSTRUCTS
F, L, R = Mode.FROZEN, Mode.LEARNS, Mode.RECONSTRUCTS
NAN, INF = float("nan"), float("inf")
NAN, INF = float("nan"), float("inf")
moving = pytest.mark.parametrize("op", [PULL, GATHER], ids=["pull", "gather"])


def maps() -> tuple[Tensor, Tensor]:
    """Which of 5 seeds sits in each of 4 slots, and the inverse; some have no partner."""
    seeds = torch.tensor([4, 1, -1, 2])
    return seeds, torch.tensor([-1, 1, 3, -1, 0])


@moving
def test_moving_operators_pass_opcheck_and_gradcheck(op: torch._ops.OpOverload) -> None:
    seeds, positions = maps()
    f = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(op, (f, seeds, positions))
    assert torch.autograd.gradcheck(lambda f: op(f, seeds, positions), f)
    assert torch.autograd.gradgradcheck(lambda f: op(f, seeds, positions), f)


@moving
def test_moving_operators_take_partners_and_zeros(op: torch._ops.OpOverload) -> None:
    seeds, positions = maps()
    f = torch.arange(1.0, 6.0).unsqueeze(1)
    assert op(f, seeds, positions).flatten().tolist() == [5, 2, 0, 3]


@moving
def test_what_has_no_partner_is_zero_whatever_is_in_the_first_row(
    op: torch._ops.OpOverload,
) -> None:
    f = torch.tensor([NAN, 1.0, 2.0])
    index, inverse = torch.tensor([-1, 2, -1, 0]), torch.tensor([3, -1, 1])
    for run in (op, DECOMPOSITIONS[op], moves.take):
        out = run(f, index, inverse).tolist()
        assert out[:3] == [0, 2, 0]
        assert out[3] != out[3]


def test_a_gather_hands_no_strangers_gradient_back() -> None:
    seeds, positions = maps()
    f = torch.randn(5, 2, requires_grad=True)
    grad = torch.arange(1.0, 9.0).view(4, 2)
    GATHER(f, seeds, positions).backward(grad)
    assert f.grad is not None
    assert f.grad.tolist() == [[0, 0], [3, 4], [7, 8], [0, 0], [1, 2]]


#: Slots: one that learns, one frozen, one in TRAINING, one free; 5 seeds, of which 2 are outside.
MODES = torch.tensor([[L], [F], [R], [F]])
POSITIONS = torch.tensor([2, -1, 0, -1, 1])
BLAMES = torch.ones(4, 1, dtype=torch.bool)
ALONE = torch.ones(5)


def _bank() -> list[Tensor]:
    """Rows ``(4, 1, 3, 2)`` and two parameters."""
    shapes = [(4, 1, 3, 2), (4, 2), (4, 2, 3)]
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


def _guarded(
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor],
    modes: Tensor = MODES,
    positions: Tensor = POSITIONS,
    blames: Tensor | None = None,
    less: Tensor | None = None,
) -> tuple[list[Tensor], list[float]]:
    """What reaches each of the tensors, and the faults."""
    faults = torch.zeros(len(positions), requires_grad=True)
    blames = torch.ones_like(modes, dtype=torch.bool) if blames is None else blames
    out = GUARD(list(tensors), modes, positions, faults, blames)
    given = [*grads, torch.zeros(len(modes)) if less is None else less]
    passed = torch.autograd.grad(out, [*tensors, faults], given)
    return list(passed[:-1]), passed[-1].tolist()


def test_guard_is_the_identity_on_copies() -> None:
    tensors, faults = _bank(), torch.zeros(5, requires_grad=True)
    for run in (GUARD, DECOMPOSITIONS[GUARD], operators._plain_guard):
        *same, alone = run(tensors, MODES, POSITIONS, faults, BLAMES)
        assert len(same) == len(tensors)
        assert all(torch.equal(a, b) for a, b in zip(same, tensors, strict=True))
        assert alone.tolist() == [0, 1, 1, 1]
        assert alone.dtype == torch.float32
    copies = GUARD(tensors, MODES, POSITIONS, faults, BLAMES)[:-1]
    assert all(a is not b for a, b in zip(copies, tensors, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_guard_passes_opcheck(dtype: torch.dtype) -> None:
    tensors = [t.detach().to(dtype).requires_grad_() for t in _bank()]
    faults = torch.zeros(5, requires_grad=True)
    torch.library.opcheck(GUARD, (tensors, MODES, POSITIONS, faults, BLAMES))


def test_guard_lets_gradients_through_by_mode() -> None:
    tensors = _bank()
    grads = [torch.randn_like(t) for t in tensors]
    (rows, *params), faults = _guarded(tensors, grads)
    for slot, (to_host, to_params) in enumerate([(1, 1), (1, 0), (0, 1), (1, 0)]):
        assert torch.equal(rows[slot], grads[0][slot] * to_host)
        for passed, grad in zip(params, grads[1:], strict=True):
            assert torch.equal(passed[slot], grad[slot] * to_params)
    assert faults == [0] * 5


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["rows", "first", "second"])
@pytest.mark.parametrize("slot", [0, 1, 2])
def test_guard_stops_a_slot_with_any_gradient_that_is_not_finite(
    slot: int, which: int, value: float
) -> None:
    tensors = _bank()
    grads = [torch.randn_like(t) for t in tensors]
    clean, _ = _guarded(tensors, grads)
    grads[which][slot].view(-1)[-1] = value
    passed, faults = _guarded(tensors, grads)
    for now, before in zip(passed, clean, strict=True):
        assert not now[slot].any()
        others = [i for i in range(4) if i != slot]
        assert torch.equal(now[others], before[others])
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
            rows = op(
                rows, torch.zeros_like(rows), torch.tensor([-1]), torch.ones(()), BLAMES[:, 0]
            )
        total: Tensor = (rows * weight).sum()
        return total

    tensors, weight = _bank(), torch.ones(4, 1, 3, 2, dtype=torch.float64)
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
    assert not expected[0][[0, 2]].any()


def test_a_fault_in_a_free_slot_is_nobodys() -> None:
    tensors = _bank()
    grads = [torch.randn_like(t) for t in tensors]
    grads[0][3] = NAN
    passed, faults = _guarded(tensors, grads)
    assert not passed[0][3].any()
    assert faults == [0] * 5


def test_seeds_that_share_a_slot_have_their_own_rows_and_one_set_of_parameters() -> None:
    tensors = [torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)]
    grads = [torch.randn_like(t) for t in tensors]
    modes, positions = torch.tensor([[F, R, L], [F, F, F]]), torch.tensor([1, 0, 2, 3])
    (rows, param), faults = _guarded(tensors, grads, modes, positions)
    assert torch.equal(rows, grads[0] * (modes != R).unsqueeze(-1))
    assert torch.equal(param[0], grads[1][0])
    assert not param[1].any()
    grads[0][0, 2, 1] = INF
    (rows, param), faults = _guarded(tensors, grads, modes, positions)
    assert not rows[0].any()
    assert not param.any()
    assert torch.equal(rows[1], grads[0][1])
    assert faults == [1, 1, 1, 0]


def test_guard_blames_a_blueprint_for_nothing_but_its_own_faults() -> None:
    tensors = _bank()
    grads = [torch.full_like(t, NAN) for t in tensors]
    blames = torch.tensor([[True], [False], [True], [True]])
    (rows, *params), faults = _guarded(tensors, grads, blames=blames)
    assert not any(t.any() for t in (rows, *params))
    assert faults == [1, 0, 1, 0, 0]  # slots 2 and 0; 1 is not blamed


def test_guard_undoes_what_gradients_were_scaled_down_by() -> None:
    tensors = _bank()
    grads = [torch.randn_like(t) for t in tensors]
    (rows, *params), _ = _guarded(tensors, grads, less=torch.tensor([0.0, 0.0, 7.0, 0.0]))
    (same, *before), _ = _guarded(tensors, grads)
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


def test_guard_takes_parameters_of_one_number() -> None:
    tensors = [torch.randn(4, 1, 2, requires_grad=True), torch.randn(4, requires_grad=True)]
    (_, gain), faults = _guarded(tensors, [torch.ones_like(t) for t in tensors])
    assert gain.tolist() == [1, 0, 1, 0]
    assert faults == [0] * 5


def test_guard_without_its_operator_has_the_same_gradients_where_they_are_finite() -> None:
    tensors = _bank()
    grads = [torch.randn_like(t) for t in tensors]
    expected, _ = _guarded(tensors, grads)
    faults = torch.zeros(5, requires_grad=True)
    found = torch.autograd.grad(
        operators._plain_guard(tensors, MODES, POSITIONS, faults, BLAMES)[:-1], tensors, grads
    )
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


TRAINEES = torch.tensor([3, 1, -1, -1])


def _loss(f: Tensor, rows: Tensor, places: Sequence[int]) -> Tensor:
    """Sum over the trainees of the mean squared difference."""
    losses = [(f[i] - rows[i]).square().mean() for i in places]
    return torch.stack([*losses, f.new_zeros(())]).sum()


def _check_reconstruct(shape: Sequence[int], trainees: list[int], scale: float) -> None:
    f = torch.randn(5, *shape, dtype=torch.float64, requires_grad=True)
    rows, grad = torch.randn_like(f, requires_grad=True), torch.randn_like(f)
    out = RECONSTRUCT(f, rows, torch.tensor(trainees), torch.tensor(scale), ALONE)
    assert torch.equal(out, f)
    assert out is not f
    (found,) = torch.autograd.grad(out, f, grad)
    loss = 0 * f.sum() + scale * _loss(f, rows.detach(), [i for i in trainees if i >= 0])
    (of_loss,) = torch.autograd.grad(loss, f)
    torch.testing.assert_close(found, grad + of_loss, atol=1e-15, rtol=1e-13)
    untouched = [i for i in range(5) if i not in trainees]
    assert torch.equal(found[untouched], grad[untouched])


@pytest.mark.parametrize("trainees", [[3, 1], [3, 1, -1, -1], [0, -1], [-1, -1], [4, 3, 2, 1, 0]])
@pytest.mark.parametrize("scale", [1.0, 65536.0, 0.0])
def test_reconstruct_adds_the_gradient_of_the_scaled_loss(
    trainees: list[int], scale: float
) -> None:
    _check_reconstruct((4, 2), trainees, scale)


def test_reconstruct_adds_it_to_the_last_digit_for_any_number_of_elements() -> None:
    _check_reconstruct((3, 2), [3, 1], 1.0)


def test_reconstruct_sends_nothing_to_the_chunks() -> None:
    f, rows = (torch.randn(5, 3, requires_grad=True) for _ in range(2))
    RECONSTRUCT(f, rows, TRAINEES, torch.ones(()), ALONE).sum().backward()
    assert rows.grad is None or not rows.grad.any()


def test_padding_adds_nothing_even_where_the_first_place_is_not_finite() -> None:
    f = torch.randn(5, 3, requires_grad=True)
    with torch.no_grad():
        f[0] = NAN
    (found,) = torch.autograd.grad(
        RECONSTRUCT(f, torch.zeros(5, 3), TRAINEES, torch.ones(()), ALONE).sum(), f
    )
    assert found[[0, 2, 4]].tolist() == [[1.0] * 3] * 3


def test_the_loss_scale_is_read_as_it_was_in_forward() -> None:
    f, rows = torch.ones(2, 1, requires_grad=True), torch.zeros(2, 1)
    scale = torch.tensor(4.0)
    out = RECONSTRUCT(f, rows, torch.tensor([0, -1]), scale, torch.ones(2))
    (found,) = torch.autograd.grad(out, f, torch.zeros(2, 1))
    assert found.tolist() == [[8.0], [0.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_reconstruct_computes_in_float32_and_keeps_the_dtype(dtype: torch.dtype) -> None:
    f = (300 + torch.randn(5, 64)).to(dtype).requires_grad_()
    rows = torch.randn(5, 64).to(dtype)
    (found,) = torch.autograd.grad(
        RECONSTRUCT(f, rows, TRAINEES, torch.ones(()), ALONE * 0), f, torch.zeros_like(f)
    )
    assert found.dtype == dtype
    wide = f.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(_loss(wide, rows.double(), [3, 1]), wide)
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(found.double(), expected, atol=0, rtol=tolerance)


def test_in_float16_a_scaled_loss_that_would_overflow_enters_smaller() -> None:
    scale = torch.tensor(2.0**20)
    f = (torch.randn(6, 3) * torch.tensor([1.0, 1, 1e-4, 1, 1, 1]).view(6, 1)).half()
    rows, f = torch.zeros(6, 3, dtype=torch.float16), f.requires_grad_()
    alone = torch.tensor([1.0, 1.0, 0.0]).requires_grad_()  # 3 slots of 2 places; the last learns
    places = torch.tensor([0, 2, 3, 4])
    out = RECONSTRUCT(f, rows, places, scale, alone)
    found, less = torch.autograd.grad(out, [f, alone], torch.zeros_like(f))
    by = 1 + less
    wide = f.detach().double()
    expected = torch.zeros_like(wide).index_add(0, places, wide[places] * 2 / 3 * scale)
    assert torch.equal(by.log2(), by.log2().round())
    assert by[2] == 1
    assert found[4].isinf().any()  # nothing to be done for it: guard stops it
    assert (by[:2] > 1).all()
    entered = found[:4].double().abs().view(2, -1).sum(1)
    assert ((entered > 31) & (entered < 65)).all()
    whole = found[:4].double() * by[:2].repeat_interleave(2).view(-1, 1)
    torch.testing.assert_close(whole, expected[:4], rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reconstruct_passes_opcheck(dtype: torch.dtype) -> None:
    f = torch.randn(5, 3, 2, dtype=dtype, requires_grad=True)
    rows = torch.randn(5, 3, 2, dtype=dtype)
    torch.library.opcheck(RECONSTRUCT, (f, rows, TRAINEES, torch.ones(()), ALONE))


def test_reconstruct_passes_gradcheck_with_its_loss() -> None:
    f = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    rows, scale = torch.randn(5, 3, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)

    class WithLoss(torch.autograd.Function):
        """The same gradient, from a loss that is really there."""

        @staticmethod
        def forward(ctx: Any, f: Tensor) -> Tensor:
            ctx.save_for_backward(f)
            with torch.enable_grad():
                out = f.sum() + scale * _loss(f, rows, [3, 1])
            return out.detach()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (f,) = ctx.saved_tensors
            with torch.enable_grad():
                leaf = f.detach().requires_grad_()
                total = RECONSTRUCT(leaf, rows, TRAINEES, scale, ALONE).sum()
            found: Tensor = torch.autograd.grad(total, leaf)[0]
            return found * grad

    assert torch.autograd.gradcheck(WithLoss.apply, f)


def _arguments(op: torch._ops.OpOverload) -> tuple[Any, ...]:
    if op is GUARD:
        return _bank(), MODES, POSITIONS, torch.zeros(5, requires_grad=True), BLAMES
    f = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    if op is RECONSTRUCT:
        return f, torch.randn_like(f), TRAINEES, torch.ones(()), ALONE
    return f, *maps()


@pytest.mark.parametrize("op", DECOMPOSITIONS, ids=lambda op: op.name())
def test_decompositions_equal_their_operators(op: torch._ops.OpOverload) -> None:
    arguments = _arguments(op)
    found, expected = DECOMPOSITIONS[op](*arguments), op(*arguments)
    pairs = zip(found, expected, strict=True) if op is GUARD else [(found, expected)]
    for a, b in pairs:
        assert torch.equal(a, b)


def test_all_four_moves_decompose() -> None:
    assert (
        set(DECOMPOSITIONS)
        == {PULL, GATHER, GUARD, RECONSTRUCT}
        == set(operators.current()._asdict().values())
    )


def test_inside_torch_func_plain_code_stands_for_the_moves() -> None:
    seeds, positions = maps()
    inside: list[operators.Moves] = []

    def total(f: Tensor) -> Tensor:
        inside.append(operators.current())
        return (operators.current().gather(f, seeds, positions) ** 2).sum()

    f = torch.randn(5, 3)
    found = torch.func.grad(total)(f)
    assert inside[0] is operators._PLAIN
    leaf = f.clone().requires_grad_()
    (GATHER(leaf, seeds, positions) ** 2).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(found, leaf.grad)
    assert operators.current() is operators._OPERATORS

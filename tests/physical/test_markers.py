"""The markers blend and observe: their schemas, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kasmina_fx.lifecycle import Mode, Role
from kasmina_fx.physical.markers import BLEND, MARKERS, OBSERVE
from kasmina_fx.physical.statistics import COUNT, LOSS, REJECTED, ROWS, RUNS

F, L, R = Mode.FROZEN, Mode.LEARNS, Mode.RECONSTRUCTS
F, L, R = Mode.FROZEN, Mode.LEARNS, Mode.RECONSTRUCTS
F, L, R = Mode.FROZEN, Mode.LEARNS, Mode.RECONSTRUCTS
NAN, INF = float("nan"), float("inf")
OPCHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
LAYOUT, BANK = "dim=-1 runs=3x2", "affine@0*2"


def _blend(y: Tensor, mode: Mode = L, alpha: float = 0.5) -> tuple[Any, ...]:
    """Three seeds, of which the second has an affine blueprint in the first of two slots."""
    roles = torch.tensor([Role.IDLE, Role.RUNS if mode is R else Role.BLENDS, Role.IDLE])
    faults = torch.zeros(3, requires_grad=True)
    layer = [torch.tensor([0.0, alpha, 0.0]), roles, faults, torch.ones(())]
    seeds, positions = torch.tensor([[1], [-1]]), torch.tensor([-1, 0, -1])
    trainees = torch.tensor([0 if mode is R else -1, -1])
    params = [torch.randn(2, 2, dtype=y.dtype, requires_grad=True) for _ in range(2)]
    modes = torch.tensor([[mode], [F]])
    return (
        y,
        layer,
        [seeds],
        [positions],
        [modes],
        [trainees],
        [torch.tensor([0, -1])],
        params,
        LAYOUT,
        BANK,
    )


def test_blend_and_its_notes() -> None:
    y = torch.randn(3, 6, requires_grad=True)
    arguments = _blend(y)
    params = arguments[7]
    out, notes = BLEND(*arguments)
    expected = y.clone()
    chunk = y[:, 2:4]
    made = chunk * params[0][0] + params[1][0]
    expected[:, 2:4] = chunk + 0.5 * (made - chunk)
    torch.testing.assert_close(out, expected)
    assert torch.equal(out[:, :2], y[:, :2])
    assert torch.equal(out[:, 4:], y[:, 4:])
    loss = float((made - chunk).detach().square().mean())
    assert not notes.requires_grad
    assert notes.dtype == torch.float32
    assert notes[0].tolist() == [0, 0, 0]
    assert notes[1].tolist() == pytest.approx([-1, loss, -1])
    assert notes[2].tolist() == pytest.approx([0, loss / 4, 0])


def test_blend_in_training_changes_nothing_and_notes_the_loss() -> None:
    y = torch.randn(3, 6, requires_grad=True)
    out, notes = BLEND(*_blend(y, R, 1.0))
    assert torch.equal(out, y)
    assert notes[1, 1] > 0
    assert notes[2].tolist() == [0, 0, 0]


def test_blend_rejects_what_is_not_finite() -> None:
    y = torch.randn(3, 6)
    arguments = _blend(y)
    with torch.no_grad():
        arguments[7][0][0, 1] = INF
    out, notes = BLEND(*arguments)
    assert torch.equal(out, y)
    assert notes.tolist() == [[0, 1, 0], [-1, -1, -1], [0, 0, 0]]


def test_blend_without_banks_is_a_copy() -> None:
    y = torch.randn(3, 6)
    out, notes = BLEND(y, [], [], [], [], [], [], [], LAYOUT, "")
    assert torch.equal(out, y)
    assert out is not y
    assert notes.tolist() == [[0] * 3, [-1] * 3, [0] * 3]


def test_observe_merges_in_place() -> None:
    y = torch.randn(3, 6)
    _, notes = BLEND(*_blend(y))
    telemetry = torch.zeros(ROWS, 3)
    OBSERVE(y, notes, telemetry, LAYOUT)
    assert telemetry[COUNT].tolist() == [6, 6, 6]
    assert telemetry[RUNS].tolist() == [0, 1, 0]
    assert telemetry[LOSS, 1] == notes[1, 1]
    OBSERVE(y, None, telemetry, LAYOUT, 3)
    assert telemetry[COUNT].tolist() == [8, 8, 8]
    assert telemetry[REJECTED].tolist() == [0, 0, 0]


@pytest.mark.parametrize("mode", [L, R], ids=["learns", "reconstructs"])
@pytest.mark.parametrize("test", OPCHECKS)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's
def test_blend_passes_opcheck(test: str, mode: Mode) -> None:
    # Its schema is checked by what it is made of: it is a composite operator.
    y = torch.randn(3, 6, requires_grad=True)
    torch.library.opcheck(BLEND, _blend(y, mode), test_utils=test)


@pytest.mark.parametrize(("with_notes", "one_in"), [(False, 1), (True, 2)])
def test_observe_passes_opcheck(with_notes: bool, one_in: int) -> None:
    y, telemetry = torch.randn(4, 6), torch.rand(ROWS, 3)
    notes = torch.rand(3, 3) if with_notes else None
    torch.library.opcheck(OBSERVE, (y, notes, telemetry, LAYOUT, one_in))


def test_blend_passes_gradcheck() -> None:
    y = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    arguments = _blend(y)
    params = arguments[7]

    def out(y: Tensor, *params: Tensor) -> Tensor:
        blended: Tensor = BLEND(y, *arguments[1:7], list(params), LAYOUT, BANK)[0]
        return blended

    assert torch.autograd.gradcheck(out, (y, *params))


def test_the_markers_are_overloads() -> None:
    assert MARKERS == (BLEND, OBSERVE)
    assert all(isinstance(op, torch._ops.OpOverload) for op in MARKERS)

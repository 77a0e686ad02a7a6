"""Statistics in one kernel, run by Triton's interpreter, against those of plain operators."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import interpreter

from kasmina_fx.lowerings.sample import OBSERVE_ROWS
from kasmina_fx.physical.layout import ChunkLayout
from kasmina_fx.physical.statistics import EVERY, ROWS, merge_statistics

__all__ = ["interpreter"]
pytestmark = pytest.mark.usefixtures("interpreter")


@pytest.mark.parametrize("sizes", [[4] * 5, [3, 3, 2, 2], [5, 1, 7], [40, 40]], ids=str)
@pytest.mark.parametrize("shape", [(7,), (300,), (6, 9)], ids=str)
@pytest.mark.parametrize(("one_in", "rows"), [(1, 0), (1, 16), (2, 16)])
@pytest.mark.parametrize("with_notes", [False, True])
def test_the_kernel_merges_what_plain_operators_do(
    sizes: list[int], shape: tuple[int, ...], one_in: int, rows: int, with_notes: bool
) -> None:
    torch.manual_seed(0)
    layout = ChunkLayout.of(sizes, -1)
    expected = torch.zeros(ROWS, layout.num_seeds)
    expected[EVERY, 0] = 3
    found = expected.clone()
    for step in range(4):
        y = torch.randn(*shape, layout.width) * 3 + 100
        y[..., :1] *= 1e-9
        if step == 2:
            y.view(-1, layout.width)[0, -1] = torch.nan
        notes = torch.rand(3, layout.num_seeds) if with_notes else None
        if notes is not None:
            notes[1, 0] = -1  # its blueprint did not run
        expected = merge_statistics(y, notes, expected, layout, one_in, rows)
        OBSERVE_ROWS([y], [notes], [found], str(layout), [one_in], [rows])
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("shape", [(0,), (0, 9), (6, 0)], ids=str)
@pytest.mark.parametrize("one_in", [1, 2])
def test_an_empty_batch_says_nothing(shape: tuple[int, ...], one_in: int) -> None:
    layout = ChunkLayout.of([4] * 5, -1)
    found = torch.zeros(ROWS, 5)
    OBSERVE_ROWS([torch.zeros(*shape, 20)], [None], [found], str(layout), [one_in], [16])
    assert not found.any()


def test_row_numbers_beyond_32_bits_are_right() -> None:
    layout, rows = ChunkLayout.of([1], -1), 60_000
    y = torch.arange(100_000.0).view(-1, 1)
    found = torch.zeros(ROWS, 1)
    OBSERVE_ROWS([y], [None], [found], str(layout), [1], [rows])
    expected = merge_statistics(y, None, torch.zeros(ROWS, 1), layout, 1, rows)
    torch.testing.assert_close(found[:7], expected[:7], rtol=1e-4, atol=0)


@pytest.mark.parametrize("layers", [2, 4, 9])
def test_a_launch_for_several_layers_merges_what_one_a_layer_does(layers: int) -> None:
    torch.manual_seed(0)
    of_runs = [[4] * 5, [3, 3, 2, 2], [5, 1, 7], [3, 1021]]
    sizes = [of_runs[layer % 4] for layer in range(layers)]
    layouts = [ChunkLayout.of(size, -1) for size in sizes]
    rows, one_in = (
        [16 + layer for layer in range(layers)],
        [1 + layer % 2 for layer in range(layers)],
    )
    y = [torch.randn(6, 9 + layer, at.width) for layer, at in enumerate(layouts)]
    notes = [torch.rand(3, at.num_seeds) if layer % 3 else None for layer, at in enumerate(layouts)]
    together, alone = ([torch.zeros(ROWS, at.num_seeds) for at in layouts] for _ in range(2))
    read = [*y, *(told for told in notes if told is not None)]
    before = [tensor.clone() for tensor in read]
    for _ in range(2):
        OBSERVE_ROWS(y, notes, together, ";".join(map(str, layouts)), one_in, rows)
        for layer, at in enumerate(layouts):
            told = ([y[layer]], [notes[layer]], [alone[layer]], str(at))
            OBSERVE_ROWS(*told, [one_in[layer]], [rows[layer]])
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one, other)
        assert one.any()
    assert all(map(torch.equal, read, before))

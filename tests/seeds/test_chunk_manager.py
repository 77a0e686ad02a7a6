"""Chunks: sizes, views, inverses, and the layout text that markers carry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kasmina_fx import ChunkManager, InvalidArgument, InvalidType, KasminaError
from kasmina_fx.physical.layout import BankSpec, ChunkLayout, Run, format_banks, parse_banks

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("dim", "count", "sizes", "runs"),
    [
        (12, 4, (3, 3, 3, 3), ((0, 4, 3),)),
        (10, 4, (3, 3, 2, 2), ((0, 2, 3), (2, 2, 2))),
        (7, 7, (1,) * 7, ((0, 7, 1),)),
        (7, 1, (7,), ((0, 1, 7),)),
        (5, 4, (2, 1, 1, 1), ((0, 1, 2), (1, 3, 1))),
    ],
)
def test_sizes_and_runs(
    dim: int, count: int, sizes: tuple[int, ...], runs: tuple[tuple[int, int, int], ...]
) -> None:
    chunks = ChunkManager(dim, count)
    assert chunks.sizes == sizes
    assert chunks.runs == runs
    assert (chunks.layer_dim, chunks.num_chunks, chunks.feature_dim) == (dim, count, -1)


def test_sizes_of_the_caller() -> None:
    chunks = ChunkManager(11, 5, chunk_sizes=[2, 2, 1, 4, 2])
    assert chunks.sizes == (2, 2, 1, 4, 2)
    assert chunks.runs == ((0, 2, 2), (2, 1, 1), (3, 1, 4), (4, 1, 2))
    assert chunks.starts == (0, 2, 4, 5, 9)
    assert [chunks.get_chunk_size(i) for i in range(5)] == [2, 2, 1, 4, 2]
    assert [chunks.chunk_slice(i) for i in (0, 3, 4)] == [slice(0, 2), slice(5, 9), slice(9, 11)]


def test_ten_thousand_chunks_have_one_run() -> None:
    assert ChunkManager(20_000, 10_000).runs == ((0, 10_000, 2),)


@pytest.mark.parametrize("shape", [(10,), (3, 10), (2, 3, 10), (2, 1, 3, 10), (0, 10)])
def test_splits_are_views_over_any_leading_dims(shape: tuple[int, ...]) -> None:
    chunks = ChunkManager(10, 4)
    x = torch.randn(shape)
    parts = chunks.split_tensor(x)
    assert [part.shape for part in parts] == [(*shape[:-1], size) for size in chunks.sizes]
    assert {part.untyped_storage().data_ptr() for part in parts} == {x.untyped_storage().data_ptr()}
    for part, start, size in zip(parts, chunks.starts, chunks.sizes, strict=True):
        assert torch.equal(part, x[..., start : start + size])
        assert part.storage_offset() == start
    assert torch.equal(chunks.concatenate_chunks(parts), x)


@pytest.mark.parametrize("feature_dim", [1, -3])
def test_features_in_dimension_one(feature_dim: int) -> None:
    chunks = ChunkManager(7, 3, feature_dim=feature_dim)
    x = torch.randn(2, 7, 4, 5)
    parts = chunks.split_tensor(x)
    assert [tuple(part.shape) for part in parts] == [(2, 3, 4, 5), (2, 2, 4, 5), (2, 2, 4, 5)]
    assert torch.equal(parts[1], x[:, 3:5])
    assert parts[2].data_ptr() == x[:, 5:].data_ptr()
    assert torch.equal(chunks.concatenate_chunks(parts), x)
    means, variances = chunks.get_chunk_statistics(x)
    assert means.shape == variances.shape == (2, 4, 5, 3)
    torch.testing.assert_close(means[..., 1], x[:, 3:5].mean(1))


def test_statistics_equal_a_plain_loop() -> None:
    chunks = ChunkManager(11, 4)
    x = torch.randn(3, 2, 11, dtype=torch.float64)
    means, variances = chunks.get_chunk_statistics(x)
    assert means.shape == variances.shape == (3, 2, 4)
    for i in range(3):
        for j in range(2):
            row = x[i, j].tolist()
            for s, (start, size) in enumerate(zip(chunks.starts, chunks.sizes, strict=True)):
                chunk = row[start : start + size]
                mean = sum(chunk) / size
                assert float(means[i, j, s]) == pytest.approx(mean)
                variance = sum((value - mean) ** 2 for value in chunk) / size
                assert float(variances[i, j, s]) == pytest.approx(variance)


def test_apply_to_chunks_passes_the_index_and_the_rest() -> None:
    chunks = ChunkManager(5, 2)
    x = torch.ones(2, 5)

    def scaled(part: Tensor, i: int, by: float, *, plus: float) -> Tensor:
        return part * i * by + plus

    out = chunks.apply_to_chunks(x, scaled, 10.0, plus=1.0)
    assert out.tolist() == [[1.0, 1.0, 1.0, 11.0, 11.0]] * 2


def test_parallel_chunk_operation_leaves_its_input_alone() -> None:
    chunks = ChunkManager(6, 3)
    x = torch.ones(2, 6)
    out = chunks.parallel_chunk_operation(x, [None, lambda part: part * 5, torch.neg])
    assert out.tolist() == [[1, 1, 5, 5, -1, -1]] * 2
    assert x.tolist() == [[1.0] * 6] * 2
    assert out.data_ptr() != x.data_ptr()


def test_masks_mark_the_features_of_active_chunks() -> None:
    chunks = ChunkManager(7, 3)
    mask = chunks.create_chunk_mask(torch.tensor([True, False, True]))
    assert mask.dtype == torch.bool
    assert mask.tolist() == [True, True, True, False, False, True, True]


def test_gradients_flow_through_split_and_concatenate() -> None:
    chunks = ChunkManager(5, 2)
    x = torch.randn(2, 5, requires_grad=True)
    parts = chunks.split_tensor(x)
    chunks.concatenate_chunks([parts[0] * 2, parts[1]]).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[2, 2, 2, 1, 1]] * 2


def test_to_returns_itself() -> None:
    chunks = ChunkManager(5, 2)
    assert chunks.to("meta") is chunks
    assert chunks.device == torch.device("meta")
    assert "5" in repr(chunks)


def _manager() -> ChunkManager:
    return ChunkManager(10, 4)


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no chunks": (lambda: ChunkManager(5, 0), InvalidArgument, "num_chunks=0.*1 to 5"),
    "negative": (lambda: ChunkManager(5, -1), InvalidArgument, "num_chunks=-1"),
    "more chunks than features": (lambda: ChunkManager(5, 6), InvalidArgument, "6.*5 features"),
    "no features": (lambda: ChunkManager(0, 1), InvalidArgument, "0 features"),
    "float count": (lambda: ChunkManager(5, 2.0), InvalidType, "float"),  # type: ignore[arg-type]
    "bool count": (lambda: ChunkManager(5, True), InvalidType, "bool"),
    "str dim": (lambda: ChunkManager("5", 2), InvalidType, "str"),  # type: ignore[arg-type]
    "too few sizes": (
        lambda: ChunkManager(5, 3, chunk_sizes=[2, 3]),
        InvalidArgument,
        "2 chunk sizes for 3",
    ),
    "sizes that do not sum": (
        lambda: ChunkManager(5, 2, chunk_sizes=[2, 2]),
        InvalidArgument,
        "sum to 4.*5",
    ),
    "a size of zero": (
        lambda: ChunkManager(5, 3, chunk_sizes=[5, 0, 0]),
        InvalidArgument,
        "positive",
    ),
    "a negative size": (
        lambda: ChunkManager(5, 2, chunk_sizes=[6, -1]),
        InvalidArgument,
        "smallest -1",
    ),
    "a float size": (
        lambda: ChunkManager(5, 2, chunk_sizes=[2.5, 2.5]),  # type: ignore[list-item]
        InvalidType,
        "float",
    ),
    "chunk too large": (lambda: _manager().get_chunk_size(4), InvalidArgument, "4.*0 to 3"),
    "chunk negative": (lambda: _manager().get_chunk_size(-1), InvalidArgument, "-1"),
    "slice negative": (lambda: _manager().chunk_slice(-1), InvalidArgument, "-1"),
    "chunk bool": (lambda: _manager().get_chunk_size(True), InvalidType, "bool"),
    "split of another width": (
        lambda: _manager().split_tensor(torch.zeros(2, 9)),
        InvalidArgument,
        "last dimension 10, got 9",
    ),
    "split of a scalar": (
        lambda: _manager().split_tensor(torch.zeros(())),
        InvalidArgument,
        "got None",
    ),
    "split of too few dims": (
        lambda: ChunkManager(10, 2, feature_dim=1).split_tensor(torch.zeros(10)),
        InvalidArgument,
        "dimension 1",
    ),
    "too few chunks": (
        lambda: _manager().concatenate_chunks([torch.zeros(2, 3)]),
        InvalidArgument,
        "Expected 4 chunks, got 1",
    ),
    "a chunk of another width": (
        lambda: _manager().concatenate_chunks([torch.zeros(2, 3)] * 4),
        InvalidArgument,
        "chunk 2 has 3 features, expected 2",
    ),
    "a function that changes the width": (
        lambda: _manager().apply_to_chunks(torch.zeros(2, 10), lambda part, i: part[..., :1]),
        InvalidArgument,
        "chunk 0 has 1",
    ),
    "too few operations": (
        lambda: _manager().parallel_chunk_operation(torch.zeros(2, 10), [None]),
        InvalidArgument,
        "Expected 4 operations, got 1",
    ),
    "a mask of another length": (
        lambda: _manager().create_chunk_mask(torch.ones(3, dtype=torch.bool)),
        InvalidArgument,
        r"\(3,\).*bool \(4,\)",
    ),
    "a mask of ints": (
        lambda: _manager().create_chunk_mask(torch.ones(4, dtype=torch.int64)),
        InvalidArgument,
        "int64",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_refused_by_name(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    assert isinstance(caught.value, KasminaError)
    assert isinstance(caught.value, (ValueError, TypeError))


# Properties.


@given(st.integers(1, 300), st.data())
def test_default_sizes_sum_and_differ_by_one_at_most(dim: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, dim))
    sizes = ChunkManager(dim, count).sizes
    assert len(sizes) == count
    assert sum(sizes) == dim
    assert max(sizes) - min(sizes) <= 1
    assert list(sizes) == sorted(sizes, reverse=True)


@given(SIZES, st.integers(-3, 2))
def test_runs_cover_the_features_in_order(sizes: list[int], feature_dim: int) -> None:
    layout = ChunkLayout.of(sizes, feature_dim)
    assert layout.num_seeds == len(sizes)
    assert layout.width == sum(sizes)
    assert [run.size for run in layout.runs for _ in range(run.count)] == sizes
    offset = seed = 0
    for run in layout.runs:
        assert (run.offset, run.first_seed) == (offset, seed)
        assert run.width == run.count * run.size
        offset, seed = offset + run.width, seed + run.count
    assert all(a.size != b.size for a, b in zip(layout.runs, layout.runs[1:], strict=False))


@given(SIZES, st.lists(st.integers(0, 3), max_size=2), st.lists(st.integers(1, 3), max_size=2))
def test_split_and_concatenate_are_inverse(
    sizes: list[int], before: list[int], after: list[int]
) -> None:
    chunks = ChunkManager(sum(sizes), len(sizes), chunk_sizes=sizes, feature_dim=-1 - len(after))
    x = torch.randn(*before, sum(sizes), *after)
    parts = chunks.split_tensor(x)
    assert [part.shape[len(before)] for part in parts] == sizes
    assert torch.equal(chunks.concatenate_chunks(parts), x)
    assert torch.equal(chunks.parallel_chunk_operation(x, [None] * len(sizes)), x)


@given(SIZES, st.lists(st.booleans(), min_size=12, max_size=12))
def test_a_mask_is_true_exactly_inside_active_chunks(sizes: list[int], flags: list[bool]) -> None:
    active = flags[: len(sizes)]
    chunks = ChunkManager(sum(sizes), len(sizes), chunk_sizes=sizes)
    expected = [flag for flag, size in zip(active, sizes, strict=True) for _ in range(size)]
    assert chunks.create_chunk_mask(torch.tensor(active)).tolist() == expected


@given(SIZES, st.integers(-4, 3))
def test_a_layout_survives_its_text(sizes: list[int], feature_dim: int) -> None:
    layout = ChunkLayout.of(sizes, feature_dim)
    assert ChunkLayout.parse(str(layout)) == layout
    assert " " not in str(layout).partition(" runs=")[2]


@given(
    st.lists(
        st.builds(
            BankSpec,
            st.sampled_from(["mlp", "my-own_blueprint", "Sequential-2"]),
            st.integers(0, 99),
            st.booleans(),
            st.integers(0, 9),
        ),
        max_size=4,
    )
)
def test_banks_survive_their_text(specs: list[BankSpec]) -> None:
    assert list(parse_banks(format_banks(specs))) == specs


@pytest.mark.parametrize("text", ["mlp", "mlp@0", "mlp@x*3", "@0*3", "mlp:own@0*1", "mlp@0*1,"])
def test_a_text_that_names_no_bank_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a bank"):
        parse_banks(text)


def test_runs_compare_by_value() -> None:
    assert ChunkLayout.of([2, 2], -1).runs == (Run(0, 2, 0, 2),)
    assert ChunkLayout.of([2, 2], -1) != ChunkLayout.of([2, 2], 1)

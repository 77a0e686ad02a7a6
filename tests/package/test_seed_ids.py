"""Seed ids in every form that callers give them, and every form that is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kasmina_fx import InvalidArgument, InvalidType, KasminaError, SeedIndexError
from kasmina_fx.arguments import as_seed_ids

GOOD: dict[str, tuple[Any, list[int]]] = {
    "int": (3, [3]),
    "zero": (0, [0]),
    "the last": (9, [9]),
    "list": ([3, 0, 7], [3, 0, 7]),
    "tuple": ((1, 2), [1, 2]),
    "range": (range(2, 6), [2, 3, 4, 5]),
    "generator": ((i for i in (4, 2)), [4, 2]),
    "set": ({5}, [5]),
    "nothing": ([], []),
    "no tensor elements": (torch.zeros(0, dtype=torch.int64), []),
    "0-d tensor": (torch.tensor(4), [4]),
    "int64 tensor": (torch.tensor([4, 1]), [4, 1]),
    "int32 tensor": (torch.tensor([4, 1], dtype=torch.int32), [4, 1]),
    "uint8 tensor": (torch.tensor([4, 1], dtype=torch.uint8), [4, 1]),
    "list of 0-d tensors": ([torch.tensor(4), torch.tensor(1)], [4, 1]),
    "numpy int": (np.int64(4), [4]),
    "numpy uint8": (np.uint8(4), [4]),
    "list of numpy ints": ([np.int32(4), 1], [4, 1]),
    "numpy array": (np.array([4, 1]), [4, 1]),
}


@pytest.mark.parametrize(("given_ids", "expected"), GOOD.values(), ids=GOOD)
def test_ids_become_int64_on_the_cpu(given_ids: Any, expected: list[int]) -> None:
    ids = as_seed_ids(given_ids, 10, "fc")
    assert ids.dtype == torch.int64
    assert ids.device.type == "cpu"
    assert ids.dim() == 1
    assert ids.tolist() == expected


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "negative": (-1, SeedIndexError, "seed -1 .* 0 to 9"),
    "too large": (10, SeedIndexError, "seed 10 .* 0 to 9"),
    "far too large": (2**70, SeedIndexError, "does not exist"),
    "far too small": ([0, -(2**70)], SeedIndexError, "does not exist"),
    "one of many": ([1, 2, 12], SeedIndexError, "seed 12"),
    "negative tensor": (torch.tensor([0, -3]), SeedIndexError, "seed -3"),
    "numpy negative": (np.int64(-1), SeedIndexError, "seed -1"),
    "float": (1.0, InvalidType, r"1\.0 is a float"),
    "float in a list": ([0, 2.5], InvalidType, "float"),
    "NaN": (float("nan"), InvalidType, "float"),
    "numpy float": (np.float32(1), InvalidType, "float32"),
    "numpy floats": (np.array([1.0, 2.0]), InvalidType, "float64"),
    "bool": (True, InvalidType, "bool"),
    "bool in a list": ([0, False], InvalidType, "bool"),
    "numpy bool": (np.bool_(True), InvalidType, "bool"),
    "numpy mask": (np.array([True, False]), InvalidType, "bool"),
    "float tensor": (torch.tensor([1.0]), InvalidType, "float32"),
    "complex tensor": (torch.tensor([1j]), InvalidType, "complex"),
    "mask": (torch.tensor([True, False]), InvalidType, "torch.bool"),
    "list of bool tensors": ([torch.tensor(True)], InvalidType, "bool"),
    "2-D": (torch.tensor([[1, 2]]), InvalidArgument, r"\(1, 2\)"),
    "2-D array": (np.array([[1, 2]]), KasminaError, "fc"),
    "nested": ([[1, 2]], InvalidType, "list"),
    "str": ("1", InvalidType, "str"),
    "str in a list": (["1"], InvalidType, "str"),
    "bytes": (b"\x01", InvalidType, "bytes"),
    "None": (None, InvalidType, "NoneType"),
    "twice": ([1, 2, 1], InvalidArgument, "seed 1 .*twice"),
    "twice in a tensor": (torch.tensor([3, 3]), InvalidArgument, "seed 3 .*twice"),
}


@pytest.mark.parametrize(("given_ids", "error", "message"), BAD.values(), ids=BAD)
def test_what_names_no_seed_is_refused(
    given_ids: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"fc: .*{message}|{message}.*fc|^fc") as caught:
        as_seed_ids(given_ids, 10, "fc")
    assert isinstance(caught.value, KasminaError)
    assert str(caught.value).startswith("fc: ")


def test_an_id_outside_is_an_index_error_and_a_value_error() -> None:
    assert issubclass(SeedIndexError, IndexError)
    assert issubclass(SeedIndexError, ValueError)


def test_the_callers_tensor_is_not_aliased() -> None:
    mine = torch.tensor([1, 2])
    ids = as_seed_ids(mine, 10, "fc")
    assert torch.equal(ids, mine)
    assert mine.tolist() == [1, 2]


@given(st.integers(1, 20), st.lists(st.integers(-3, 25), max_size=6))
def test_ids_are_taken_exactly_if_all_exist_and_none_is_twice(n: int, ids: list[int]) -> None:
    fits = all(0 <= i < n for i in ids) and len(set(ids)) == len(ids)
    for form in (ids, torch.tensor(ids, dtype=torch.int64)):
        if fits:
            assert as_seed_ids(form, n, "fc").tolist() == ids
        else:
            with pytest.raises(KasminaError):
                as_seed_ids(form, n, "fc")

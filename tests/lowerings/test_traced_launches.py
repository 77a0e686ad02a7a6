"""Launches that the package rewrites for torch come out as torch's own passes leave them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._higher_order_ops import triton_kernel_wrap

from kasmina_fx._torch import launches

CASES = Path(__file__).parents[1] / "cases"


@pytest.fixture(scope="module")
def traced() -> dict[str, Any]:
    """What the program prints; Triton's functions are the interpreter's in this process."""
    pytest.importorskip("triton")
    paths = os.pathsep.join([str(CASES.parents[1]), str(CASES)])
    done = subprocess.run(
        [sys.executable, str(CASES / "traced_launches.py")],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("what", ["targets", "kernels", "source"])
def test_they_are_those_that_torch_would_write(traced: dict[str, Any], what: str) -> None:
    ours, theirs = traced[what]
    assert ours
    assert ours == theirs


def test_one_kernel_stands_for_all_launches_of_its_kind(traced: dict[str, Any]) -> None:
    forward, notes, backward, sums, again = traced["kernels"][0]
    assert forward == again
    assert len({forward, notes, backward, sums}) == 4


def test_what_copies_a_tensor_is_left_to_torch() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    functional = triton_kernel_wrap.triton_kernel_wrapper_functional
    for copied in (["out"], []):
        kwargs: Any = {"kernel_idx": 0, "kwargs": {"out": x}, "tensors_to_clone": copied}
        node = graph.call_function(functional, kwargs=kwargs)
        node.meta["eager_input_vals"] = ((), kwargs)
    launches.launch_in_place(graph)
    _, kept, changed = graph.nodes
    assert kept.target is functional
    assert changed.target is triton_kernel_wrap.triton_kernel_wrapper_mutation
    assert set(changed.kwargs) == {"kernel_idx", "kwargs"}
    assert set(changed.meta["eager_input_vals"][1]) == {"kernel_idx", "kwargs"}


def test_fakes_keep_shape_strides_and_dtype() -> None:
    launches.quicken_tracing()
    copied: Any = triton_kernel_wrap.clone_preserve_strides  # type: ignore[attr-defined]
    with torch._subclasses.FakeTensorMode():
        for x in (torch.empty(3, 4).T, torch.empty(5, dtype=torch.int32), torch.empty(6, 4)[1:]):
            made = copied(x)
            assert (made.shape, made.stride(), made.dtype) == (x.shape, x.stride(), x.dtype)
            assert made.storage_offset() == x.storage_offset()
    real = torch.arange(6.0).reshape(2, 3).T
    assert torch.equal(copied(real), real)
    assert copied(real).data_ptr() != real.data_ptr()

"""Launches that the package rewrites for torch come out as torch's own passes leave them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx
from torch._higher_order_ops import triton_kernel_wrap
from torch._inductor.codegen import wrapper
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from kasmina_fx._torch import launches
from kasmina_fx._torch.tracing import SymbolicSizes

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


class Kernel:
    """A kernel of a module, as far as it is looked at."""

    def __init__(self, module: str) -> None:
        def fn() -> None: ...

        fn.__module__ = module
        self.fn = fn


OURS, OTHERS = Kernel(f"{launches.KERNELS}.notes"), Kernel("somewhere.else")


def test_what_copies_a_tensor_or_is_not_ours_is_left_to_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = SimpleNamespace(get_kernel=[OURS, OTHERS].__getitem__)
    monkeypatch.setattr(triton_kernel_wrap, "kernel_side_table", table)
    graph = fx.Graph()
    x = graph.placeholder("x")
    functional = triton_kernel_wrap.triton_kernel_wrapper_functional
    for index, copied in ((0, ["out"]), (1, []), (0, [])):
        kwargs: Any = {"kernel_idx": index, "kwargs": {"out": x}, "tensors_to_clone": copied}
        node = graph.call_function(functional, kwargs=kwargs)
        node.meta["eager_input_vals"] = ((), kwargs)
    launches.launch_in_place(graph)
    _, copying, foreign, changed = graph.nodes
    assert copying.target is foreign.target is functional
    assert changed.target is triton_kernel_wrap.triton_kernel_wrapper_mutation
    assert set(changed.kwargs) == {"kernel_idx", "kwargs"}
    assert set(changed.meta["eager_input_vals"][1]) == {"kernel_idx", "kwargs"}


def test_a_source_of_ours_is_put_together_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Kernel] = []

    def find(kernel: Kernel, *_: Any) -> str:
        asked.append(kernel)
        return f"source {len(asked)}"

    monkeypatch.setattr(wrapper, launches._SOURCE, find)
    launches._remember_sources()
    found: Any = getattr(wrapper, launches._SOURCE)
    assert [found(k) for k in (OURS, OURS, OTHERS, OTHERS)] == [f"source {n}" for n in (1, 1, 2, 3)]
    assert found(OURS, "epilogue") == "source 4"


def test_of_a_fake_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernel_wrap, launches._COPY, lambda x: None)
    launches._copy_no_fakes()
    copied: Any = getattr(triton_kernel_wrap, launches._COPY)
    assert copied(torch.empty(3)) is None
    with torch._subclasses.FakeTensorMode():
        assert copied(torch.empty(3)) is not None
        assert copied(torch.empty(6, 4)[1:]) is None


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


def test_strides_that_are_numbers_are_read_as_torch_reads_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def evaluate(shape_env: ShapeEnv, code: str) -> Any:
        asked.append(code)
        return torchs(shape_env, code)

    torchs: Any = getattr(ShapeEnv, launches._EVALUATE)
    monkeypatch.setattr(ShapeEnv, launches._EVALUATE, evaluate)
    launches._read_plain_numbers()
    sizes = SymbolicSizes()
    rows = sizes.symbol("rows", 6)
    codes = ["0", "768", f"{rows}", f"3*{rows} + 1", "-1"]
    read: Any = getattr(sizes.shape_env, launches._EVALUATE)
    assert [read(code) for code in codes] == [0, 768, 6, 19, -1]
    assert asked == codes[2:]


def test_a_compile_reads_them_so() -> None:
    launches.quicken_inductor()
    assert getattr(ShapeEnv, launches._EVALUATE).__module__ == launches.__name__

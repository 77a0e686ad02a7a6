"""What torch does anew at each launch of a graph, done once for our kernels, or not at all.

A deep model has hundreds of launches, and with symbolic sizes each of these is worth milliseconds.
Every function here replaces one of torch's by one that answers the same, for our kernels; those of
others go to torch's own, but for numbers that are read (the last), which are the same for all.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import torch
from torch._higher_order_ops import triton_kernel_wrap
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

#: The package of our kernels.
KERNELS: Final = "kasmina_fx.lowerings.triton"
_COPY: Final = "clone_preserve_strides"
_SOURCE: Final = "user_defined_triton_kernel_transitive_closure_source_code"
_DECOMPOSE: Final = "decompose_triton_kernel_wrapper_functional"
_EVALUATE: Final = "evaluate_symexpr"


@cache
def quicken_tracing() -> None:
    """Replace what torch does where a launch is traced; once."""
    _say_what_is_written()
    _copy_no_fakes()


@cache
def quicken_inductor() -> None:
    """Replace what Inductor does for a launch; once."""
    _remember_sources()
    _launch_without_tracing()
    _read_plain_numbers()


def _say_what_is_written() -> None:
    """Let torch read what our kernels write, where it would find it out by analysis.

    It compiles a kernel to Triton's intermediate code and walks that, several times for each launch
    of a graph: minutes for a model of 48 layers (torch 2.11 to 2.13). The names stand in ``WRITES``
    of a kernel's module; a test compares them with what torch finds.
    """
    for name, answer in (  # 2.11, 2.13
        ("identify_mutated_tensors", lambda names, kwargs: names),
        ("identify_accessed_tensors", _as_accesses),
    ):
        analyse = getattr(triton_kernel_wrap, name, None)
        if analyse is not None:
            setattr(triton_kernel_wrap, name, _answering(analyse, answer))


def _answering(analyse: Any, answer: Callable[[list[str], dict[str, Any]], Any]) -> Any:
    def answered(kernel: Any, kwargs: dict[str, Any], *others: Any) -> Any:
        function = _function(kernel)
        if not _is_ours(function):
            return analyse(kernel, kwargs, *others)
        return answer(written_arguments(function, kwargs), kwargs)

    return answered


def _function(kernel: Any) -> Any:
    """Return the Python function of a kernel, also of one in an Autotuner."""
    return kernel.fn.fn if hasattr(kernel.fn, "fn") else kernel.fn


def _is_ours(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith(KERNELS)


def written_arguments(function: Any, kwargs: dict[str, Any]) -> list[str]:
    """Return the names of what a kernel writes to, called with such arguments.

    An entry ``"d3": "N3"`` of ``WRITES`` says: ``d3``, unless the argument ``N3`` is 0 or False.
    """
    written = importlib.import_module(function.__module__).WRITES[function.__name__]
    return [name for name, unless in written.items() if unless is None or kwargs[unless]]


def _as_accesses(names: list[str], kwargs: dict[str, Any]) -> Any:
    """Return what ``identify_accessed_tensors`` does (torch 2.13)."""
    from torch._inductor.dependencies import ReadWrites, StarDep
    from torch.utils._ordered_set import OrderedSet

    writes: Any = OrderedSet(StarDep(name) for name in names)
    tensors = [k for k, v in kwargs.items() if hasattr(v, "dtype") or hasattr(v, "get_dtype")]
    reads: Any = OrderedSet(StarDep(name) for name in tensors)
    accesses = ReadWrites(reads=reads, writes=writes, index_exprs=OrderedSet())
    return triton_kernel_wrap.TensorAccesses(accesses, can_fuse_epilogue=False)


def _copy_no_fakes() -> None:
    """Make what a launch writes, where nothing is recorded, without two views and a copy of it."""
    copy: Any = getattr(triton_kernel_wrap, _COPY)

    def made(x: Any) -> Any:
        shape_alone = isinstance(x, FakeTensor) and get_proxy_mode() is None
        if not shape_alone or not isinstance(x.storage_offset(), int) or x.storage_offset():
            return copy(x)
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device)

    setattr(triton_kernel_wrap, _COPY, made)


def _remember_sources() -> None:
    """Put a kernel's source together once; torch does for each launch, in each of its caches."""
    from torch._inductor.codegen import wrapper

    find: Any = getattr(wrapper, _SOURCE)
    known: dict[Any, str] = {}

    def found(kernel: Any, *others: Any, **named: Any) -> Any:
        # One with an epilogue (torch 2.13) is another each time.
        if any(others) or any(named.values()) or not _is_ours(_function(kernel)):
            return find(kernel, *others, **named)
        if kernel not in known:
            known[kernel] = find(kernel)
        return known[kernel]

    setattr(wrapper, _SOURCE, found)


def _launch_without_tracing() -> None:
    """Replace functional launches that copy nothing by launches, where torch traces each of them.

    Torch's own pass finds nothing to do then, unless a launch writes to what others still read.
    """
    from torch._inductor.fx_passes import post_grad

    decompose: Any = getattr(post_grad, _DECOMPOSE)

    def decomposed(graph: torch.fx.Graph) -> None:
        launch_in_place(graph)
        decompose(graph)

    setattr(post_grad, _DECOMPOSE, decomposed)


def launch_in_place(graph: torch.fx.Graph) -> None:
    """Replace each functional launch of ours that copies no tensor by one that mutates."""
    functional = triton_kernel_wrap.triton_kernel_wrapper_functional
    for node in graph.find_nodes(op="call_function", target=functional):
        kwargs = dict(node.kwargs)
        kernel = triton_kernel_wrap.kernel_side_table.get_kernel(kwargs["kernel_idx"])
        if kwargs.pop("tensors_to_clone") or node.users or not _is_ours(_function(kernel)):
            continue
        node.target, node.kwargs = triton_kernel_wrap.triton_kernel_wrapper_mutation, kwargs
        node.meta["val"] = None
        if "eager_input_vals" in node.meta:
            args, named = node.meta["eager_input_vals"]
            named = {name: value for name, value in named.items() if name != "tensors_to_clone"}
            node.meta["eager_input_vals"] = (args, named)


def _read_plain_numbers() -> None:
    """Read a stride that is a number at once, where torch spells every symbol of a model before.

    A graph says the strides of its outputs as text, nearly all of it numbers; a bank of mlp brings
    eight symbols. With 48 layers torch spelt 384 symbols 1,623 times.
    """
    read: Any = ShapeEnv.evaluate_symexpr

    def number(shape_env: ShapeEnv, code: str) -> Any:
        return int(code) if code.isdecimal() else read(shape_env, code)

    setattr(ShapeEnv, _EVALUATE, number)

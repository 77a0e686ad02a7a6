"""Private names of torch for tracing: fake tensors, symbolic sizes, states of the tracer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, cast

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses import FakeTensor
from torch._subclasses import FakeTensorMode as FakeTensorMode  # for whoever traces
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, statically_known_true
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import (
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)

#: The class of operators as graphs hold them: ``torch.ops.aten.add.Tensor``.
Operator = torch._ops.OpOverload


def same_size(a: int, b: int) -> None:
    """Tell a tracer that two sizes are one number: a graph then has one symbol for both.

    Raises:
        RuntimeError: They are not.
    """
    torch._check(a == b)


def in_backward() -> bool:
    """Say whether this thread is inside ``backward()``, as a recomputed forward is."""
    # -1 outside the autograd engine; there is no public way to ask.
    return bool(torch._C._current_graph_task_id() != -1)


def asks_for_shapes(t: torch.Tensor) -> bool:
    """Say whether ``t`` is a fake tensor and nobody records what is done with it (Dynamo's)."""
    return isinstance(t, FakeTensor) and get_proxy_mode() is None


def known_empty(t: torch.Tensor) -> bool:
    """Say whether a tensor has no elements; False where only a symbol says how many it has."""
    return _known(t.numel() == 0)


def known_at_most(size: int | torch.SymInt, most: int) -> bool:
    """Say whether a size is known to be no more than ``most``; asking adds no guard."""
    return _known(size <= most)


def known_one(size: int | torch.SymInt) -> bool:
    """Say whether a size is 1; False where only a symbol says."""
    return _known(size == 1)


def size_of(t: torch.Tensor, dim: int) -> int:
    """Return a size that every run of a program has in common, such as a chunk's.

    While ``torch.jit`` traces, ``t.shape`` holds tensors, which nothing but an operator takes.
    """
    if not torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]  # torch's
        return t.shape[dim]
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]  # of no stub
    try:
        return t.shape[dim]
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def known_same(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Say whether two sizes are the same; False where only symbols say."""
    return _known(a == b)


def _known(condition: Any) -> bool:
    """Say whether a condition on sizes holds whatever symbols stand for."""
    # While torch.jit traces, sizes are tensors, and to ask one would be warned of.
    return not isinstance(condition, torch.Tensor) and statically_known_true(condition)


class StorageOf:
    """Tells a tensor by its memory, which it does not keep alive.

    A weak reference to the tensor itself ends with its Python object, which autograd remakes.
    """

    def __init__(self, t: torch.Tensor) -> None:
        self._ref = StorageWeakRef(t.untyped_storage())

    def is_of(self, t: torch.Tensor) -> bool:
        """Say whether it is the memory of ``t``."""
        return not self._ref.expired() and self._ref == StorageWeakRef(t.untyped_storage())


#: What stands for a size that follows from data, such as a mask's, and was not known to a tracer.
_UNKNOWN: Final = 1024


def usual(size: int | torch.SymInt) -> int:
    """Return a size, or what it was when its graph was traced; asking adds no guard."""
    if not isinstance(size, torch.SymInt):
        return size
    hint = size.node.hint
    return _UNKNOWN if hint is None else int(hint)


def is_dense(t: torch.Tensor) -> bool:
    """Say whether a tensor is usually contiguous: asking for each stride would add guards."""
    expected = 1
    for stride, size in zip(reversed(t.stride()), reversed(t.shape), strict=True):
        if usual(stride) != expected:
            return False
        expected *= usual(size)
    return True


def in_functorch() -> bool:
    """Say whether a transform of ``torch.func`` (grad, vmap, jvp) is active."""
    return bool(torch._C._are_functorch_transforms_active())


def in_a_mode() -> bool:
    """Say whether a mode (of a tracer, of fake tensors) sees the operators of this thread."""
    return bool(_get_current_dispatch_mode_stack())


@contextlib.contextmanager
def outside_of_tracing() -> Iterator[None]:
    """Compute inside as if nobody traced: tensors made there are real ones.

    There is no public way to leave the modes of a tracer that runs.
    """
    with _disable_current_modes():
        yield


def without_writes(fn: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> torch.fx.GraphModule:
    """Trace a function into a graph in which operators write to nothing but inputs."""
    graph = make_fx(fn)(*inputs)
    written = (target for node in graph.graph.nodes for target in written_by(node))
    if any(target.op != "placeholder" for target in written):
        # Only then: it spells what it leaves alone in another way as well.
        graph = make_fx(torch.func.functionalize(fn, remove="mutations"))(*inputs)
    return graph


def written_by(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Return the nodes whose tensors an operator node writes to."""
    if not isinstance(node.target, Operator) or not node.target._schema.is_mutable:
        return []
    arguments = zip(node.target._schema.arguments, node.args, strict=False)
    written = [
        arg if isinstance(arg, list | tuple) else [arg]
        for described, arg in arguments
        if described.alias_info is not None and described.alias_info.is_write
    ]
    return [one for args in written for one in args if isinstance(one, torch.fx.Node)]


@contextlib.contextmanager
def outside_of_transforms() -> Iterator[None]:
    """Compute inside with plain tensors alone, whatever ``torch.func`` does outside."""
    with temporarily_clear_interpreter_stack():
        yield


def as_plain(t: torch.Tensor) -> torch.Tensor:
    """Return the values behind the wrappers of ``torch.func``; :func:`outside_of_transforms`.

    Raises:
        ValueError: ``vmap`` runs over several, and they differ.
    """
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        batched, t = torch._C._functorch.maybe_get_bdim(t), torch._C._functorch.get_unwrapped(t)
        if batched >= 0:
            first = t.select(batched, 0)
            if not bool((t == first.unsqueeze(batched)).all()):
                raise ValueError(
                    "vmap over models whose seeds are in different states: graft the same seeds "
                    "of each, or call the models one by one"
                )
            t = first
    return t


class SymbolicSizes:
    """Holds sizes that are symbols in its own shape environment, and a mode for fakes of them."""

    def __init__(self) -> None:
        # Without duck shaping: two sizes that are equal by chance stay two symbols.
        self.shape_env = ShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self.shape_env)
        self._symbols: dict[str, torch.SymInt] = {}

    def symbol(self, name: str, hint: int) -> torch.SymInt:
        """Return the size of that name; new ones look like ``hint`` or a bit more, and differ."""
        if name not in self._symbols:
            hint += 2 * len(self._symbols)
            source = ConstantSource(f"kasmina_{name}")
            symbol = self.shape_env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
            made = self.shape_env.create_symintnode(symbol, hint=hint, source=source)
            self._symbols[name] = cast("torch.SymInt", made)  # an int for a constant alone
        return self._symbols[name]

    def specialized(self) -> bool:
        """Say whether tracing turned one of the symbols into a number, or two into one."""
        # An expression reads as what replaced it.
        expressions = [size.node.expr for size in self._symbols.values()]
        known = [e for e in expressions if not e.is_number]
        return len(known) < len(expressions) or len(set(known)) < len(known)

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Let ``make_fx`` trace on fake tensors with such sizes."""
        # Without the dispatcher: "SymIntArrayRef expected to contain only concrete integers".
        with self.mode, enable_python_dispatcher():
            yield


def tensors_in(values: Any) -> list[torch.Tensor]:
    """Return the tensors of nested tuples, lists and dicts, in order."""
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def fake_call(
    target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], like: Any
) -> Any:
    """Call an operator on fake tensors in the mode of ``like``: nothing is computed."""
    mode = like.fake_mode

    def fake(value: Any) -> Any:
        is_real = isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
        return mode.from_tensor(value) if is_real else value

    args, kwargs = pytree.tree_map(fake, (tuple(args), dict(kwargs)))
    with mode, enable_python_dispatcher(), torch.no_grad():
        return target(*args, **kwargs)

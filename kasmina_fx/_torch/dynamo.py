"""Every private name of Dynamo that the package needs, and why."""

from __future__ import annotations

import contextlib
import functools
import re
import types
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, Final, TypeVar, cast

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._dynamo.callback import CallbackTrigger
from torch._dynamo.decorators import skip

from kasmina_fx.errors import InvalidType, shown


def is_exporting() -> bool:
    """Say whether ``torch.export`` is tracing.

    Dynamo of torch 2.11 takes the public function for a constant, True, in every compile; the flag
    behind it is read as it is.
    """
    return bool(torch.compiler._is_exporting_flag)


def being_recorded() -> bool:
    """Say whether ``torch.export`` or ``torch.jit.trace`` makes a program of what runs."""
    return is_exporting() or (not torch.compiler.is_dynamo_compiling() and torch.jit.is_tracing())  # type: ignore[attr-defined,no-untyped-call]  # torch's


T = TypeVar("T")


def cached(fn: Callable[[str], T]) -> Callable[[str], T]:
    """Keep what a function of a text returned; Dynamo sees the function alone.

    Of an ``lru_cache`` it warns: a strict ``torch.export`` would.
    """
    kept = functools.lru_cache(maxsize=4096)(fn)

    @functools.wraps(fn)
    def call(text: str) -> T:
        return fn(text) if torch.compiler.is_dynamo_compiling() else kept(text)

    return call


def mark_dynamic(t: torch.Tensor, dim: int) -> None:
    """Let Dynamo make a dimension symbolic from the first compile on, without insisting on it."""
    torch._dynamo.maybe_mark_dynamic(t, dim)


def uncompiled(model: Any) -> Any:
    """Return the module behind ``torch.compile(model)``; any other module itself.

    Raises:
        InvalidType: No module.
    """
    found = getattr(model, "_orig_mod", model)
    if not isinstance(found, torch.nn.Module):
        raise InvalidType(f"{shown(model)} is no nn.Module: give a model")
    return found


def placeholder_source(node: torch.fx.Node) -> str:
    """Say where Dynamo found an input; "" if it doesn't say.

    For example ``L['self']._modules['fc']._parameters['weight']``.
    """
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)  # a method up to torch 2.11, an attribute since


#: Of an input's ``tensor_dict``: not None if Dynamo takes its address for one that stays.
STATIC_INPUT = "_dynamo_static_input_type"


def resolve_source(source: str, root: Any) -> Any:
    """Return the object that a source names, if ``root`` is what its path starts from; else None.

    A path starts with ``L['self']``, whatever ``forward`` calls its first argument; with
    ``L['args'][0]`` where it takes whatever comes.
    """
    value: Any = root
    first = "L['args'][0]"
    tail = source[len(first) :] if source.startswith(first) else source.partition("]")[2]
    parts = re.findall(r"\.(\w+)|\[(?:'([^']*)'|(\d+))\]", tail)
    for attribute, key, index in parts:
        try:
            if attribute:
                value = getattr(value, attribute)
            else:
                value = value[key] if not index else value[int(index)]
        except (AttributeError, KeyError, IndexError, TypeError):
            return None
    return value


def lookup_backend(name: str) -> Callable[..., Any]:
    """Look up a Dynamo backend by name."""
    found: Callable[..., Any] = torch._dynamo.lookup_backend(name)
    return found


@contextlib.contextmanager
def compile_events() -> Iterator[list[str]]:
    """List the graphs that Dynamo compiles inside, with its reasons, once the block has ended."""
    compiled: list[str] = []
    events: list[str] = []

    def started(args: Any) -> None:
        if args.callback_trigger is CallbackTrigger.DYNAMO:
            compiled.append(str(args.compile_id))

    callback = torch._dynamo.callback.on_compile_start(started)
    try:
        yield events
    finally:
        with contextlib.suppress(ValueError):  # reset() inside has removed it
            torch._dynamo.callback.callback_handler.remove_start_callback(callback)
        metrics = torch._dynamo.utils.get_compilation_metrics()
        reasons = {m.compile_id: m.recompile_reason for m in metrics}
        events += [f"[{i}] {reasons.get(i) or 'the first compile of its code'}" for i in compiled]


def graph_breaks() -> dict[str, int]:
    """Return how often Dynamo has broken a graph in this process, by reason."""
    return {str(why): int(n) for why, n in torch._dynamo.utils.counters["graph_break"].items()}


_COMPILED: Final[ContextVar[set[str] | None]] = ContextVar("_COMPILED", default=None)


@contextlib.contextmanager
def compiled_layers() -> Iterator[set[str]]:
    """Collect the paths of layers that our backend meets in what is compiled inside."""
    found: set[str] = set()
    token = _COMPILED.set(found)
    try:
        yield found
    finally:
        _COMPILED.reset(token)


def note_compiled(paths: Iterable[str]) -> None:
    """Tell whoever collects them of the layers of a graph."""
    found = _COMPILED.get()
    if found is not None:
        found.update(paths)


def graphs_compiled() -> int:
    """Return the number of graphs that Dynamo has handed to a backend in this process.

    ``reset()`` leaves the count. No public function of torch tells it (2.11 to 2.13).
    """
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


F = TypeVar("F", bound=Callable[..., Any])


def not_traced(fn: F, *, below: bool = True) -> F:
    """Hide a function from Dynamo; with ``below=False`` Dynamo sees the functions it calls.

    The public spelling of that, ``recursive=False``, refuses ``torch.export`` (torch 2.13).
    """
    return cast("F", torch.compiler.disable(fn) if below else skip(fn))


def dynamo_is_on() -> bool:
    """Say whether Dynamo may compile the functions called next, as below ``torch.compile``."""
    return get_eval_frame_callback() is not None


def compile_apart(call: Callable[..., Any], name: str, **options: Any) -> Callable[..., Any]:
    """Compile a call as a frame with a code object of its own, and so a limit of its own.

    Args:
        call: What the frame does with its arguments.
        name: Of the frame, in Dynamo's logs.
        options: Of ``torch.compile``.
    """

    def apart(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    own = types.FunctionType(
        apart.__code__.replace(co_name=name), globals(), closure=apart.__closure__
    )
    compiled: Callable[..., Any] = torch.compile(own, **options)
    return compiled


def compile_whole(model: torch.nn.Module, **options: Any) -> Callable[..., Any]:
    """Compile a module with its hooks, as one frame of its own.

    Dynamo does not look for hooks of a module again (torch 2.13): with other hooks than before, it
    is another frame.

    ``Module.compile`` starts from a frame of torch's that Dynamo skips: of an ``nn.Sequential`` it
    compiles nothing but what lies below its children (torch 2.13), and instances of one class share
    one cache with one limit of recompiles. A frame of ours, with its own code object, has neither.
    """
    call: Callable[..., Any] = model._call_impl
    by_hooks: dict[tuple[int, ...], Callable[..., Any]] = {}

    def run(*args: Any, **kwargs: Any) -> Any:
        hooks = (*model._forward_pre_hooks, *model._forward_hooks, *model._backward_pre_hooks)
        key = (*hooks, *model._backward_hooks)  # numbers, each given once
        if key not in by_hooks:
            by_hooks[key] = compile_apart(call, f"{type(model).__name__}_whole_model", **options)
        return by_hooks[key](*args, **kwargs)

    return not_traced(run, below=False)


def static_below(root: torch.nn.Module) -> set[int]:
    """Return the ``id`` of every module that Dynamo reaches through a module of torch's own.

    Its containers apart, the shapes of all that Dynamo finds there are static (torch 2.11 to 2.13).
    """
    found: set[int] = set()
    for owner in root.modules():
        where = type(owner).__module__
        own = where.startswith(("torch.nn.modules", "torch.ao."))
        if own and not where.startswith("torch.nn.modules.container"):
            found |= {id(child) for child in owner.modules() if child is not owner}
    return found

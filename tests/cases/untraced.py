"""Code that runs without the tracer of coverage, under which it takes twice as long."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def tracing(tracer: Any) -> Iterator[None]:
    """Let another tracer, or none, be told what runs."""
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        yield
    finally:
        sys.settrace(before)


def untraced() -> Any:
    """Take the tracer off; a decorator, too."""
    return tracing(None)


def keep_compilers_from_coverage() -> None:
    """Dynamo runs nothing of ours before it has a graph, and Inductor next to nothing after."""
    _keep_dynamo()
    if "torch._inductor.graph" in sys.modules:
        _keep_inductor()


@functools.cache
def _keep_inductor() -> None:
    lowering: Any = sys.modules["torch._inductor.graph"].GraphLowering
    for name in ("run", "compile_to_module"):
        setattr(lowering, name, untraced()(getattr(lowering, name)))


@functools.cache
def _keep_dynamo() -> None:
    from torch._dynamo import output_graph, symbolic_convert

    translator: Any = symbolic_convert.InstructionTranslator
    graph: Any = output_graph.OutputGraph
    reads, calls = translator.run, graph.call_user_compiler

    def run(self: Any) -> Any:
        self.output.tracer_before = sys.gettrace()
        with untraced():
            return reads(self)

    def call_user_compiler(self: Any, *args: Any, **kwargs: Any) -> Any:
        with tracing(self.tracer_before):
            return calls(self, *args, **kwargs)

    translator.run, graph.call_user_compiler = run, call_user_compiler

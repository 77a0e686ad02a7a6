"""Helpers for tests, ours and yours: golden graphs, recompiles, a backend that keeps graphs."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from torch.fx import GraphModule

from kasmina_fx._torch.dynamo import compile_events, graphs_compiled, lookup_backend
from kasmina_fx.arguments import SeedIds
from kasmina_fx.backend import compile_rewritten, split_options
from kasmina_fx.errors import GraphMismatch
from kasmina_fx.graphs.text import graph_text
from kasmina_fx.layer import KasminaLayer
from kasmina_fx.lifecycle import SeedLifecycle
from kasmina_fx.passes import run_passes
from kasmina_fx.passes.infra.copying import copy_graph_module

#: Golden files that this process has compared with, for a check that none is orphaned.
USED_GOLDENS: Final[set[Path]] = set()


def assert_golden(
    gm_or_text: GraphModule | str, name: str, *, golden_dir: str | Path = "golden"
) -> None:
    """Compare a graph, or any text, with ``<golden_dir>/<name>.txt``.

    With ``EXPECTTEST_ACCEPT=1`` in the environment the file is written instead.

    Args:
        gm_or_text: A graph module (compared as :func:`kasmina_fx.graph_text`) or a text.
        name: Of the file, without its ending; may hold slashes.
        golden_dir: Relative to the working directory.

    Raises:
        GraphMismatch: With a diff, or when there is no such file.
    """
    text = gm_or_text if isinstance(gm_or_text, str) else graph_text(gm_or_text)
    path = Path(golden_dir, f"{name}.txt")
    USED_GOLDENS.add(path.resolve())
    if os.environ.get("EXPECTTEST_ACCEPT"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return
    if not path.exists():
        raise GraphMismatch(f"{path} does not exist; EXPECTTEST_ACCEPT=1 writes it")
    expected = path.read_text(encoding="utf-8")
    if text != expected:
        lines = difflib.unified_diff(
            expected.splitlines(), text.splitlines(), str(path), "this graph", lineterm=""
        )
        raise GraphMismatch(
            f"{path} differs; EXPECTTEST_ACCEPT=1 accepts the new graph\n" + "\n".join(lines)
        )


@contextmanager
def assert_no_recompiles() -> Iterator[None]:
    """Fail when Dynamo compiles anything inside, and say why it did.

    Raises:
        GraphMismatch: At the end of the block, with Dynamo's reasons.
    """
    with compile_events() as events:
        yield
    if events:
        raise GraphMismatch(
            f"{len(events)} compiles where none was expected:\n" + "\n".join(events)
        )


def compiles() -> int:
    """Count the graphs that Dynamo has compiled so far in this process, whoever asked for them.

    What a stretch of code compiled is the difference of two calls. Models of others count too;
    ``torch.compiler.reset()`` does not set the count back.

    Returns:
        Graphs handed to any backend; a frame with graph breaks has several.
    """
    return graphs_compiled()


class RecordingBackend:
    """The passes, then any compiler; keeps the graphs before and after.

    Args:
        compiler: "inductor", or the name of another backend: "eager", "aot_eager", ...
        options: As of the ``kasmina`` backend.

    Use one object for one ``torch.compile`` call: Dynamo takes another object for another backend.
    """

    def __init__(self, compiler: str = "aot_eager", **options: Any) -> None:
        self.compiler, self.options = compiler, options
        self.before: list[GraphModule] = []
        self.after: list[GraphModule] = []

    @property
    def compiles(self) -> int:
        """Graphs compiled so far."""
        return len(self.before)

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """What Dynamo calls."""
        passes, patches = split_options(None, self.options)
        self.before.append(copy_graph_module(gm))
        run_passes(gm, passes)
        self.after.append(copy_graph_module(gm))
        if self.compiler == "inductor":
            return compile_rewritten(gm, example_inputs, patches)
        compiled: Callable[..., Any] = lookup_backend(self.compiler)(gm, example_inputs)
        return compiled


_WAY: Final = tuple(SeedLifecycle)[SeedLifecycle.TRAINING : SeedLifecycle.FOSSILIZED + 1]


def graft(
    layer: KasminaLayer,
    seed_ids: SeedIds,
    blueprint: int | str | None = None,
    alpha: float = 0.5,
    stage: SeedLifecycle = SeedLifecycle.GRAFTING,
) -> None:
    """Bring dormant seeds of a layer to a stage, GERMINATED to FOSSILIZED, in one transaction."""
    with layer.transaction():
        if not layer.request_germination(seed_ids, blueprint):
            raise GraphMismatch(f"{layer.layer_id}: one of {seed_ids} is not dormant")
        for step in _WAY:
            if step <= stage:
                layer.advance(seed_ids, step)
        layer.set_alpha(seed_ids, alpha)


__all__ = ["RecordingBackend", "assert_golden", "assert_no_recompiles", "compiles", "graft"]

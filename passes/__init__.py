"""The pipeline: marker nodes in, chunked subgraphs over state buffers out.

Entry points are :func:`rewrite` (a copy of the graph is rewritten) and :func:`run_passes` (in
place, for backends). A pass is one file: a frozen dataclass with a ``name``, options as fields,
``call(gm)``, and ``ensures(gm)`` that checks its postcondition. To add one, write the file and put
it into :data:`DEFAULT_PASSES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from kasmina_fx.arguments import check_instance
from kasmina_fx.errors import InvalidArgument, shown
from kasmina_fx.passes.absorb_activation import AbsorbActivation
from kasmina_fx.passes.choose_lowerings import ChooseLowerings
from kasmina_fx.passes.eliminate_dead_code import EliminateDeadCode
from kasmina_fx.passes.eliminate_dormant import EliminateDormant
from kasmina_fx.passes.group_telemetry import GroupTelemetry
from kasmina_fx.passes.infra.copying import copy_graph_module
from kasmina_fx.passes.infra.matching import Match, find_matches, has_markers
from kasmina_fx.passes.infra.metadata import propagate_if_missing
from kasmina_fx.passes.infra.pass_base import GraphPass, PassRecord, records_of
from kasmina_fx.passes.lower_blend import LowerBlend
from kasmina_fx.passes.normalize_markers import NormalizeMarkers
from kasmina_fx.passes.place_telemetry import PlaceTelemetry
from kasmina_fx.passes.unpin_tables import UnpinTables
from kasmina_fx.passes.verify import Verify

__all__ = [
    "DEFAULT_PASSES",
    "GraphPass",
    "Match",
    "PassRecord",
    "find_matches",
    "passes_for",
    "records_of",
    "rewrite",
    "run_passes",
]

DEFAULT_PASSES: Final[tuple[GraphPass, ...]] = (
    UnpinTables(),  # they are replaced at every change: CUDA graphs copy them in
    NormalizeMarkers(),  # one spelling of a marker: .default overload, positional arguments
    AbsorbActivation(),  # say for each blend which activation a kernel could take along
    ChooseLowerings(),  # say for each marker what becomes of it, and why
    EliminateDormant(),  # a layer without a blueprint slot is its base
    LowerBlend(),  # the others become a chunked subgraph over their banks
    PlaceTelemetry(),  # statistics of the output, merged into their buffer
    GroupTelemetry(),  # kernels for statistics of several layers become one
    EliminateDeadCode(),  # of what was inserted, only what is used stays
    Verify(),  # metadata, leftovers, isolation
)


def passes_for(
    lowering: str = "auto", *, strict: bool = False, disabled: Sequence[str] = ()
) -> tuple[GraphPass, ...]:
    """Return the default pipeline with options.

    Args:
        lowering: See :class:`ChooseLowerings`.
        strict: Let :class:`Verify` fail when a marker was not rewritten.
        disabled: Names of passes to leave out.

    Raises:
        InvalidArgument: A name that no pass has.
    """
    known = [step.name for step in DEFAULT_PASSES]
    for name in disabled:
        if name not in known:
            raise InvalidArgument(f"no pass is named {shown(name)}; there are {', '.join(known)}")
    options: dict[type[Any], dict[str, Any]] = {
        ChooseLowerings: {"lowering": lowering},
        Verify: {"strict": strict},
    }
    return tuple(
        dataclasses.replace(step, **options.get(type(step), {}))
        for step in DEFAULT_PASSES
        if step.name not in disabled
    )


def run_passes(gm: GraphModule, passes: Sequence[GraphPass] = DEFAULT_PASSES) -> PassResult:
    """Rewrite ``gm`` in place; without markers it stays untouched and ``modified`` is False."""
    check_instance("gm", gm, GraphModule)
    if not has_markers(gm):
        return PassResult(gm, False)
    modified = False
    for step in passes:
        result = step(gm)
        gm, modified = result.graph_module, modified or result.modified
    return PassResult(gm, modified)


def rewrite(
    gm: GraphModule,
    example_inputs: Sequence[Any] | None = None,
    *,
    passes: Sequence[GraphPass] = DEFAULT_PASSES,
) -> PassResult:
    """Rewrite a copy of a captured graph; parameters and buffers are shared with it.

    Args:
        gm: From :func:`kasmina_fx.capture`, Dynamo, ``torch.fx`` or ``torch.export(...).module()``
            (exported inside :func:`kasmina_fx.physical.programs.recording_markers`).
        example_inputs: Needed where the graph holds no shapes (``torch.fx.symbolic_trace`` leaves
            none).
        passes: The pipeline.

    Returns:
        ``PassResult(graph_module, modified)``: the same object and False when nothing matched.
    """
    check_instance("gm", gm, GraphModule)
    if not has_markers(gm):
        return PassResult(gm, False)
    rewritten = copy_graph_module(gm)
    propagate_if_missing(rewritten, example_inputs)
    result = run_passes(rewritten, passes)
    return result if result.modified else PassResult(gm, False)

"""Say what the compiler makes of a model, without running it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Any, Final

from torch import nn
from torch.fx import GraphModule

from kasmina_fx._torch.dynamo import uncompiled
from kasmina_fx.banks.bank import Bank
from kasmina_fx.errors import RewriteError
from kasmina_fx.graphs.capture import capture, capture_with_breaks
from kasmina_fx.graphs.text import op_counts
from kasmina_fx.layer import KasminaLayer
from kasmina_fx.lowerings.cost import Candidate
from kasmina_fx.model import kasmina_layers
from kasmina_fx.passes import DEFAULT_PASSES, GraphPass, find_matches, run_passes
from kasmina_fx.passes.absorb_activation import AbsorbActivation
from kasmina_fx.passes.choose_lowerings import ChooseLowerings
from kasmina_fx.passes.infra.matching import Match, argument
from kasmina_fx.passes.infra.metadata import role_of, value_of
from kasmina_fx.passes.normalize_markers import NormalizeMarkers
from kasmina_fx.seeds.entry_names import OWN
from kasmina_fx.seeds.finished import in_evaluation
from kasmina_fx.targets import skipped_targets, targets_of

#: What a call costs on a compiled model.
CALLS: Final = {
    "request_germination": (
        "data, but for a blueprint's first germination in the model, and for the layer that joins "
        "those that grew first: one compile each"
    ),
    "advance": "data; when all seeds that run are FOSSILIZED, one compile for evaluation in a life",
    "set_alpha": "data",
    "cancel_germination": "data",
    "step_epoch": "data",
    "transaction": "data",
    "register_blueprint": (
        "nothing now; one compile at its first germination, for all registered so far"
    ),
    "load_state_dict": "data, but for banks that the model does not have yet: one compile",
}


_RESTS: Final = "none of its seeds has grown yet; it joins with the first"


@dataclass(frozen=True)
class LayerReport:
    """One layer, or one target that was left alone.

    ``folding`` says what becomes of its FOSSILIZED seeds in evaluation; "" if it has none.
    """

    layer: str
    matched: bool
    reason: str | None
    lowering: str
    why: str
    seeds: int = 0
    blended: int = 0
    layout: str = ""
    slots: dict[str, str] = field(default_factory=dict)
    bytes: int = 0
    flops: int = 0
    graph: int = 0
    candidates: tuple[Candidate, ...] = ()
    folding: str = ""


@dataclass(frozen=True)
class Explanation:
    """The report of :func:`explain`; ``str()`` is a table.

    Attributes:
        breaks: Why the model is more than one graph, if it is.
        left: The modules with parameters that ``kasminify`` left without seeds, and why.
    """

    layers: tuple[LayerReport, ...]
    calls: dict[str, str]
    nodes_before: int
    nodes_after: int
    breaks: tuple[str, ...] = ()
    left: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return asdict(self)

    def __str__(self) -> str:
        """A table of the layers, then what calls cost."""
        head = ("layer", "lowering", "seeds", "blended", "slots", "bytes", "MFLOP", "us", "why")
        rows = [head, *(_row(report) for report in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row[:-1], widths, strict=True)), row[-1]])
            for row in rows
        ]
        lines.append(f"nodes: {self.nodes_before} before the passes, {self.nodes_after} after")
        lines += [f"{r.layer or '(model)'}: {r.folding}" for r in self.layers if r.folding]
        lines += [f"graph break: {why}" for why in self.breaks]
        lines += [f"{name or '(model)'}: left: {why}" for name, why in self.left.items()]
        lines += [f"{call}: {cost}" for call, cost in self.calls.items()]
        return "\n".join(lines)


def explain(
    model: nn.Module,
    *args: Any,
    passes: Sequence[GraphPass] = DEFAULT_PASSES,
    **kwargs: Any,
) -> Explanation:
    """Which layers the passes find, what they choose and why, and what that costs.

    The model isn't run; where Dynamo breaks its graph, a copy of it is, and layers are of several
    graphs.

    Args:
        model: Compiled or not.
        *args: Example inputs of its forward; only their shapes matter.
        passes: The pipeline.
        **kwargs: More example inputs.

    Bytes count all that the seeds of a layer have on its device, dormant ones too; FLOPs those of
    one forward on such inputs, two a multiply-add, for the slots in use. Microseconds are those
    that a layer's blend is predicted to take in each lowering that can, for a forward and, unless
    gradients are off, its backward.
    """
    plain: nn.Module = uncompiled(model)
    graphs, breaks = _graphs(plain, args, kwargs)
    before = sum(sum(op_counts(gm).values()) for gm in graphs)
    for step in passes:
        if isinstance(step, (NormalizeMarkers, AbsorbActivation)):  # what a choice goes by
            graphs = [step(gm).graph_module for gm in graphs]
    chooser = next((p for p in passes if isinstance(p, ChooseLowerings)), ChooseLowerings())
    layers = kasmina_layers(plain)
    matches = {
        match.layer or _named_by_inputs(match, layers): (number, match)
        for number, gm in enumerate(graphs)
        for match in find_matches(gm)
        if match.is_blend
    }
    reports = [
        replace(
            _report(name, layer, match, chooser),
            graph=number,
            folding=in_evaluation(layer.kasmina),
        )
        for name, layer in layers.items()
        for number, match in [matches.get(name, (0, None))]
    ]
    reports += [
        LayerReport(name, False, why, "none", why)
        for name, why in skipped_targets(plain, (nn.Linear,))
    ]
    after = sum(_nodes_after(gm, passes) for gm in graphs)
    report = targets_of(plain)
    left = {} if report is None else report.left
    return Explanation(tuple(reports), dict(CALLS), before, after, breaks, left)


def _graphs(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[GraphModule], tuple[str, ...]]:
    """The graphs of a model, and why it is more than one."""
    try:
        return [capture(model, *args, **kwargs)], ()
    except RewriteError:
        graphs, breaks = capture_with_breaks(model, *args, **kwargs)
        return graphs, tuple(breaks)


def _named_by_inputs(match: Match, layers: Mapping[str, KasminaLayer]) -> str:
    """The layer of a marker where the front end doesn't say (behind an LSTM, Dynamo doesn't).

    It is the one whose tables the marker reads, or whose parameters its input is computed with.
    """
    computed_with = argument(match.node, "y").all_input_nodes
    for node in (*match.node.all_input_nodes, *computed_with):
        _, _, name = (role_of(node) or "").partition(" ")
        path = (
            name.strip().partition(f".{OWN}")[0] if OWN in name else name.strip().rpartition(".")[0]
        )
        if path in layers:
            return path
    return ""


def _nodes_after(gm: GraphModule, passes: Sequence[GraphPass]) -> int:
    return sum(op_counts(run_passes(gm, passes).graph_module).values())


def _report(
    name: str, layer: KasminaLayer, match: Match | None, chooser: ChooseLowerings
) -> LayerReport:
    if match is None:
        why = "the model does not call it on these inputs"
        return LayerReport(name, False, why, "none", why, layer.num_seeds, bytes=bytes_of(layer))
    lowering = chooser.choose(match)
    banks: list[Bank] = layer.kasmina.bank_list()
    value = value_of(argument(match.node, "y"))
    rows = prod(int(size) for size in value.shape) // layer.chunks.layer_dim
    return LayerReport(
        layer=name,
        matched=match.reason is None,
        reason=match.reason,
        lowering=lowering.name,
        why=_RESTS if banks and not layer.kasmina.takes_part else lowering.why,
        seeds=layer.num_seeds,
        blended=int(layer.state.blended.sum()),
        layout=str(layer.chunks.layout),
        slots={b.key: _slots(b, layer) for b in banks},
        bytes=bytes_of(layer),
        flops=sum(2 * rows * b.seeds.numel() * _multiplies(b) for b in banks),
        candidates=lowering.candidates,
    )


def bytes_of(layer: KasminaLayer) -> int:
    """Count the bytes of a layer's seeds: state, statistics, tables and blueprints."""
    store = layer.kasmina
    derived = (table for _, table in store.derived())
    return sum(t.nbytes for t in (*store.parameters(), *store.buffers(), *derived))


def _slots(bank: Bank, layer: KasminaLayer) -> str:
    """Say how many are in use of those allocated, and how many run where tables are padded."""
    running = f" (padded to {len(bank.seeds)})" if layer.config.pad else ""
    return f"{int((bank.held > 0).sum())}/{bank.capacity}{running}"


def _multiplies(bank: Bank) -> int:
    return sum(prod(spec.shape) for spec in bank.tensor_specs if len(spec.shape) > 1)


def _times(found: Sequence[Candidate]) -> str:
    """Say what each lowering that can is predicted to take."""
    times = [(each.name, each.microseconds) for each in found if each.microseconds is not None]
    return ", ".join(f"{name} {time:.3g}" for name, time in times) or "-"


def _row(report: LayerReport) -> tuple[str, ...]:
    slots = " ".join(f"{key} {used}" for key, used in report.slots.items())
    return (
        report.layer or "(model)",
        report.lowering,
        str(report.seeds),
        str(report.blended),
        slots or "-",
        str(report.bytes),
        f"{report.flops / 1e6:.3g}",
        _times(report.candidates),
        report.why,
    )

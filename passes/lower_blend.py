"""Blend markers become chunked subgraphs over their banks.

    before  %blend = kasmina.blend.default(%y, [alpha, roles, faults, loss_scale], [seeds],
                                           [positions], [modes], [trainees], [order],
                                           [w1, b1, w2, b2], ...)
    after   %chunks = view(%y)                                              (rows, n, size)
            %taken = kasmina.gather.default(%chunks, seeds, positions, -2)  (K, M, rows, size)
            %rows, %w1, ..., %alone, %sane = kasmina.guard.default([%taken, w1, ...], modes, ...)
            %f = bmm(relu(bmm(%rows, %w1) + %b1), %w2) + %b2
            %f = kasmina.reconstruct.default(%f, %taken, trainees, loss_scale, %alone, %sane)
            %out, _ = kasmina.mix.default(%chunks, [%f], [%sane], [positions], [seeds], alpha,
                                          roles, -2)                        (rows, n, size)
            %notes = kasmina.notes.default([%f], [%taken], [%sane], [positions], alpha, roles)

The number of nodes depends on runs and blueprint classes, never on the number of seeds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from kasmina_fx.errors import RewriteError
from kasmina_fx.lowerings import FALLBACK, Wanted, lowering_named
from kasmina_fx.passes.infra.following import follower_of, observers_of
from kasmina_fx.passes.infra.matching import (
    Match,
    argument,
    blend_arguments,
    blend_matches,
    find_matches,
    graph_modules,
    require_normal,
)
from kasmina_fx.passes.infra.metadata import (
    has_value,
    lowering_of,
    set_value,
    then_of,
    value_of,
)
from kasmina_fx.passes.infra.outputs import outputs_of
from kasmina_fx.passes.infra.pass_base import GraphPass
from kasmina_fx.passes.infra.regions import autocast_at
from kasmina_fx.passes.infra.splicing import splice
from kasmina_fx.passes.infra.templates import (
    Argument,
    Meaning,
    Size,
    fixed_argument,
    named_argument,
    trace_template,
)
from kasmina_fx.physical.graph_inputs import LISTS, BlendArguments
from kasmina_fx.physical.markers import BLEND


@dataclass(frozen=True)
class LowerBlend(GraphPass):
    """Blend markers with a bank become the traced graph of :mod:`kasmina_fx.physical.blend`."""

    name: ClassVar[str] = "lower_blend"

    def requires(self, gm: GraphModule) -> None:
        """See :meth:`GraphPass.requires`."""
        require_normal(gm, self.name)

    def call(self, gm: GraphModule) -> bool:
        """See :meth:`GraphPass.call`."""
        matches = [match for match in blend_matches(gm) if match.banks]
        for match in matches:
            self._lower(match)
        return bool(matches)

    def _lower(self, match: Match) -> None:
        node, graph = match.node, match.graph_module.graph
        asked = blend_arguments(node)
        counts = tuple(len(getattr(asked, name)) for name in LISTS)
        inputs = asked.tensors()
        chosen = self._chosen(match)
        wanted = self._wanted(node, chosen)
        template = trace_template(
            _Blend(chosen, wanted, asked.chunks, asked.banks, counts),
            _described(match, asked),
            inputs,
            autocast_at(node),
        )
        out, notes, *seen = splice(match.graph_module, node, template, inputs, by=self.name)
        if wanted.then:
            self._absorb(match, out, seen)
        for nodes, result in zip(outputs_of(node), (out, notes), strict=True):
            for old in nodes:
                if has_value(old):
                    set_value(result, value_of(old), like=node)
                old.replace_all_uses_with(result)
                graph.erase_node(old)
        graph.erase_node(node)

    def _absorb(self, match: Match, out: Node, seen: list[Node]) -> None:
        follower = follower_of(match.node)
        assert follower is not None  # as the marker's annotation says
        set_value(out, value_of(follower.node), like=match.node)
        follower.node.replace_all_uses_with(out)
        match.graph_module.graph.erase_node(follower.node)
        layout = replace(match.chunks, feature_dim=-1)
        for observer in observers_of(match.node):
            _, notes, telemetry, *_ = observer.args
            observer.args = (seen[0], notes, telemetry, str(layout), 1, 0)

    def _chosen(self, match: Match) -> str:
        lowering = lowering_of(match.node)
        return FALLBACK if lowering is None else lowering.name

    def _wanted(self, node: Node, chosen: str) -> Wanted:
        _, notes = outputs_of(node)
        then = then_of(node) if lowering_named(chosen).absorbs else ""
        samples = {_sample(observer) for observer in observers_of(node)}
        if len(samples) > 1:
            then = ""
        # Dynamo guards on the mode, so a graph for inference is never asked for a backward.
        return Wanted(
            torch.is_grad_enabled(),
            any(n.users for n in notes),
            then,
            next(iter(samples), None) if then else None,
        )

    def ensures(self, gm: GraphModule) -> None:
        """See :meth:`GraphPass.ensures`."""
        for module in graph_modules(gm):
            left = [n.name for n in module.graph.find_nodes(op="call_function", target=BLEND)]
            if left:
                reasons = {
                    m.node.name: m.reason for m in find_matches(gm) if m.is_blend and m.banks
                }
                unexplained = [name for name in left if reasons.get(name, "dormant") is None]
                if unexplained:
                    raise RewriteError(f"{self.name} left {unexplained}")


@dataclass(frozen=True)
class _Blend(Meaning):
    """The meaning of a blend whose lists hold ``counts`` tensors, in some lowering."""

    lowering: str
    wanted: Wanted
    chunks: str
    banks: str
    counts: tuple[int, ...]

    def __call__(self, *tensors: Tensor) -> Any:
        y, *flat = tensors
        rest = iter(flat)
        lists: list[Any] = [[next(rest) for _ in range(count)] for count in self.counts]
        asked = BlendArguments(*[y, *lists, self.chunks, self.banks])
        return lowering_named(self.lowering).blend(asked, self.wanted)


def _sample(observer: Node) -> tuple[int, int]:
    return argument(observer, "one_in") or 1, argument(observer, "rows") or 0


def _described(match: Match, asked: Any) -> list[Argument]:
    arguments = [fixed_argument(asked.y, {match.chunks.feature_dim})]
    arguments += [fixed_argument(n, {0}) for n in asked.layer]
    # Tables of one bank share their symbols; a stack's capacity is its own, and must not look
    # smaller than the slots in use.
    shapes = [(Size(f"k{i}"), Size(f"m{i}")) for i in range(len(match.banks))]
    arguments += [named_argument(n, *s) for n, s in zip(asked.seeds, shapes, strict=True)]
    arguments += [fixed_argument(n, {0}) for n in asked.positions]
    arguments += [named_argument(n, *s) for n, s in zip(asked.modes, shapes, strict=True)]
    arguments += [named_argument(n, Size(f"t{i}")) for i, n in enumerate(asked.trainees)]
    arguments += [named_argument(n, Size(f"q{i}")) for i, n in enumerate(asked.order)]
    owners = [i for i, bank in enumerate(match.banks) for _ in range(bank.num_params)]
    for i, node in zip(owners, asked.params, strict=True):
        arguments.append(named_argument(node, Size(f"c{i}", hint=101)))
    return arguments

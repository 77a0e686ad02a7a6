"""Blend markers become chunked subgraphs over their banks.

    before  %blend = kasmina.blend.default(%y, [alpha, roles, faults, loss_scale], [seeds],
                                           [positions], [modes], [trainees], [w1, b1, w2, b2], ...)
    after   %chunks = view(%y)                                  (n, rows, size)
            %taken = kasmina.gather.default(%chunks, seeds, positions)   (K, rows, size)
            %rows, %w1, ... = kasmina.guard.default([%taken, w1, ...], modes, positions, faults)
            %f = bmm(relu(bmm(%rows, %w1) + %b1), %w2) + %b2
            %f = kasmina.reconstruct.default(%f, %taken, trainees, loss_scale)
            %pulled = kasmina.pull.default(%f, positions, seeds)         (n, rows, size)
            %finite = kasmina.pull.default(amax(abs(%f)) < inf, positions, seeds)         (n,)
            %blended = %finite & (roles == BLENDS)
            %out = where(%blended, %chunks + alpha * (%pulled - %chunks), %chunks)

The number of nodes depends on runs and blueprint classes, never on the number of seeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

from torch import Tensor
from torch.fx import GraphModule

from kasmina_fx import physical
from kasmina_fx.errors import RewriteError
from kasmina_fx.passes.eliminate_dormant import outputs_of
from kasmina_fx.passes.matching import Match, argument, blend_matches
from kasmina_fx.passes.pass_base import GraphPass
from kasmina_fx.passes.regions import autocast_at
from kasmina_fx.passes.splicing import splice
from kasmina_fx.passes.templates import Argument, tensor_argument, trace_template

#: The marker's arguments that are lists of tensors, in the order of its schema.
LISTS: Final = ("layer", "seeds", "positions", "modes", "trainees", "params")


@dataclass(frozen=True)
class LowerBlend(GraphPass):
    """Blend markers with a bank become the traced graph of :func:`kasmina_fx.physical.blend`."""

    name: ClassVar[str] = "lower_blend"

    def call(self, gm: GraphModule) -> bool:
        """See :meth:`GraphPass.call`."""
        matches = [match for match in blend_matches(gm) if match.banks]
        for match in matches:
            self._lower(match)
        return bool(matches)

    def _lower(self, match: Match) -> None:
        node, graph = match.node, match.graph_module.graph
        lists = [argument(node, name) for name in LISTS]
        inputs = [argument(node, "y"), *(n for nodes in lists for n in nodes)]
        chunks, banks = argument(node, "chunks"), argument(node, "banks")
        counts = [len(nodes) for nodes in lists]

        def blend(y: Tensor, *flat: Tensor) -> tuple[Tensor, Tensor]:
            rest, groups = list(flat), []
            for count in counts:
                groups.append([rest.pop(0) for _ in range(count)])
            layer, seeds, positions, modes, trainees, params = groups
            return physical.blend(
                y, layer, seeds, positions, modes, trainees, params, chunks, banks
            )

        template = trace_template(
            ("blend", chunks, banks),
            blend,
            self._arguments(match, lists),
            inputs,
            autocast_at(node),
        )
        results = splice(match.graph_module, node, template, inputs, by=self.name)
        for nodes, result in zip(outputs_of(node), results, strict=True):
            for old in nodes:
                old.replace_all_uses_with(result)
                graph.erase_node(old)
        graph.erase_node(node)

    def _arguments(self, match: Match, lists: list[Any]) -> list[Argument]:
        layer, seeds, positions, modes, trainees, params = lists
        y = argument(match.node, "y")
        arguments = [tensor_argument(y, fixed={match.chunks.feature_dim})]
        # Tables of one bank share their symbols; a stack's capacity is its own.
        arguments += [tensor_argument(n, fixed={0}) for n in layer]
        arguments += [tensor_argument(n, names=(f"k{i}", f"m{i}")) for i, n in enumerate(seeds)]
        arguments += [tensor_argument(n, fixed={0}) for n in positions]
        arguments += [tensor_argument(n, names=(f"k{i}", f"m{i}")) for i, n in enumerate(modes)]
        arguments += [tensor_argument(n, names=(f"t{i}",)) for i, n in enumerate(trainees)]
        owners = [i for i, bank in enumerate(match.banks) for _ in range(bank.num_params)]
        for i, node in zip(owners, params, strict=True):
            arguments.append(tensor_argument(node, names=(f"c{i}",)))
        return arguments

    def ensures(self, gm: GraphModule) -> None:
        """See :meth:`GraphPass.ensures`."""
        left = [match for match in blend_matches(gm) if match.banks]
        if left:
            raise RewriteError(f"{self.name} left {[match.node.name for match in left]}")

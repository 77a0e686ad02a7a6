"""The contract of a graph pass."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar, Final

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

_LOG = logging.getLogger(__name__)
_RECORDS: Final = "kasmina_passes"
#: Where a graph's ``meta`` keeps the matches that were found in it, until a pass changes a node.
MATCHES: Final = "kasmina_matches"


@dataclass(frozen=True)
class PassRecord:
    """Says what one pass did to one graph.

    Attributes:
        name: The pass.
        modified: It changed a node.
        seconds: The time that ``call``, linting and ``ensures`` took.
        op_counts: How many nodes of each target there are more (or fewer: negative) than before.
    """

    name: str
    modified: bool
    seconds: float
    op_counts: dict[str, int]


@dataclass(frozen=True)
class GraphPass(ABC):
    """Rewrites a graph module, in place.

    A pass says what it needs of a graph (:meth:`requires`), does it (:meth:`call`), and checks what
    it promises (:meth:`ensures`) by other means than those that it used.
    """

    name: ClassVar[str]

    def requires(self, gm: GraphModule) -> None:  # noqa: B027 - optional: most take any graph
        """Raise RewriteError if a pass that has to come before this one did not."""

    @abstractmethod
    def call(self, gm: GraphModule) -> bool:
        """Rewrite ``gm``; say whether a node changed."""

    def ensures(self, gm: GraphModule) -> None:  # noqa: B027 - optional: a pass may promise nothing
        """Raise RewriteError if what the pass promises doesn't hold."""

    def __call__(self, gm: GraphModule) -> PassResult:
        """Run ``requires``, ``call`` and ``ensures``; record time and the difference in op counts.

        A graph that was changed is linted and recompiled.
        """
        began, before = time.perf_counter(), node_counts(gm)
        self.requires(gm)
        modified = self.call(gm)
        if modified:
            _LOG.debug("%s changed the graph", self.name)
            gm.meta.pop(MATCHES, None)
            for module in gm.modules():
                if isinstance(module, GraphModule):
                    module.graph.lint()
                    module.recompile()
        self.ensures(gm)
        after = node_counts(gm) if modified else before
        counts = {t: after[t] - before[t] for t in before | after if after[t] != before[t]}
        seconds = time.perf_counter() - began
        record = PassRecord(self.name, modified, seconds, dict(sorted(counts.items())))
        gm.meta.setdefault(_RECORDS, []).append(record)
        return PassResult(gm, modified)


def records_of(gm: GraphModule) -> tuple[PassRecord, ...]:
    """Return what the passes that ran on a graph did to it, in order."""
    return tuple(gm.meta.get(_RECORDS, ()))


def node_counts(gm: GraphModule) -> Counter[str]:
    """Count the nodes of each target in a graph and the graphs nested in it."""
    modules = (module for module in gm.modules() if isinstance(module, GraphModule))
    return Counter(
        str(node.target)
        for module in modules
        for node in module.graph.nodes
        if node.op not in ("placeholder", "output")
    )

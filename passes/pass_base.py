"""What a pass is."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class GraphPass(ABC):
    """One rewrite of a graph module, in place."""

    name: ClassVar[str]

    @abstractmethod
    def call(self, gm: GraphModule) -> bool:
        """Rewrite ``gm``; say whether it changed."""

    def ensures(self, gm: GraphModule) -> None:  # noqa: B027 - optional: a pass may promise nothing
        """Raise RewriteError if what the pass promises doesn't hold."""

    def __call__(self, gm: GraphModule) -> PassResult:
        """``call`` and, if that changed anything, lint, recompile and ``ensures``."""
        modified = self.call(gm)
        if modified:
            _LOG.debug("%s changed the graph", self.name)
            for module in gm.modules():
                if isinstance(module, GraphModule):
                    module.graph.lint()
                    module.recompile()
        self.ensures(gm)
        return PassResult(gm, modified)

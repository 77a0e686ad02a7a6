"""What Inductor should do otherwise for the chunks of a rewritten graph."""

from __future__ import annotations

from typing import Any, Final

from torch.fx import GraphModule

from kasmina_fx.passes.infra.matching import graph_modules
from kasmina_fx.passes.infra.metadata import value_of
from kasmina_fx.physical.operators import MIX

#: Numbers of float32 in the widest vector of a CPU.
_LANES: Final = 16


def inductor_options(gm: GraphModule) -> dict[str, Any]:
    """Return options of Inductor that suit a graph.

    A CPU's innermost loop runs over the features of a chunk. Of one with fewer than a vector has
    lanes Inductor makes masked vectors, which take two to six times as long as plain numbers do
    (AMD EPYC with AVX-512, chunks of 2 to 8 features, torch 2.13).
    """
    for module in graph_modules(gm):
        for node in module.graph.find_nodes(op="call_function", target=MIX):
            host, dim = value_of(node.args[0]), node.args[-1]
            if host.device.type == "cpu" and dim == -2 and host.shape[-1] < _LANES:
                return {"cpp.enable_loop_tail_vec": False}
    return {}

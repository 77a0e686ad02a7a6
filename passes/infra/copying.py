"""Copy a graph module's graphs, sharing all parameters, buffers and leaf modules."""

from __future__ import annotations

import copy

from torch import nn
from torch.fx import GraphModule


def copy_graph_module(gm: GraphModule) -> GraphModule:
    """Return a graph module with graphs of its own (nested ones too) and the tensors of ``gm``."""
    root = nn.Module()
    root.__dict__.update({k: v for k, v in gm.__dict__.items() if not k.startswith("_graph")})
    root._modules = {
        name: copy_graph_module(child) if isinstance(child, GraphModule) else child
        for name, child in gm._modules.items()
    }
    graph = copy.deepcopy(gm.graph)
    for old, new in zip(gm.graph.nodes, graph.nodes, strict=True):
        if hasattr(old, "_dynamo_source"):  # AOT autograd asks placeholders for it
            new._dynamo_source = old._dynamo_source
    copied = GraphModule(root, graph, type(gm).__name__)
    copied.meta = dict(gm.meta)
    return copied

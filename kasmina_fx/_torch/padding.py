"""What torch forgets where Inductor pads a product: the strides of views of what comes out.

On CUDA Inductor pads matrices whose sizes are no multiples of what tensor cores like, where that
is quicker in a benchmark of its own, and cuts the product to size. A view of it that stood in the
graph before (a weight's gradient transposes it) keeps the strides it had. Where backward is given
another tensor than it expects, torch takes the strides of the tensor at hand, as numbers: with the
next batch size backward raises "expected size 3==3, stride 2800==2048" (torch 2.11 to 2.13).
"""

from __future__ import annotations

import operator
from typing import Any, Final, cast

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

_ATEN: Final = torch.ops.aten
_PRODUCTS: Final = (_ATEN.mm.default, _ATEN.bmm.default, _ATEN.addmm.default)


class ViewsOfProducts(CustomGraphPass):
    """Gives views of padded products the strides that they have."""

    def __call__(self, graph: Graph) -> None:
        """See the module."""
        for node in graph.find_nodes(op="call_function", target=_ATEN.slice.Tensor):
            if getattr(node.args[0], "target", None) in (*_PRODUCTS, _ATEN.slice.Tensor):
                _look_again(node)

    def uuid(self) -> Any:
        """Return what Inductor's cache knows the pass by."""
        return get_hash_for_files((__file__,))


def _look_again(node: Node) -> None:
    """Compute anew what the views of a node are, and theirs; ``split`` returns several."""
    for user in list(node.users):
        if not getattr(user.target, "is_view", False) or user.args[0] is not node:
            continue
        given: Any = (map_aggregate(user.args, _value), map_aggregate(user.kwargs, _value))
        (args, kwargs), target = given, cast("Any", user.target)
        try:
            with node.meta["val"].fake_mode:
                user.meta["val"] = target(*args, **kwargs)
        except (RuntimeError, ValueError):  # no view of what is cut; Inductor copies it
            continue
        _look_at_all(user)


def _look_at_all(view: Node) -> None:
    if isinstance(view.meta["val"], torch.Tensor):
        _look_again(view)
        return
    for item in view.users:
        if item.target is operator.getitem:
            item.meta["val"] = view.meta["val"][item.args[1]]
            _look_again(item)


def _value(arg: Any) -> Any:
    return arg.meta["val"] if isinstance(arg, Node) else arg

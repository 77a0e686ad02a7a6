"""The nodes that take a blend's two outputs apart."""

from __future__ import annotations

import operator

from torch.fx import Node


def outputs_of(node: Node) -> tuple[list[Node], list[Node]]:
    """List the ``getitem`` nodes of a blend's two outputs: front ends write none to several."""
    found: tuple[list[Node], list[Node]] = ([], [])
    for user in node.users:
        if user.target is operator.getitem:
            found[user.args[1]].append(user)  # type: ignore[index]  # getitem's index: 0 or 1
    return found

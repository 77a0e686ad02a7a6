"""A graph as text that people read and tests compare: one node a line, canonical names.

Inputs are named by role and FQN, the host's nodes ``%op_n``, inserted nodes ``%k.op_n``; shapes are
those of the example. No device, stride, address or line number is in it.

    input  x                     f32[3, 8]
    param  fc.weight             f32[12, 8]
    %linear = linear(x, fc.weight, fc.bias)     f32[3, 12]
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from kasmina_fx._torch.tracing import Operator
from kasmina_fx.arguments import check_instance
from kasmina_fx.passes.infra.metadata import clean_path, origin_of, role_of, value_of

_DTYPES: Final = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
}
_INPUTS: Final = ("placeholder", "get_attr")


def graph_text(gm: GraphModule) -> str:
    """The whole graph, nested graphs indented below it."""
    check_instance("gm", gm, GraphModule)
    names = canonical_names(gm)
    lines = [_input_line(node, names) for node in _shown_inputs(gm)]
    lines += [node_line(node, names) for node in gm.graph.nodes if node.op not in _INPUTS]
    for name, child in gm.named_children():
        if isinstance(child, GraphModule):
            nested = graph_text(child).splitlines()
            lines += [f"{name}:", *(f"    {line}" for line in nested)]
    return "\n".join(lines) + "\n"


def inserted_text(gm: GraphModule) -> str:
    """The inserted nodes alone, with ``%host`` for what they read of the host.

    The same text for every front end, and on every supported torch.
    """
    check_instance("gm", gm, GraphModule)
    names = canonical_names(gm)
    inserted = [node for node in gm.graph.nodes if origin_of(node) is not None]
    for node in names:
        if origin_of(node) is None and node.op not in _INPUTS:
            names[node] = "%host"
    return "".join(node_line(node, names) + "\n" for node in inserted)


def op_counts(gm: GraphModule) -> Counter[str]:
    """How often each operation occurs, nested graphs included, inputs and the output not."""
    check_instance("gm", gm, GraphModule)
    return Counter(
        operation(node)
        for module in gm.modules()
        if isinstance(module, GraphModule)
        for node in module.graph.nodes
        if node.op not in (*_INPUTS, "output")
    )


def operation(node: Node) -> str:
    """What a node does: ``aten.view.default``, ``linear``, ``.relu``, ``call fc``; no operands."""
    if node.op == "call_module":
        return f"call {_public(str(node.target))}"
    if node.op == "call_method":
        return f".{node.target}"
    if node.op == "call_function":
        target: Any = node.target
        is_overload = isinstance(target, Operator)
        return str(target) if is_overload else str(getattr(target, "__name__", target))
    return node.op


def canonical_names(gm: GraphModule) -> dict[Node, str]:
    """The names that the text gives to nodes."""
    names: dict[Node, str] = {}
    used: Counter[str] = Counter()
    for node in gm.graph.nodes:
        if node.op in _INPUTS:
            names[node] = _role(node).partition(" ")[2]
            continue
        prefix = "%" if origin_of(node) is None else "%k."
        name = prefix + _short(operation(node))
        names[node] = name if not used[name] else f"{name}_{used[name]}"
        used[name] += 1
    return names


def node_line(node: Node, names: dict[Node, str]) -> str:
    """One line for a node that is no input."""
    if node.op == "output":
        return f"return {_operand(node.args[0], names)}"
    operands = [_operand(arg, names) for arg in node.args]
    operands += [f"{key}={_operand(arg, names)}" for key, arg in node.kwargs.items()]
    line = f"{names[node]} = {operation(node)}({', '.join(operands)})"
    shown = _describe(value_of(node))
    return f"{line:<88} {shown}".rstrip()


def _shown_inputs(gm: GraphModule) -> list[Node]:
    # Sizes that Dynamo passes beside tensors are named by symbols that differ from run to run.
    inputs = [node for node in gm.graph.nodes if node.op in _INPUTS]
    return [node for node in inputs if not isinstance(value_of(node), (torch.SymInt, int))]


def _input_line(node: Node, names: dict[Node, str]) -> str:
    kind = _role(node).partition(" ")[0]
    return f"{kind:<6} {names[node]:<49} {_describe(value_of(node))}".rstrip()


def _role(node: Node) -> str:
    given = role_of(node)
    if given is not None:
        return given
    if node.op == "placeholder":
        return f"input {str(node.target).strip('_').removeprefix('L_')}"
    return f"attr {clean_path(str(node.target))}"


def _public(fqn: str) -> str:
    return fqn.removesuffix(".base") if fqn != "base" else fqn


def _short(name: str) -> str:
    parts = name.removeprefix("call ").removeprefix(".").split(".")
    return parts[1] if len(parts) == 3 and name.count(".") == 2 else "_".join(parts)


def _operand(arg: Any, names: dict[Node, str]) -> str:
    named = map_aggregate(arg, lambda a: _Raw(names[a]) if isinstance(a, Node) else a)
    return _show(named)


class _Raw(str):
    """A name to print without quotes."""

    __slots__ = ()


def _show(value: Any) -> str:
    if isinstance(value, _Raw):
        return str(value)
    if isinstance(value, (list, tuple)):
        inside = ", ".join(map(_show, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    if isinstance(value, torch.dtype):
        return _DTYPES.get(value, str(value))
    if isinstance(value, torch.device):
        return "device"
    return repr(value)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        sizes = ", ".join(str(_hint(size)) for size in value.shape)
        return f"{_DTYPES.get(value.dtype, str(value.dtype))}[{sizes}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_describe, value))})"
    return "int" if isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool) else ""


def _hint(size: Any) -> Any:
    return size if isinstance(size, int) else size.node.hint

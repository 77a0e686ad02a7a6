"""Trace a model with one of three front ends; the graph stays as it came, marker nodes and all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Tracer

from kasmina_fx._dynamo_compat import placeholder_source, resolve_source, uncompiled
from kasmina_fx.errors import InvalidArgument, RewriteError
from kasmina_fx.layer import KasminaLayer
from kasmina_fx.passes.metadata import propagate_if_missing, set_role

FRONTENDS: Final = ("dynamo", "fx", "export")


class KasminaTracer(Tracer):
    """``torch.fx`` tracing that steps into a KasminaLayer.

    Its base stays one call, as torch.nn modules do.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """True for what a KasminaLayer wraps, and for what ``Tracer`` thinks is one."""
        owner = self._owner(module_qualified_name)
        if isinstance(owner, KasminaLayer) and owner.base is m:
            return True
        return not isinstance(m, KasminaLayer) and super().is_leaf_module(m, module_qualified_name)

    def _owner(self, name: str) -> nn.Module | None:
        parent = name.rpartition(".")[0]
        return self.root.get_submodule(parent) if name else None


def capture(model: nn.Module, *args: Any, frontend: str = "dynamo", **kwargs: Any) -> GraphModule:
    """The model's graph before any pass, with shapes and with names for its inputs.

    Args:
        model: With or without KasminaLayers, compiled or not; it is not run for real.
        *args: Example inputs of its forward.
        frontend: "dynamo" (as ``torch.compile`` sees it), "fx" (``torch.fx``, through
            :class:`KasminaTracer`), or "export".
        **kwargs: More example inputs.

    Raises:
        InvalidArgument: Another front end.
        RewriteError: Dynamo could not capture it as one graph.
    """
    if frontend not in FRONTENDS:
        raise InvalidArgument(f"frontend {frontend!r}: there are {', '.join(FRONTENDS)}")
    plain: nn.Module = uncompiled(model)
    return {"dynamo": _dynamo, "fx": _fx, "export": _export}[frontend](plain, args, kwargs)


def _dynamo(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> GraphModule:
    graphs: list[GraphModule] = []

    def keep(gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        graphs.append(gm)
        raise _Captured

    implementation, model._compiled_call_impl = model._compiled_call_impl, None
    try:
        torch.compile(model, backend=keep, fullgraph=True)(*args, **kwargs)
    except Exception as error:
        if not graphs:
            raise RewriteError(
                f"Dynamo could not capture the model as one graph: {error}"
            ) from error
    finally:
        model._compiled_call_impl = implementation
    gm = graphs[0]
    names = _names(model)
    for node in gm.graph.find_nodes(op="placeholder"):
        source = placeholder_source(node)
        value = resolve_source(source, model)
        role = _role_in(names, value)
        set_role(node, role or f"input {node.target.strip('_').removeprefix('L_')}")
    return gm


class _Captured(Exception):
    """Ends a compile once its graph is there."""


def _fx(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> GraphModule:
    tracer = KasminaTracer()
    graph: Graph = tracer.trace(model)
    gm = GraphModule(tracer.root, graph, type(model).__name__)
    placeholders = graph.find_nodes(op="placeholder")
    inputs = [*args, *(kwargs[n.target] for n in placeholders[len(args) :] if n.target in kwargs)]
    inputs += [n.args[0] for n in placeholders[len(inputs) :]]
    propagate_if_missing(gm, inputs)
    names = _names(model)
    for node in placeholders:
        set_role(node, f"input {node.target}")
    for node in graph.find_nodes(op="get_attr"):
        value: Any = model
        for part in node.target.split("."):
            value = getattr(value, part)
        set_role(node, _role_in(names, value) or f"buffer {node.target}")
    return gm


def _export(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> GraphModule:
    program = torch.export.export(model, tuple(args), dict(kwargs), strict=False)
    signature = program.graph_signature
    roles = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names = dict(_named(model).values())
    for node in program.graph.find_nodes(op="placeholder"):
        fqn = roles.get(node.name)
        set_role(node, f"input {node.name}" if fqn is None else names.get(fqn, f"buffer {fqn}"))
    gm: GraphModule = program.graph_module
    return gm


def _named(model: nn.Module) -> dict[int, tuple[str, str]]:
    """``(registered fqn, role and public name)`` of each tensor.

    The base of a wrapped layer leaves no trace in the public name.
    """
    layers = [
        n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, KasminaLayer)
    ]
    named: dict[int, tuple[str, str]] = {}
    kinds = (("param", model.named_parameters()), ("buffer", model.named_buffers()))
    for kind, tensors in kinds:
        for fqn, tensor in tensors:
            public = fqn
            for layer in layers:
                prefix = f"{layer}.base." if layer else "base."
                if fqn.startswith(prefix):
                    public = f"{layer}." * bool(layer) + fqn.removeprefix(prefix)
            named.setdefault(id(tensor), (fqn, f"{kind} {public}"))
    return named


def _names(model: nn.Module) -> dict[int, str]:
    return {key: role for key, (_, role) in _named(model).items()}


def _role_in(names: dict[int, str], value: Any) -> str | None:
    """A tensor's role and name; a probe is called after the buffer that collects its gradient."""
    role = names.get(id(value))
    if role is None and isinstance(value, Tensor) and value.is_leaf:
        role = names.get(id(value.grad))
    return role

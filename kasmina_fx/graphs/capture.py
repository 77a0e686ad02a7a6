"""Trace a model with one of three front ends; the graph stays as it came, marker nodes and all."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Tracer

from kasmina_fx._torch.dynamo import (
    graph_breaks,
    placeholder_source,
    resolve_source,
    uncompiled,
)
from kasmina_fx.class_swap import SwappedLayer
from kasmina_fx.errors import InvalidArgument, RewriteError, shown
from kasmina_fx.layer import KasminaLayer
from kasmina_fx.model import kasmina_layers
from kasmina_fx.passes.infra.metadata import propagate_if_missing, set_role
from kasmina_fx.physical.graph_inputs import SHOWN
from kasmina_fx.physical.programs import recording_markers
from kasmina_fx.seeds.entry_names import OWN

FRONTENDS: Final = ("dynamo", "fx", "export")


class KasminaTracer(Tracer):
    """A tracer of ``torch.fx`` that steps into a KasminaLayer.

    Its base stays one call, as torch.nn modules do: of a layer that was made from a module in
    place, the call of a view of that module, ``fc.base``.
    """

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> Graph:
        """See ``Tracer.trace``; ``self.root`` is a copy in which the views are children."""
        return super().trace(_with_bases(root, {}), concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """True for what a KasminaLayer watches, and for what ``Tracer`` thinks is one."""
        parent, _, name = module_qualified_name.rpartition(".")
        owner = self.root.get_submodule(parent) if module_qualified_name else None
        if isinstance(owner, KasminaLayer) and name == "base":
            return True
        return not isinstance(m, KasminaLayer) and super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: Any, forward: Any, args: Any, kwargs: Any) -> Any:
        """See ``Tracer.call_module``; a layer runs its base as a call of its own."""
        if isinstance(m, SwappedLayer):
            base: Any = m._modules["base"]

            def forward(*args: Any, **kwargs: Any) -> Any:
                return m.seeds_on(base(*args, **kwargs))

        return super().call_module(m, forward, args, kwargs)


def _with_bases(module: nn.Module, memo: dict[nn.Module, nn.Module]) -> nn.Module:
    """The same modules and tensors in other objects, and layers made in place with their bases."""
    if module not in memo:
        copied = memo[module] = type(module).__new__(type(module))
        children = {n: c and _with_bases(c, memo) for n, c in module._modules.items()}
        if isinstance(module, SwappedLayer):
            children["base"] = module.base
        copied.__dict__.update(module.__dict__, _modules=children)
    return memo[module]


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
        raise InvalidArgument(f"frontend {shown(frontend)}: there are {', '.join(FRONTENDS)}")
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
    _name_inputs(graphs[0], model)
    return graphs[0]


def _name_inputs(gm: GraphModule, model: nn.Module) -> None:
    names = _names(model)
    for node in gm.graph.find_nodes(op="placeholder"):
        source = placeholder_source(node)
        value = _value_at(source, model)
        role = _role_in(names, value)
        set_role(node, role or f"input {node.target.strip('_').removeprefix('L_')}")


def capture_with_breaks(
    model: nn.Module, *args: Any, **kwargs: Any
) -> tuple[list[GraphModule], list[str]]:
    """Return the graphs of a model that is not one graph, and why each break is there.

    A copy of the model is run, since what lies between two graphs has to be.
    """
    copied, graphs = copy.deepcopy(model), []
    copied._compiled_call_impl = None
    names = _names(copied)

    def keep(gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        graphs.append(gm)
        _name_inputs(gm, copied)
        # A graph may be of a part of the model, whose paths start there: go by the tensors.
        placeholders = gm.graph.find_nodes(op="placeholder")
        for node, value in zip(placeholders, example_inputs, strict=True):
            role = _role_in(names, value)
            if role is not None:
                set_role(node, role)
        return gm.forward

    before = graph_breaks()
    # Without gradients: Dynamo would warn of those of tensors between two graphs.
    with torch.random.fork_rng(), torch.no_grad():
        torch.compile(copied, backend=keep)(*args, **kwargs)
    breaks = [why for why, n in graph_breaks().items() if n > before.get(why, 0)]
    return graphs, [why.splitlines()[0] for why in breaks]


def _value_at(source: str, model: nn.Module) -> Any:
    """The tensor that Dynamo found somewhere below the model, or through the global table."""
    for key, inputs in list(SHOWN.items()):
        _, found, tail = source.partition(f"SHOWN[{key!r}]")
        if found:
            return resolve_source(found + tail, inputs)
    return resolve_source(source, model)


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
        value: Any = gm
        for part in node.target.split("."):
            value = getattr(value, part)
        set_role(node, _role_in(names, value) or f"buffer {node.target}")
    return gm


def _export(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> GraphModule:
    with recording_markers():
        program = torch.export.export(model, tuple(args), dict(kwargs), strict=False)
    signature = program.graph_signature
    roles = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    tables = signature.inputs_to_lifted_tensor_constants
    named = _named(model)
    names, by_id = dict(named.values()), {key: role for key, (_, role) in named.items()}
    for node in program.graph.find_nodes(op="placeholder"):
        fqn = roles.get(node.name)
        role = f"input {node.name}" if fqn is None else names.get(fqn, f"buffer {fqn}")
        if node.name in tables:
            role = by_id.get(id(program.constants[tables[node.name]]), f"table {node.name}")
        set_role(node, role)
    gm: GraphModule = program.graph_module
    return gm


def _named(model: nn.Module) -> dict[int, tuple[str, str]]:
    """Map each tensor's ``id`` to its registered fqn, and its role and public name.

    The base of a wrapped layer leaves no trace in the public name.
    """
    every = model.named_modules(remove_duplicate=False)
    paths = [name for name, module in every if isinstance(module, KasminaLayer)]
    named: dict[int, tuple[str, str]] = {}
    kinds = (("param", model.named_parameters()), ("buffer", model.named_buffers()))
    for kind, tensors in kinds:
        for fqn, tensor in tensors:
            public = fqn
            for path in paths:
                prefix = f"{path}.base." if path else "base."
                if fqn.startswith(prefix):
                    public = f"{path}." * bool(path) + fqn.removeprefix(prefix)
            named.setdefault(id(tensor), (fqn, f"{kind} {public}"))
    for name, layer in kasmina_layers(model).items():
        sensed = (("gradients.loss_scale", t) for t in layer.kasmina.shown.gradients[1:])
        for table, tensor in (*layer.kasmina.derived(), *sensed):
            fqn = f"{name}.{OWN}{table}".removeprefix(".")
            named.setdefault(id(tensor), (fqn, f"table {fqn}"))
    return named


def _names(model: nn.Module) -> dict[int, str]:
    return {key: role for key, (_, role) in _named(model).items()}


def _role_in(names: dict[int, str], value: Any) -> str | None:
    """A tensor's role and name; a probe is called after the buffer that collects its gradient."""
    role = names.get(id(value))
    if role is None and isinstance(value, Tensor) and value.is_leaf:
        role = names.get(id(value.grad))
    return role

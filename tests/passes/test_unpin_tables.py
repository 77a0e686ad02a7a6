"""Tables may move, stacks and statistics stay: what CUDA graphs are told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_cases import (
    GOLDEN,
    OneLayer,
    TwoLayers,
    assert_leaves_alone,
    layer_of,
    nodes_of,
    spelled_as_torch_2_13,
    wrapped,
)
from torch import Tensor, nn
from torch.fx import GraphModule

from kasmina_fx import TelemetryPolicy, capture
from kasmina_fx._torch.dynamo import placeholder_source
from kasmina_fx.errors import RewriteError
from kasmina_fx.passes import records_of
from kasmina_fx.passes.unpin_tables import UnpinTables, keeps_address
from kasmina_fx.physical.graph_inputs import is_table_source
from kasmina_fx.testing import RecordingBackend, assert_golden, graft

# Coverage doubles the time that torch takes to compile; the files beside this one cover the lines.
pytestmark = pytest.mark.untraced


def captured(model: nn.Module) -> GraphModule:
    """As Dynamo hands a graph to a backend."""
    seen: list[GraphModule] = []

    def backend(gm: GraphModule, example_inputs: Any) -> Any:
        seen.append(gm)
        return gm.forward

    torch.compile(model, backend=backend, fullgraph=True)(torch.randn(3, 8))
    (gm,) = seen
    return gm


def growing(model: nn.Module, names: list[str]) -> nn.Module:
    model = wrapped(model, telemetry=True)
    for name in names:
        layer = layer_of(model, name)
        graft(layer, [0, 1], "mlp")
        graft(layer, [2], layer.register_blueprint("affine"))
    return model


def pinned(gm: GraphModule) -> set[str]:
    """Names of what keeps its address."""
    inputs = gm.graph.find_nodes(op="placeholder")
    return {placeholder_source(node) for node in inputs if keeps_address(node)}


def pinned_tables(gm: GraphModule) -> list[str]:
    return [source for source in pinned(gm) if is_table_source(source)]


def test_what_gradients_are_added_up_in_may_move() -> None:
    gm = captured(wrapped(OneLayer(), telemetry=TelemetryPolicy(gradients=True)))
    assert len(pinned_tables(gm)) == 2
    UnpinTables()(gm)
    assert pinned_tables(gm) == []
    assert any(source.endswith("['accumulated']") for source in pinned(gm))


@pytest.mark.parametrize(
    ("model", "names"), [(OneLayer, ["fc"]), (TwoLayers, ["up", "down"])], ids=["one", "two"]
)
def test_tables_may_move_and_nothing_else(model: Any, names: list[str]) -> None:
    grown = growing(model(), names)
    banks = [bank for name in names for bank in layer_of(grown, name).kasmina.bank_list()]
    tables = 4 * len(names) + 5 * len(banks)  # a layer's, and each bank's
    gm = captured(grown)
    before, nodes = pinned(gm), [node.name for node in gm.graph.nodes]
    everything = nodes_of(gm)
    assert len(pinned_tables(gm)) == tables
    result = UnpinTables()(gm)
    assert result.graph_module is gm
    assert not result.modified
    assert [node.name for node in gm.graph.nodes] == nodes
    assert nodes_of(gm) == everything
    assert records_of(gm)[-1].op_counts == {}
    assert pinned_tables(gm) == []
    released = before - pinned(gm)
    assert all(".shown." in name and ".params" not in name for name in released)
    assert len(released) == tables
    kept = pinned(gm)
    stacks = sum(len(bank.tensors()) for bank in banks)
    assert sum(".params[" in name or "banks" in name for name in kept) == stacks
    assert sum("accumulated" in name for name in kept) == len(names)
    assert not UnpinTables()(gm).modified


def test_a_graph_without_markers_is_the_same_object_and_pins_what_it_pinned() -> None:
    gm = captured(OneLayer())
    before = pinned(gm)
    assert before == {f"L['self']._modules['fc']._parameters['{n}']" for n in ("weight", "bias")}
    assert_leaves_alone(UnpinTables(), gm)
    assert pinned(gm) == before


class Near(nn.Module):
    """A layer beside tensors whose names are like those of tables and stacks."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 12)
        self.seeds = nn.ParameterList([nn.Parameter(torch.zeros(12))])
        self.register_buffer("shown", torch.ones(12))
        self.shown_modes = nn.ParameterDict({"modes": nn.Parameter(torch.ones(12))})

    def forward(self, x: Tensor) -> Tensor:
        shown: Any = self.shown
        return self.fc(x) * shown + self.seeds[0] * self.shown_modes["modes"]  # type: ignore[no-any-return]  # a tensor


def test_what_is_only_called_like_a_table_stays_and_so_do_stacks() -> None:
    gm = captured(growing(Near(), ["fc"]))
    near = {
        "L['self']._modules['seeds']._parameters['0']",
        "L['self']._modules['shown_modes']._parameters['modes']",
        "L['self']._buffers['shown']",
    }
    before = pinned(gm)
    stacks = {source for source in before if ".shown.params[" in source}
    assert near < before
    assert len(stacks) == 6  # four of the MLPs, two of the affine one
    UnpinTables()(gm)
    assert near | stacks <= pinned(gm)
    assert pinned_tables(gm) == []


def test_unpinning_again_changes_nothing() -> None:
    gm = captured(growing(OneLayer(), ["fc"]))
    UnpinTables()(gm)
    kept = pinned(gm)
    said = [dict(n.meta.get("tensor_dict", {})) for n in gm.graph.find_nodes(op="placeholder")]
    assert_leaves_alone(UnpinTables(), gm)
    assert pinned(gm) == kept
    again = [n.meta.get("tensor_dict", {}) for n in gm.graph.find_nodes(op="placeholder")]
    assert [one.keys() for one in again] == [one.keys() for one in said]
    for one, other in zip(again, said, strict=True):
        assert all(one[key] is other[key] for key in one)


@pytest.mark.parametrize("frontend", ["fx", "export"])
def test_graphs_of_other_front_ends_say_nothing_of_addresses(frontend: str) -> None:
    gm = capture(growing(OneLayer(), ["fc"]), torch.randn(3, 8), frontend=frontend)
    text = str(gm.graph)
    assert UnpinTables()(gm).graph_module is gm
    assert str(gm.graph) == text


def test_the_pipeline_unpins_what_it_hands_on() -> None:
    model = growing(OneLayer(), ["fc"])
    backend = RecordingBackend("eager")
    torch.compile(model, backend=backend, fullgraph=True)(torch.randn(3, 8))
    (after,) = backend.after
    assert pinned_tables(after) == []
    assert pinned(after)


def test_a_table_that_is_still_pinned_is_an_error() -> None:
    gm = captured(growing(OneLayer(), ["fc"]))
    with pytest.raises(RewriteError, match="address stays"):
        UnpinTables().ensures(gm)


@spelled_as_torch_2_13
def test_golden() -> None:
    gm = captured(growing(OneLayer(), ["fc"]))
    lines = []
    before = pinned(gm)
    UnpinTables()(gm)
    after = pinned(gm)
    assert after <= before
    for node in gm.graph.find_nodes(op="placeholder"):
        source = placeholder_source(node)
        if source in before:
            lines.append(f"{'stays' if source in after else 'may move':8}  {source}")
    text = "\n".join(sorted(lines)) + "\n"
    assert_golden(text, "unpin_tables/one_layer", golden_dir=GOLDEN)


def test_a_table_that_is_found_elsewhere_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = captured(growing(OneLayer(), ["fc"]))
    monkeypatch.setattr("kasmina_fx.passes.unpin_tables.is_table_source", lambda source: False)
    with pytest.raises(RewriteError, match=r"table .* \(layer of fc\).* whose address stays"):
        UnpinTables()(gm)

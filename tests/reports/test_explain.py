"""explain() names every layer, whatever the graph looks like."""

from __future__ import annotations

import json

import pytest
import torch
from small_net_cases import Broken, PassesBy, Recurrent, X
from torch import nn

from kasmina_fx import (
    capture,
    explain,
    graph_text,
    kasmina_layers,
    kasminify,
    unkasminify,
)
from kasmina_fx.passes import passes_for
from kasmina_fx.testing import graft


def test_explain_finds_layers_of_a_forward_that_takes_whatever_comes() -> None:
    model = kasminify(PassesBy(), num_seeds=2, compile=False)
    graft(kasmina_layers(model)["called"], [0], "mlp")
    called, read = explain(model, X).layers
    assert (called.layer, called.matched, called.blended) == ("called", True, 1)
    assert (read.layer, read.matched) == ("read", False)
    names = [node.target for node in capture(model, X).graph.find_nodes(op="placeholder")]
    assert names  # and roles were found by the same paths
    assert "param  called.weight" in graph_text(capture(model, X))


def test_explain_goes_on_behind_a_graph_break_and_says_what_was_left() -> None:
    torch._dynamo.reset()
    model = kasminify(Broken(), num_seeds=2, compile=False)
    graft(kasmina_layers(model)["second"], [0], "mlp")
    counted = kasmina_layers(model)["first"].get_health_report()["count"].tolist()
    said = explain(model, X)
    assert [(r.layer, r.matched, r.graph) for r in said.layers] == [
        ("first", True, 0),
        ("second", True, 1),
    ]
    assert len(said.breaks) == 1
    assert said.left == {"norm": "a LayerNorm is none of the targets"}
    assert f"graph break: {said.breaks[0]}" in str(said)
    assert "norm: left: a LayerNorm is none of the targets" in str(said)
    assert all(report.bytes > 0 for report in said.layers)
    assert kasmina_layers(model)["first"].get_health_report()["count"].tolist() == counted
    assert not explain(unkasminify(kasminify(Broken(), num_seeds=2)), X).left


@pytest.mark.parametrize("grown", [False, True])
def test_explain_names_a_layer_behind_an_lstm(grown: bool) -> None:
    torch._dynamo.reset()
    model = kasminify(Recurrent(), num_seeds=2, compile=False)
    if grown:
        graft(kasmina_layers(model)["out"], [0], "mlp")
    (layer,) = explain(model, torch.randn(2, 3, 4)).layers
    assert (layer.layer, layer.matched) == ("out", True)


def test_explain_shows_what_each_lowering_would_take_and_why_not() -> None:
    torch._dynamo.reset()
    model = kasminify(nn.Sequential(nn.Linear(4, 8)), num_seeds=2, compile=False)
    graft(kasmina_layers(model)["0"], [0], "mlp")
    x = torch.randn(64, 4)
    (trained,) = explain(model, x).layers
    with torch.no_grad():
        said = explain(model, x)
    (evaluated,) = said.layers
    before, after = (
        {each.name: each.microseconds for each in layer.candidates if each.microseconds}
        for layer in (evaluated, trained)
    )
    assert before.keys() == after.keys() == {"fused", "matmul", "loop"}
    assert all(before[name] < after[name] for name in before)
    assert f"matmul {before['matmul']:.3g}, loop {before['loop']:.3g}" in str(said)
    (dense,) = (each for each in trained.candidates if each.name == "dense")
    assert dense.why_not == "no Triton kernel runs on cpu here"
    told = json.loads(json.dumps(said.to_dict()))["layers"][0]["candidates"]
    assert [each["name"] for each in told] == ["dense", "fused", "matmul", "loop"]
    forced = explain(model, x, passes=passes_for("loop"))
    assert (forced.layers[0].lowering, forced.layers[0].candidates) == ("loop", ())

"""Captures, texts, diffs and explanations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_cases import OneLayer, TwoLayers, layer_of, wrapped
from torch import Tensor, nn

from kasmina_fx import (
    GraphMismatch,
    InvalidArgument,
    RewriteError,
    capture,
    explain,
    graph_diff,
    graph_text,
    kasminify,
    rewrite,
)
from kasmina_fx.testing import assert_golden, graft


def test_capture_leaves_a_compiled_model_as_it_was() -> None:
    model = kasminify(OneLayer(), num_seeds=4)
    implementation = model._compiled_call_impl
    gm = capture(model, torch.randn(3, 8))
    assert model._compiled_call_impl is implementation
    assert "kasmina.blend.default" in graph_text(gm)
    compiled: Any = torch.compile(OneLayer())
    assert graph_text(capture(compiled, torch.randn(3, 8))).count("%") == 4


def test_capture_refuses_another_front_end_and_a_model_that_breaks() -> None:
    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return x

    with pytest.raises(InvalidArgument, match="dynamo, fx, export"):
        capture(OneLayer(), torch.randn(3, 8), frontend="jit")
    with pytest.raises(RewriteError, match="one graph"):
        capture(Breaks(), torch.randn(3))


@pytest.mark.parametrize("frontend", ["dynamo", "fx", "export"])
def test_keyword_inputs(frontend: str) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 12)

        def forward(self, x: Tensor, scale: Tensor, shift: float = 1.0) -> Tensor:
            out: Tensor = self.fc(x) * scale + shift
            return out

    gm = capture(wrapped(Scaled()), torch.randn(3, 8), scale=torch.ones(12), frontend=frontend)
    text = graph_text(gm)
    assert "input  x" in text
    assert "input  scale" in text


def test_the_text_has_no_trace_of_wrapping_or_machine() -> None:
    model = wrapped(TwoLayers(), telemetry=True)
    graft(layer_of(model, "up"), [0, 1])
    text = graph_text(rewrite(capture(model, torch.randn(3, 8))).graph_module)
    assert "param  up.weight" in text
    for word in ("base", "/work", "0x", "cpu", "cuda", "stride"):
        assert word not in text


def test_diff_of_a_graph_with_itself_is_identical() -> None:
    gm = capture(wrapped(OneLayer()), torch.randn(3, 8))
    diff = graph_diff(gm, gm)
    assert diff.identical
    assert str(diff) == ""
    assert diff.op_counts == {}


def test_diff_aligns_by_structure_not_by_line() -> None:
    class Chain(nn.Module):
        def __init__(self, early: bool) -> None:
            super().__init__()
            self.early = early

        def forward(self, x: Tensor) -> Tensor:
            if self.early:
                a = x.sin()
                b = x.cos()
            else:
                b = x.cos()
                a = x.sin()
            return (a + b).exp()

    before, after = (torch.fx.symbolic_trace(Chain(early)) for early in (True, False))
    assert graph_diff(before, after).identical


def test_diff_tells_added_removed_and_changed() -> None:
    before = capture(wrapped(OneLayer()), torch.randn(3, 8))
    after = rewrite(before).graph_module
    diff = graph_diff(before, after)
    assert not diff.identical
    assert [line.split(" = ")[0] for line in diff.removed] == ["%blend", "%getitem"]
    assert diff.added == ()
    ((old, new),) = diff.changed
    assert "gelu(%getitem)" in old
    assert "gelu(%linear)" in new
    assert diff.op_counts == {"getitem": -1, "kasmina.blend.default": -1}
    assert "-%blend" in str(diff)


def test_explain_says_what_becomes_of_each_layer() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.up, self.unused = nn.Linear(8, 12), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.up(self.attention(x, x, x)[0])
            return out

    model = wrapped(Mixed(), seeds=5)
    x = torch.randn(2, 3, 8)
    dormant = {report.layer: report for report in explain(model, x).layers}
    assert dormant["up"].lowering == "dormant"
    assert dormant["up"].why == "no blueprint slot is allocated"
    assert dormant["unused"].reason == "the model does not call it on these inputs"
    assert "never calls it" in dormant["attention.out_proj"].why
    graft(layer_of(model, "up"), [0, 4], "mlp")
    report = explain(model, x)
    up = next(r for r in report.layers if r.layer == "up")
    assert (up.lowering, up.seeds, up.blended) == ("fused", 5, 2)
    assert up.slots == {"mlp_run0": "1/2", "mlp_run1": "1/2"}
    # two banks of two slots; mlp on 3 and 2 features: 2 * (3 * 6) and 2 * (2 * 4) multiplies
    assert up.flops == 2 * 6 * 2 * (36 + 16)
    assert up.bytes > 0
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["layer"] == "up"
    text = str(report)
    assert "mlp_run0 1/2" in text
    assert "request_germination: data" in text


def test_goldens_are_written_compared_and_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EXPECTTEST_ACCEPT", raising=False)
    with pytest.raises(GraphMismatch, match="does not exist"):
        assert_golden("text\n", "sub/one", golden_dir=tmp_path)
    monkeypatch.setenv("EXPECTTEST_ACCEPT", "1")
    assert_golden("text\n", "sub/one", golden_dir=tmp_path)
    monkeypatch.delenv("EXPECTTEST_ACCEPT")
    assert_golden("text\n", "sub/one", golden_dir=tmp_path)
    with pytest.raises(GraphMismatch, match=r"(?s)-text.*\+other"):
        assert_golden("other\n", "sub/one", golden_dir=tmp_path)
    gm = capture(OneLayer(), torch.randn(3, 8))
    monkeypatch.setenv("EXPECTTEST_ACCEPT", "1")
    assert_golden(gm, "graph", golden_dir=tmp_path)
    assert (tmp_path / "graph.txt").read_text() == graph_text(gm)

"""What becomes of each marker, and why."""

from __future__ import annotations

import pytest
import torch
from graph_cases import (
    GOLDEN,
    NEAR_MISSES,
    OneLayer,
    assert_leaves_alone,
    dormant_graph,
    each_near_miss,
    growing_graph,
    layer_of,
    near_miss,
    plain_graph,
    wrapped,
)
from kernel_cases import interpreter
from torch import Tensor, nn

from kasmina_fx import capture, find_matches
from kasmina_fx.errors import InvalidArgument
from kasmina_fx.passes.choose_lowerings import ChooseLowerings, site_of
from kasmina_fx.passes.infra.metadata import lowering_of
from kasmina_fx.testing import RecordingBackend, assert_golden, graft

__all__ = ["interpreter"]


def test_lowerings_are_chosen_with_their_reason() -> None:
    chosen = {}
    for name, gm in {"growing": growing_graph(), "dormant": dormant_graph()}.items():
        ChooseLowerings()(gm)
        chosen[name] = [lowering_of(match.node) for match in find_matches(gm)]
    names = {name: [low.name for low in found if low] for name, found in chosen.items()}
    assert names == {
        "growing": ["fused", "fused statistics"],
        "dormant": ["dormant", "fused statistics"],
    }
    forced = ChooseLowerings(lowering="matmul").choose(find_matches(growing_graph())[0])
    assert forced.why == "forced by the option"


def test_a_lowering_is_an_annotation_and_no_change() -> None:
    for gm in (growing_graph(), dormant_graph()):
        assert_leaves_alone(ChooseLowerings(), gm)
        markers = [match.node for match in find_matches(gm)]
        annotated = [node for node in gm.graph.nodes if lowering_of(node) is not None]
        assert annotated == markers
        assert len(annotated) == 2


def test_a_graph_without_markers_is_the_same_object_without_lowerings() -> None:
    gm = plain_graph()
    assert_leaves_alone(ChooseLowerings(), gm)
    assert all(lowering_of(node) is None for node in gm.graph.nodes)


@each_near_miss
@pytest.mark.parametrize("lowering", ["auto", "matmul"])
def test_a_near_miss_is_not_lowered_and_the_reason_says_why(near: str, lowering: str) -> None:
    gm = near_miss(near)
    assert_leaves_alone(ChooseLowerings(lowering), gm)
    (match,) = find_matches(gm)
    chosen = lowering_of(match.node)
    assert chosen is not None
    assert (chosen.name, chosen.why) == ("none", NEAR_MISSES[near][1])


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("seeds", "chosen"), [([0, 2], "fused"), ([0, 1, 3, 4, 6], "dense")])
def test_the_share_of_seeds_that_run_decides_where_no_activation_does(
    seeds: list[int], chosen: str
) -> None:
    model = wrapped(nn.Sequential(nn.Linear(8, 24)), seeds=8)
    graft(layer_of(model, "0"), seeds, "mlp")
    gm = capture(model, torch.randn(3, 8))
    lowering = ChooseLowerings().choose(find_matches(gm)[0])
    assert lowering.name == chosen


@pytest.mark.usefixtures("interpreter")
def test_dense_is_taken_where_it_is_asked_for() -> None:
    model = wrapped(nn.Sequential(nn.Linear(8, 24)), seeds=8)
    graft(layer_of(model, "0"), [0, 2], "mlp")
    match = find_matches(capture(model, torch.randn(3, 8)))[0]
    auto, asked = ChooseLowerings().choose(match), ChooseLowerings("dense").choose(match)
    assert (auto.name, asked.name) == ("fused", "dense")
    assert "of the features run: tiles touch these alone" in auto.why


@pytest.mark.usefixtures("interpreter")
def test_float32_products_of_wide_chunks_are_not_dense() -> None:
    model = wrapped(nn.Sequential(nn.Linear(8, 120)), seeds=3)
    graft(layer_of(model, "0"), [0, 1, 2], "mlp")
    gm = capture(model, torch.randn(3, 8))
    chosen = ChooseLowerings("dense").choose(find_matches(gm)[0])
    assert "float32 products of wide chunks" in chosen.why


def test_a_lowering_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"'tree': this release has auto, dense, fused"):
        ChooseLowerings(lowering="tree")


class Masked(OneLayer):
    """A layer whose rows are as many as a mask lets through."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[x[:, 0] > 0])


def test_rows_that_follow_from_data_have_a_usual_number() -> None:
    torch._dynamo.reset()
    model = wrapped(Masked())
    graft(layer_of(model), [0, 2], "mlp")
    backend = RecordingBackend("eager")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        x = torch.randn(6, 8)
        out = torch.compile(model, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(out, model(x))
    (graph,) = backend.before
    assert site_of(find_matches(graph)[0]).rows == 1024


def test_golden() -> None:
    lines = []
    for name, gm in (
        ("growing", growing_graph()),
        ("dormant", dormant_graph()),
        ("narrow", near_miss("narrow")),
    ):
        assert not ChooseLowerings()(gm).modified
        for match in find_matches(gm):
            chosen = lowering_of(match.node)
            assert chosen is not None
            lines.append(
                f"{name}: {match.node.target} of {match.layer}: {chosen.name}: {chosen.why}"
            )
    assert_golden("\n".join(lines) + "\n", "choose_lowerings/reasons", golden_dir=GOLDEN)


def test_choosing_again_changes_nothing() -> None:
    gm = growing_graph()
    ChooseLowerings()(gm)
    before = [lowering_of(match.node) for match in find_matches(gm)]
    assert not ChooseLowerings()(gm).modified
    assert [lowering_of(match.node) for match in find_matches(gm)] == before

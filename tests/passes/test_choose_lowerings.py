"""What becomes of each marker, and why."""

from __future__ import annotations

from graph_cases import GOLDEN, dormant_graph, growing_graph
from torch.fx import GraphModule, Node

from kasmina_fx import find_matches
from kasmina_fx.passes.choose_lowerings import ChooseLowerings
from kasmina_fx.passes.infra.metadata import lowering_of, set_value, value_of
from kasmina_fx.testing import assert_golden


def test_lowerings_are_chosen_with_their_reason() -> None:
    chosen = {}
    for name, gm in {"growing": growing_graph(), "dormant": dormant_graph()}.items():
        ChooseLowerings()(gm)
        chosen[name] = [lowering_of(match.node) for match in find_matches(gm)]
    names = {name: [low.name for low in found if low] for name, found in chosen.items()}
    assert names == {"growing": ["matmul", "statistics"], "dormant": ["dormant", "statistics"]}
    forced = ChooseLowerings(lowering="matmul").choose(find_matches(growing_graph())[0])
    assert forced.why == "forced by the option"


def narrow() -> GraphModule:
    """A near miss: the output is narrower than its marker says."""
    gm = growing_graph(telemetry=False)
    (match,) = find_matches(gm)
    y = match.node.args[0]
    assert isinstance(y, Node)
    set_value(y, value_of(y)[:, :5], like=y)
    return gm


def test_golden() -> None:
    lines = []
    for name, gm in (
        ("growing", growing_graph()),
        ("dormant", dormant_graph()),
        ("narrow", narrow()),
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

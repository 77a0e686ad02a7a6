"""The pipeline as a whole: unmatched graphs, idempotence, numbers, options, golden files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from graph_cases import (
    CASES,
    GOLDEN,
    Case,
    OneLayer,
    assert_outcome,
    each_frontend,
    growing_graph,
)
from torch import Tensor, nn

from kasmina_fx import capture, find_matches, graph_text, rewrite
from kasmina_fx.errors import InvalidArgument, RewriteError
from kasmina_fx.lowerings.sample import OBSERVE_ROWS
from kasmina_fx.passes import DEFAULT_PASSES, GraphPass, passes_for, run_passes
from kasmina_fx.passes.choose_lowerings import ChooseLowerings
from kasmina_fx.passes.infra.metadata import origin_of, value_of
from kasmina_fx.passes.lower_blend import LowerBlend
from kasmina_fx.passes.normalize_markers import NormalizeMarkers
from kasmina_fx.passes.verify import Verify
from kasmina_fx.physical.programs import recording_markers
from kasmina_fx.testing import USED_GOLDENS, RecordingBackend

TESTS = Path(__file__).parents[1]
#: The golden files of CASES apart: each is named in a test below `tests/`.
GOLDENS_OF_NO_CASE = {
    "absorb_activation/spellings",
    "backward/gather",
    "backward/guard",
    "backward/mix",
    "backward/pull",
    "backward/reconstruct",
    "backward/reconstruct_in_float16",
    "backward/sense_gradient",
    "choose_lowerings/reasons",
    "eliminate_dead_code/before_after",
    "eliminate_dead_code/one_class",
    "group_telemetry/two_layers",
    "lower_blend/dense",
    "lower_blend/fused",
    "lower_blend/fused_on_cpu",
    "normalize_markers/packet_with_keywords",
    "unpin_tables/one_layer",
    "verify/every_kind",
    "verify/refusals",
}

each_pass = pytest.mark.parametrize("step", DEFAULT_PASSES, ids=lambda step: step.name)


def test_a_graph_without_markers_is_the_same_object() -> None:
    gm = capture(OneLayer(), torch.randn(3, 8))
    for result in (rewrite(gm), run_passes(gm)):
        assert result.graph_module is gm
        assert not result.modified


def test_rewrite_leaves_the_captured_graph_alone() -> None:
    gm = growing_graph()
    text = graph_text(gm)
    assert rewrite(gm).graph_module is not gm
    assert graph_text(gm) == text


@each_pass
def test_no_pass_changes_a_graph_from_something_else(step: GraphPass) -> None:
    class Near(nn.Module):  # an operator with a similar name, and no marker
        def forward(self, y: Tensor, index: Tensor) -> Tensor:
            out: Tensor = torch.ops.kasmina.pull.default(y, index, index, -1)
            return out

    gm = torch.fx.symbolic_trace(Near())
    code = gm.code
    assert not step(gm).modified
    assert gm.code == code


each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@each_case
def test_the_pipeline_is_idempotent_and_every_inserted_node_has_its_metadata(case: Case) -> None:
    once = rewrite(capture(case.model(), case.x())).graph_module
    again = run_passes(once)
    assert not again.modified
    inserted = [node for node in once.graph.nodes if origin_of(node) is not None]
    # The kernel for statistics returns nothing: it has no value to carry.
    valued = [node for node in inserted if node.target is not OBSERVE_ROWS]
    assert all(value_of(node) is not None for node in valued)
    assert all("stack_trace" in node.meta and "nn_module_stack" in node.meta for node in inserted)
    assert not find_matches(once)


def test_postconditions_catch_a_broken_pass() -> None:
    gm = growing_graph()
    with pytest.raises(RewriteError, match="lower_blend left"):
        LowerBlend().ensures(gm)
    find_matches(gm)[0].node.target = torch.ops.kasmina.blend
    with pytest.raises(RewriteError, match="normal form"):
        NormalizeMarkers().ensures(gm)


@pytest.mark.untraced
@each_case
@each_frontend
def test_golden_cases_compute_what_the_reference_does(case: Case, frontend: str) -> None:
    model = case.model().double()
    run: Any
    if frontend == "dynamo":
        run = torch.compile(model, backend=RecordingBackend("eager"), fullgraph=True)
    elif frontend == "fx":
        run = rewrite(capture(model, case.x().double(), frontend="fx")).graph_module
    else:
        with recording_markers():
            program = torch.export.export(
                model, (case.x().double(),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
            )
        run = run_passes(program.module()).graph_module
    assert_outcome(model, case, run)


def test_options_reach_their_passes_and_no_other() -> None:
    steps = passes_for("matmul", strict=True)
    assert [step.name for step in steps] == [step.name for step in DEFAULT_PASSES]
    changed = [new for new, old in zip(steps, DEFAULT_PASSES, strict=True) if new != old]
    assert changed == [ChooseLowerings(lowering="matmul"), Verify(strict=True)]
    assert passes_for() == DEFAULT_PASSES


@each_pass
def test_a_disabled_pass_is_left_out_and_the_order_stays(step: GraphPass) -> None:
    left = passes_for(disabled=[step.name])
    assert left == tuple(other for other in DEFAULT_PASSES if other is not step)


def test_a_pass_that_does_not_exist_cannot_be_disabled() -> None:
    with pytest.raises(InvalidArgument, match=r"no pass is named 'inline'; there are unpin_tables"):
        passes_for(disabled=["inline"])


@each_pass
def test_each_pass_has_one_test_file_and_a_golden_folder(step: GraphPass) -> None:
    files = [path.relative_to(TESTS).as_posix() for path in TESTS.rglob(f"test_{step.name}*.py")]
    assert files == [f"passes/test_{step.name}.py"]
    assert list((GOLDEN / step.name).glob("*.txt"))


def test_no_golden_file_is_an_orphan() -> None:
    names = {f"{folder}{case.name}" for case in CASES for folder in ("", "inserted/")}
    files = {path.relative_to(GOLDEN).with_suffix("").as_posix() for path in GOLDEN.rglob("*.txt")}
    names |= GOLDENS_OF_NO_CASE
    assert files - names == set(), "golden files that no test reads: delete them"
    assert names - files == set(), "cases without a golden file: make golden writes them"
    used = {path for path in USED_GOLDENS if path.is_relative_to(GOLDEN)}
    assert all(path.exists() for path in used)


def test_every_golden_file_is_named_by_the_tests_of_its_folder() -> None:
    for name in GOLDENS_OF_NO_CASE:
        folder, _, stem = name.partition("/")
        if folder == "backward":  # each is named after the function that it shows
            text = (TESTS / "physical" / "test_backward_goldens.py").read_text(encoding="utf-8")
            assert f"\ndef {stem}(" in text
        else:
            text = (TESTS / "passes" / f"test_{folder}.py").read_text(encoding="utf-8")
            assert f'"{name}"' in text
    for case in CASES:
        folder = case.name.partition("/")[0]
        text = (TESTS / "passes" / f"test_{folder}.py").read_text(encoding="utf-8")
        assert f'each_case_of("{folder}")' in text

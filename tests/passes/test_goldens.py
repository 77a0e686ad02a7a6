"""The rewritten graphs, as text that people read; each with its numbers."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from graph_cases import CASES, GOLDEN, Case, OneLayer, layer_of, wrapped
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from kasmina_fx import capture, find_matches, graph_diff, graph_text, inserted_text, rewrite
from kasmina_fx.graphs.capture import FRONTENDS
from kasmina_fx.lifecycle import RUNS, SeedLifecycle
from kasmina_fx.passes import run_passes
from kasmina_fx.physical.operators import GATHER, GUARD, PULL, RECONSTRUCT
from kasmina_fx.reference import reference_mode
from kasmina_fx.testing import USED_GOLDENS, RecordingBackend, assert_golden, graft

#: Those of passes that insert no node: their tests lie beside this file.
OF_OTHER_PASSES = {
    "choose_lowerings/reasons",
    "eliminate_dead_code/one_class",
    "normalize_markers/packet_with_keywords",
    "unpin_tables/one_layer",
    "verify/refusals",
}

#: The release whose front ends wrote the host's part of the golden files.
HOST_RELEASE = torch.__version__.startswith("2.13.")

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def golden_text(before: GraphModule, after: GraphModule) -> str:
    counts = graph_diff(before, after).op_counts
    ops = "".join(f"{op} {count:+d}\n" for op, count in counts.items())
    return f"# before\n{graph_text(before)}\n# after\n{graph_text(after)}\n# ops\n{ops}"


@each_case
def test_golden_of_dynamos_graph(case: Case) -> None:
    if not HOST_RELEASE:
        pytest.skip("the host's nodes are spelled as torch 2.13 does; see the inserted ones")
    before = capture(case.model(), case.x())
    result = rewrite(before)
    assert result.modified
    assert_golden(golden_text(before, result.graph_module), case.name, golden_dir=GOLDEN)


@each_case
def test_golden_of_inserted_nodes_is_one_for_all_front_ends(case: Case) -> None:
    texts = {
        frontend: inserted_text(
            rewrite(capture(case.model(), case.x(), frontend=frontend)).graph_module
        )
        for frontend in FRONTENDS
    }
    # Before the file is read or, on request, written: one text for all.
    assert set(texts.values()) == {texts["dynamo"]}
    assert_golden(texts["dynamo"], f"inserted/{case.name}", golden_dir=GOLDEN)


@pytest.mark.parametrize("stage", sorted(RUNS), ids=lambda stage: stage.name)
def test_golden_of_one_class_is_that_of_every_stage(stage: SeedLifecycle) -> None:
    # What a stage means for a blueprint is in the tables `roles` and `modes`, never in the graph.
    model = wrapped(OneLayer())
    graft(layer_of(model), [0, 2], stage=stage)
    after = rewrite(capture(model, torch.randn(3, 8))).graph_module
    assert_golden(inserted_text(after), "inserted/lower_blend/one_class", golden_dir=GOLDEN)


def vjp(outs: list[Tensor], inputs: list[Tensor], grads: list[Tensor]) -> Any:
    return torch.autograd.grad(outs, inputs, grads)


def gather(chunks: Tensor, seeds: Tensor, positions: Tensor, grad: Tensor) -> Any:
    return vjp([GATHER(chunks, seeds, positions)], [chunks], [grad])


def pull(rows: Tensor, seeds: Tensor, positions: Tensor, grad: Tensor) -> Any:
    return vjp([PULL(rows, positions, seeds)], [rows], [grad])


def guard(
    rows: Tensor,
    stack: Tensor,
    faults: Tensor,
    modes: Tensor,
    positions: Tensor,
    blames: Tensor,
    grad: Tensor,
    grad_stack: Tensor,
    grad_alone: Tensor,
) -> Any:
    out = GUARD([rows, stack], modes, positions, faults, blames)
    return vjp(out, [rows, stack, faults], [grad, grad_stack, grad_alone])


def reconstruct(
    made: Tensor, rows: Tensor, trainees: Tensor, loss_scale: Tensor, alone: Tensor, grad: Tensor
) -> Any:
    return vjp([RECONSTRUCT(made, rows, trainees, loss_scale, alone)], [made], [grad])


def reconstruct_in_float16(
    made: Tensor, rows: Tensor, trainees: Tensor, loss_scale: Tensor, alone: Tensor, grad: Tensor
) -> Any:
    f, chunks = made.half(), rows.half()
    out = RECONSTRUCT(f, chunks, trainees, loss_scale, alone)
    return vjp([out], [f, alone], [grad.half()])


MOVES = (gather, pull, guard, reconstruct, reconstruct_in_float16)


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
def test_golden_of_what_a_move_does_in_backward(move: Any) -> None:
    if not HOST_RELEASE:
        pytest.skip("make_fx spells its nodes as torch 2.13 does")
    # 3 seeds with chunks of 2 x 4, of which two sit in 2 slots.
    named = {
        "chunks": torch.randn(3, 2, 4, requires_grad=True),
        "rows": torch.randn(2, 1, 2, 4, requires_grad=True),
        "made": torch.randn(2, 2, 4, requires_grad=True),
        "stack": torch.randn(2, 4, requires_grad=True),
        "faults": torch.zeros(3, requires_grad=True),
        "seeds": torch.tensor([2, 0]),
        "positions": torch.tensor([1, -1, 0]),
        "modes": torch.tensor([[0], [2]]),
        "trainees": torch.tensor([1, -1]),
        "loss_scale": torch.ones(()),
        "blames": torch.tensor([[True], [True]]),
        "alone": torch.ones(2, requires_grad=True),
    }
    if move is not guard:
        named["rows"] = torch.randn(2, 2, 4, requires_grad=move is pull)
    grads = {gather: (2, 2, 4), pull: (3, 2, 4), guard: (2, 1, 2, 4), reconstruct: (2, 2, 4)}
    grads[reconstruct_in_float16] = (2, 2, 4)
    named |= {"grad": torch.randn(grads[move]), "grad_stack": torch.randn(2, 4)}
    named["grad_alone"] = torch.zeros(2)
    text = graph_text(make_fx(move)(*(named[name] for name in inspect.signature(move).parameters)))
    assert_golden(text, f"backward/{move.__name__}", golden_dir=GOLDEN)


@each_case
@pytest.mark.parametrize("frontend", FRONTENDS)
def test_golden_cases_match_what_they_should(case: Case, frontend: str) -> None:
    matches = find_matches(capture(case.model(), case.x(), frontend=frontend))
    assert len(matches) == case.markers
    assert sum(len(match.banks) for match in matches) == case.banks
    assert all(match.reason is None and match.layer for match in matches)


@each_case
@pytest.mark.parametrize("frontend", FRONTENDS)
def test_golden_cases_compute_what_the_reference_does(case: Case, frontend: str) -> None:
    model = case.model().double()
    run: Any
    if frontend == "dynamo":
        run = torch.compile(model, backend=RecordingBackend("eager"), fullgraph=True)
    elif frontend == "fx":
        run = rewrite(capture(model, case.x().double(), frontend="fx")).graph_module
    else:
        program = torch.export.export(
            model, (case.x().double(),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
        )
        run = run_passes(program.module()).graph_module
    for batch in (3, 7):
        x = case.x(batch).double()
        assert_close(outcome(model, x, run=run), outcome(model, x, reference=True))


def outcome(
    model: nn.Module, x: Tensor, *, run: Any = None, reference: bool = False
) -> dict[str, Tensor]:
    """Output and all gradients."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    if run is not None:
        run.zero_grad()
    if reference:
        with reference_mode(model):
            out = model(x)
    else:
        out = (model if run is None else run)(x)
    out.square().sum().backward()
    assert x.grad is not None
    return {"out": out.detach(), "x": x.grad} | gradients(run if run is not None else model)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    # Exported programs name their parameters as the model does; torch.fx calls a view of the base.
    return {
        name.removeprefix("_orig_mod.").replace(".base.", "."): torch.zeros_like(p)
        if p.grad is None
        else p.grad.clone()
        for name, p in module.named_parameters()
    }


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-10) -> None:
    missing = {name for name in expected.keys() - got.keys() if bool(expected[name].any())}
    assert not missing
    for name in expected.keys() & got.keys():
        torch.testing.assert_close(got[name], expected[name], atol=atol, rtol=atol, msg=name)


def test_no_golden_file_is_an_orphan() -> None:
    names = {f"{folder}{case.name}" for case in CASES for folder in ("", "inserted/")}
    files = {path.relative_to(GOLDEN).with_suffix("").as_posix() for path in GOLDEN.rglob("*.txt")}
    names |= {f"backward/{move.__name__}" for move in MOVES}
    names |= OF_OTHER_PASSES
    assert files - names == set(), "golden files that no test reads: delete them"
    assert names - files == set(), "cases without a golden file: make golden writes them"
    used = {path for path in USED_GOLDENS if path.is_relative_to(GOLDEN)}
    assert all(path.exists() for path in used)

"""Finished models, compiled: what they compute, what their graphs are, and how many."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from folded_cases import (
    CallsWithOthers,
    Root,
    S,
    assert_as_reference,
    evaluated,
    finished,
    fossils,
    held,
    is_folded,
    three,
)
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from kasmina_fx import compiles, explain, kasmina_layers, kasminify
from kasmina_fx.graphs.text import op_counts
from kasmina_fx.seeds.folded import ENOUGH
from kasmina_fx.testing import RecordingBackend, assert_no_recompiles, graft

pytestmark = pytest.mark.untraced

X = torch.linspace(-2, 2, 30).view(5, 6)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_finished_model_is_compiled_as_its_host_is(compiler: str, bias: bool) -> None:
    model, backend = finished(three(bias)), RecordingBackend(compiler)
    fossils(model[2], [1], "lora", 0.3)
    run: Any = torch.compile(model, backend=backend, fullgraph=True)
    out = evaluated(run, X)
    assert is_folded(run._orig_mod, X)
    plain, recorder = three(True).eval(), RecordingBackend("eager")  # an affine seed shifts: a bias
    evaluated(torch.compile(plain, backend=recorder, fullgraph=True), X)  # type: ignore[arg-type]  # a module
    assert op_counts(backend.after[-1]) == op_counts(recorder.before[-1])
    torch.testing.assert_close(out, evaluated(model, X))
    assert_as_reference(model, X)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    torch.testing.assert_close(evaluated(run, X), evaluated(model, X))
    assert_as_reference(model, X)
    assert backend.compiles == 1


def test_a_convolution_is_compiled_as_its_host_is() -> None:
    plain = Root(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    model = finished(plain, lambda layer: fossils(layer, [1], "lora"), targets=(nn.Conv2d,))
    backend = RecordingBackend("aot_eager")
    run: Any = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(2, 3, 6, 5)
    torch.testing.assert_close(evaluated(run, x), evaluated(model, x))
    assert_as_reference(model, x)
    assert set(op_counts(backend.after[-1])) == {"conv2d", "relu"}


@pytest.mark.parametrize("bias", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_life_compiles_one_graph_more_in_evaluation(bias: bool) -> None:
    model = kasminify(three(bias), num_seeds=4, compile=False, telemetry=False)
    backend = RecordingBackend("eager")
    run: Any = torch.compile(model, backend=backend, fullgraph=True)
    layers = list(kasmina_layers(model).values())

    def both() -> None:
        run.train()
        run(X).sum().backward()
        run.eval()
        for _ in range(ENOUGH + 1):
            evaluated(run, X)
        assert_as_reference(model, X)

    both()
    assert backend.compiles == 2  # dormant, in training and in evaluation
    for kind in ("affine", "lora"):
        layers[0].reserve(2, kind)
    for number, (layer, kind) in enumerate(zip(layers, ("lora", "affine", "lora"), strict=True)):
        graft(layer, [0, 1], kind, 0.5)
        both()
        assert backend.compiles == 4 + (number > 0)  # growing
        layer.state.set_rows([0, 1], lifecycle_state=S.FOSSILIZED)
        both()
        assert backend.compiles == 5  # finished, whichever layers have fossils
        assert is_folded(model, X, "0")
        assert is_folded(model, X, "3")
    for seed in (0, 1):
        for layer in layers:
            layer.reset([seed])
            both()
    assert held(model) is None
    assert backend.compiles == 5


def test_what_never_folds_costs_no_compile() -> None:
    model, before = finished(grow=lambda layer: fossils(layer, [0], "mlp")), compiles()
    run: Any = torch.compile(model, backend=RecordingBackend("eager"), fullgraph=True)
    evaluated(run, X)
    graft(model[0], [1], "mlp", 0.3)
    evaluated(run, X)
    assert compiles() - before == 1


def test_other_batches_and_autocast_run_folded_too() -> None:
    model = finished()
    run: Any = torch.compile(model, backend=RecordingBackend("aot_eager"), fullgraph=True)
    for rows in (5, 7, 64):
        x = torch.randn(rows, 6)
        torch.testing.assert_close(evaluated(run, x), evaluated(model, x))
        assert_as_reference(model, x)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            out = evaluated(run, X)
            torch.testing.assert_close(out, evaluated(model, X), atol=2e-2, rtol=2e-2)
    with torch.inference_mode():
        torch.testing.assert_close(run(X), model(X))


def test_layers_below_a_module_of_torchs_own_fold() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model: Any = finished(Root(encoder), lambda layer: None)
    backend = RecordingBackend("eager")
    run: Any = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(2, 3, 8)
    fossils(encoder.linear1, [0, 1], "lora")  # type: ignore[arg-type]  # it has seeds by now
    for grown in kasmina_layers(model).values():
        fossils(grown, [2], "affine")
        torch.testing.assert_close(evaluated(run, x), evaluated(model, x))
        assert_as_reference(model, x, 1e-5)
        assert is_folded(model, x, "0.linear1")
    assert backend.compiles == 1


def test_a_compiled_model_that_puts_other_parameters_into_its_layer_is_refused_as_ever() -> None:
    model = finished(CallsWithOthers(), lambda layer: fossils(layer, [0], "lora"))
    run: Any = torch.compile(model, backend=RecordingBackend("eager"), fullgraph=True)
    # Folded, it would compute something else without a word.
    with pytest.raises(BackendCompilerFailed, match="taken for one whose address stays"):
        evaluated(run, X)


def test_the_first_call_of_a_model_that_is_finished_warns_of_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = finished(options={"lowering": "matmul"}, compile=True)
    evaluated(model, X)
    assert is_folded(model, X)
    assert not [r for r in caplog.records if r.name.startswith("kasmina_fx") and r.levelno > 20]
    with assert_no_recompiles():
        evaluated(model, X)


def test_explain_says_which_layers_fold() -> None:
    model = finished()
    fossils(model[2], [0], "mlp")
    first, second, third = explain(model, X).layers
    assert first.folding == "folded into its weight in evaluation without gradients"
    why = "only affine and lora blueprints fold into a weight"
    assert second.folding == f"not folded in evaluation: {why}"
    assert third.folding == ""
    evaluated(model, X)
    said = str(explain(model, X))
    assert "0: folded into its weight in evaluation without gradients, in a copy of 336 b" in said
    assert "2: not folded in evaluation: only" in said
    assert explain(model, X).to_dict()["layers"][2]["folding"] == ""


@pytest.mark.gpu
def test_copies_are_seen_by_other_streams_and_graphs() -> None:
    model = finished(three().cuda(), options={"triton.cudagraphs": True}, compile=True)
    x = X.cuda()
    expected = evaluated(model, x)
    assert is_folded(model, x)
    for scale in (1.5, 0.5):
        with torch.no_grad():
            model[0].weight.mul_(scale)
        for _ in range(3):
            expected = evaluated(model, x).clone()
        torch.testing.assert_close(expected, evaluated(finished_twin(model), x))
    side = torch.cuda.Stream()
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    side.wait_stream(torch.cuda.current_stream())
    eager = finished_twin(model)
    evaluated(eager, x)  # its copies are made on this stream
    with torch.cuda.stream(side):
        other = evaluated(eager, x)
    side.synchronize()
    torch.testing.assert_close(other, evaluated(eager, x))


def finished_twin(model: Any) -> Any:
    twin = copy.deepcopy(model)
    twin._compiled_call_impl = None
    return twin

"""A forward of several layers sees one state of all seeds, however the model is called."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kasmina_fx
from kasmina_fx import InsideForward, hold_seeds, kasmina_layers, kasminify, unkasminify
from kasmina_fx._torch.dynamo import graphs_compiled
from kasmina_fx.testing import RecordingBackend, assert_no_recompiles, graft
from kasmina_fx.transactions.threads import _INSIDE

LONG, SHORT = 20.0, 0.1  # seconds: for what must happen, and for what must not


class Interrupted(nn.Module):
    """Two layers that give ones; what ``pause`` holds runs between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 6)
        self.pause = ""
        for parameter, value in ((p, p.dim() == 1) for p in self.parameters()):
            nn.init.constant_(parameter, value)

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x)
        if self.pause:
            pauses[self.pause]()
        return torch.stack([first, self.b(x)])


#: By name, so that models can be copied and pickled.
pauses: dict[str, Callable[[], None]] = {}


def grown(**options: Any) -> Any:
    """Seed 0 of both layers takes away all of its chunk at alpha 1; its alpha is 0."""
    model = kasminify(Interrupted(), num_seeds=3, **({"compile": False} | options))
    for layer in kasmina_layers(model).values():
        graft(layer, 0, "affine", 0.0)
        with torch.no_grad():
            for parameter in layer.blueprint_parameters():
                parameter.zero_()
    return model


def in_the_middle(model: nn.Module, call: Callable[[], Tensor]) -> Tensor:
    """What a call gives in whose middle another thread sets the alphas of both layers to 1."""
    layers = list(kasmina_layers(model).values())

    def change() -> None:
        with kasmina_fx.transaction(model):
            for layer in layers:
                layer.set_alpha(0, 1.0)

    controller = threading.Thread(target=change, daemon=True)

    def pause() -> None:
        controller.start()
        controller.join(SHORT)

    pauses["change"] = torch.compiler.disable(pause)
    next(m for m in model.modules() if isinstance(m, Interrupted)).pause = "change"
    out = call()
    controller.join(LONG)
    assert not controller.is_alive()
    assert all(layer.state.alphas.tolist() == [1, 0, 0] for layer in layers)
    return out


def pickled(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "copy of a copy": lambda model: copy.deepcopy(pickled(model)),
    "copy of a part": lambda model: copy.deepcopy(nn.Sequential(model))[0],
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_forward_run_eagerly_sees_one_state(copied: Callable[[Any], Any]) -> None:
    model, x = copied(grown()), torch.randn(2, 4)
    assert torch.equal(in_the_middle(model, lambda: model(x)), torch.ones(2, 2, 6))
    assert torch.equal(kasmina_layers(model)["a"](x)[:, :2], torch.zeros(2, 2))
    assert not _INSIDE


def test_a_forward_under_a_bare_compile_sees_one_state() -> None:
    model, x, backend = grown(), torch.randn(2, 4), RecordingBackend("eager")
    run: Any = torch.compile(model, backend=backend)
    with torch.no_grad():  # Dynamo looks for the .grad of what crosses a break, and torch warns
        assert torch.equal(in_the_middle(model, lambda: run(x)), torch.ones(2, 2, 6))
    assert backend.compiles == 2  # the pause breaks the graph
    assert not _INSIDE


def test_a_bare_compile_is_one_graph_and_does_not_know_the_gate() -> None:
    model, x, backend = grown(), torch.randn(2, 4), RecordingBackend("eager")
    run: Any = torch.compile(model, backend=backend, fullgraph=True)
    run(x)
    siblings = kasmina_layers(model)["a"].siblings
    assert siblings.training.awaits_backward
    siblings.training.awaits_backward = False
    with assert_no_recompiles():
        kasmina_layers(model)["a"].set_alpha(0, 1.0)
        assert torch.equal(model(x)[0, :, :2], torch.zeros(2, 2))
        assert not siblings.training.awaits_backward
        assert torch.equal(run(x)[0, :, :2], torch.zeros(2, 2))
    assert backend.compiles == 1
    outer = RecordingBackend("eager")
    around: Any = torch.compile(nn.Sequential(model), backend=outer, fullgraph=True)
    assert torch.equal(around(x), run(x))
    assert outer.compiles == 1


def test_parts_called_one_by_one_see_one_state_where_seeds_are_held() -> None:
    for held, same in ((hold_seeds, True), (lambda _: nullcontext(), False)):
        model, x = grown(), torch.randn(2, 4)

        def parts(model: Any = model, x: Tensor = x, held: Any = held) -> Tensor:
            with held(model):
                first = model.a(x)
                pauses["change"]()
                return torch.stack([first, model.b(x)])

        out = in_the_middle(model, parts)
        assert torch.equal(out[0], out[1]) == same


def test_a_thread_that_holds_seeds_does_not_change_them() -> None:
    model = grown()
    layer = kasmina_layers(model)["a"]
    with hold_seeds(model), pytest.raises(InsideForward, match="hold_seeds"):
        layer.set_alpha(0, 1.0)
    assert layer.state.alphas.tolist() == [0, 0, 0]
    layer.set_alpha(0, 1.0)
    with pytest.raises(kasmina_fx.NoTargets), hold_seeds(nn.Linear(2, 2)):
        pass


def test_an_exception_leaves_the_gate() -> None:
    model = grown()
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5))
    assert not _INSIDE


def test_a_model_is_freed_as_soon_as_it_is_let_go_of() -> None:
    model = grown()
    model(torch.randn(2, 4))
    gone = weakref.ref(model)
    gc.disable()
    try:
        call = model._compiled_call_impl
        del model
        assert gone() is None
    finally:
        gc.enable()
    with pytest.raises(ReferenceError, match="gone"):
        call(torch.randn(2, 4))
    assert not _INSIDE


@pytest.mark.parametrize("compile", [False, True])
def test_nothing_of_it_is_left_in_a_plain_model(compile: bool) -> None:
    plain = Interrupted()
    before = set(plain.__dict__)
    model = kasminify(plain, num_seeds=3, compile=compile)
    assert set(unkasminify(model).__dict__) - before <= {"_load_state_dict_pre_hooks"}
    assert model._compiled_call_impl is None


def test_only_a_compiled_forward_with_gradients_awaits_its_backward() -> None:
    model, x = grown(), torch.randn(2, 4)
    training = kasmina_layers(model)["a"].siblings.training
    run: Any = torch.compile(model, backend=RecordingBackend("eager"))
    with torch.no_grad():
        run(x)
    assert not training.awaits_backward
    model(x)
    assert not training.awaits_backward
    run(x)
    assert training.awaits_backward


@pytest.mark.parametrize("name", [name for name in COPIES if name != "itself"])
def test_a_copy_says_that_it_runs_eagerly_and_is_compiled_by_kasminify(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = grown(compile=True), torch.randn(2, 4)
    copied = COPIES[name](model)
    before = graphs_compiled()
    out = copied(x)
    assert [r for r in caplog.records if "kasminify(model) compiles it" in r.getMessage()]
    caplog.clear()
    assert kasminify(copied, compile=False) is copied
    assert torch.equal(copied(x), out)
    assert not caplog.records
    assert graphs_compiled() == before
    whole = nn.Sequential(copied)
    assert kasminify(whole) is whole
    assert torch.equal(whole(x), out)
    assert graphs_compiled() == before + 1
    assert kasminify(copied, options={"lowering": "loop"}) is copied  # compiled: left as it is
    assert torch.equal(copied(x), out)
    assert graphs_compiled() == before + 1


def test_kasminify_compiles_no_model_that_was_made_without_the_compiler() -> None:
    model, x = grown(), torch.randn(2, 4)
    for called in (model, copy.deepcopy(model)):
        assert kasminify(called) is called
        before = graphs_compiled()
        called(x)
        assert graphs_compiled() == before

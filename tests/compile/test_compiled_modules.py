"""Compiled models as modules: copied, saved, shared, called twice."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from compiled_cases import compiled, judged, outcome, pair
from graph_cases import OneLayer, TwoLayers, layer_of, wrapped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kasmina_fx import (
    KasminaLayer,
    kasminify,
)
from kasmina_fx.reference import reference_mode
from kasmina_fx.testing import RecordingBackend, assert_no_recompiles, graft

# Coverage doubles the time that torch takes to compile; the files beside this one cover the lines.
pytestmark = pytest.mark.untraced


def test_deepcopies_live_apart() -> None:
    model, x = kasminify(OneLayer(), num_seeds=4, compile=False), torch.randn(3, 8)
    graft(layer_of(model), [0], "mlp")
    twin = copy.deepcopy(model)
    run, run_twin = (compiled(m, "eager") for m in (model, twin))
    torch.testing.assert_close(run(x), run_twin(x))
    graft(layer_of(twin), [1, 2, 3], "mlp")
    torch.testing.assert_close(run(x), model(x))
    torch.testing.assert_close(run_twin(x), twin(x))
    assert not torch.equal(run(x), run_twin(x))


def test_a_deepcopy_of_a_compiled_model_can_be_compiled_again() -> None:
    model = kasminify(OneLayer(), num_seeds=4, options={"strict": True})
    twin = copy.deepcopy(model)
    x = torch.randn(3, 8)
    with assert_no_recompiles():  # as torch does, a copy is not compiled
        torch.testing.assert_close(twin(x), nn.functional.gelu(layer_of(model).base(x)))
    run = compiled(twin, "eager")
    graft(layer_of(twin), [0], "mlp")
    run(x)
    with assert_no_recompiles():  # copied stacks are still marked dynamic
        graft(layer_of(twin), [1, 2, 3], "mlp")
        run(x)


def test_a_saved_state_dict_loads_into_a_compiled_model() -> None:
    model, x = pair(), torch.randn(6, 8)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = wrapped(TwoLayers(), seeds=3, telemetry=True)
    run = compiled(fresh, "eager")
    run(x)
    layer_of(fresh, "up").register_blueprint("affine")
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    torch.testing.assert_close(run(x), model(x))


def test_activation_checkpointing() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = checkpoint(self.inner, x, use_reentrant=False)
            return out

    model, x = Checkpointed(pair()), torch.randn(6, 8)
    backend = RecordingBackend("aot_eager", strict=True)
    run = torch.compile(model, backend=backend, fullgraph=True)
    counts = layer_of(model, "inner.up").kasmina.telemetry.accumulated[0]
    got = outcome(model, run, x)
    once = counts.clone()
    torch.testing.assert_close(got, judged(model, x), atol=1e-5, rtol=1e-5)
    assert once.tolist() == [6.0 * size for size in layer_of(model, "inner.up").chunks.sizes]


def test_two_layers_share_a_base_and_one_is_never_called() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            base = nn.Linear(8, 8)
            self.a, self.b = (
                KasminaLayer(base, 4, layer_id="a"),
                KasminaLayer(base, 2, layer_id="b"),
            )
            self.unused = KasminaLayer(nn.Linear(8, 8), 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.a(x))
            return out

    model, x = Odd(), torch.randn(5, 8)
    graft(model.a, [0, 1], "mlp")
    graft(model.b, [1], "affine")
    graft(model.unused, [0], "mlp")
    got = outcome(model, compiled(model, "aot_eager"), x)
    torch.testing.assert_close(got, judged(model, x), atol=1e-5, rtol=1e-5)


def test_a_model_called_twice_in_one_step() -> None:
    model, x = pair(), torch.randn(6, 8)
    run = compiled(model, "aot_eager")

    def twice(run: Any) -> Any:
        return lambda x: run(x) + run(2 * x)

    got = outcome(model, twice(run), x)
    with reference_mode(model):
        expected = outcome(model, twice(model), x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_one_layer_called_twice_in_one_graph() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = KasminaLayer(nn.Linear(8, 8), 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(self.layer(x))
            return out

    model, x = Twice(), torch.randn(5, 8)
    graft(model.layer, [0, 3], "mlp")
    got = outcome(model, compiled(model, "aot_eager"), x)
    assert model.layer.get_health_report()["count"].tolist() == [20.0] * 4
    torch.testing.assert_close(got, judged(model, x), atol=1e-5, rtol=1e-5)

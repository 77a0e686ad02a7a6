"""What is registered is what a forward reads, whoever put it there."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from kasmina_fx import (
    KasminaLayer,
    LayoutMismatch,
    SeedLifecycle,
    hold_seeds,
    kasmina_layers,
    kasminify,
)
from kasmina_fx.model import seed_buffers
from kasmina_fx.testing import graft

X = torch.linspace(-1, 1, 20).view(5, 4)


class Net(nn.Sequential):
    """A class of the user's: of torch's own, ``torch.compile(model)`` never calls the model."""

    def forward(self, x: Tensor) -> Tensor:
        for child in self:
            x = child(x)
        return x


def grown(start: int = 0, compile: bool = False, **settings: Any) -> nn.Module:
    torch.manual_seed(start)
    model = Net(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6))
    kasminify(model, num_seeds=3, compile=compile, **settings)
    for layer in kasmina_layers(model).values():
        graft(layer, [0, 2], "mlp")
    return model


def layer_of(model: nn.Module) -> KasminaLayer:
    return kasmina_layers(model)["0"]


@pytest.mark.parametrize("how", ["eager", "kasminify", "torch.compile"])
def test_stacks_given_to_functional_call_are_read_and_get_gradients(how: str) -> None:
    model = grown(compile=how == "kasminify")
    run: nn.Module = model
    if how == "torch.compile":
        run = torch.compile(model, backend="eager")  # type: ignore[assignment]
    before = run(X)
    name = "0.kasmina.banks.mlp_run0.down/bias"
    given = {name: torch.zeros_like(model.get_parameter(name)).requires_grad_()}
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter(name).zero_()
    prefix = "_orig_mod." if how == "torch.compile" else ""
    out = functional_call(run, {prefix + name: given[name]}, (X,))
    torch.testing.assert_close(out, other(X))
    assert not torch.equal(out, before)
    out.sum().backward()
    other(X).sum().backward()
    torch.testing.assert_close(given[name].grad, other.get_parameter(name).grad)
    torch.testing.assert_close(run(X), before)


def test_another_models_parameters_and_buffers() -> None:
    model, other = grown(), grown(1)
    graft(layer_of(other), [1], "mlp", alpha=0.9)
    layer_of(other).set_alpha(0, 0.1)
    given = dict(other.named_parameters()) | dict(other.named_buffers())
    torch.testing.assert_close(functional_call(model, given, (X,)), other(X), rtol=0, atol=0)


def test_half_of_another_models_state_is_refused() -> None:
    model, other = grown(), grown(1)
    graft(layer_of(other), [1], "mlp")
    state = {n: b for n, b in other.named_buffers() if n.endswith("state_tensor")}
    before = model(X)
    with pytest.raises(LayoutMismatch, match="0: the buffers that stand in"):
        functional_call(model, state, (X,))
    torch.testing.assert_close(model(X), before, rtol=0, atol=0)


def judged(model: nn.Module, parameters: dict[str, Tensor]) -> Tensor:
    """The output of the model as it is now with other parameters."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(parameters[name])
    out: Tensor = other(X)
    return out


@pytest.mark.parametrize("compile", [False, True])
def test_an_averaged_model_follows_the_seeds_of_its_model(compile: bool) -> None:
    torch._dynamo.reset()
    model = grown()
    averaged = AveragedModel(model)
    run: nn.Module = torch.compile(averaged, backend="eager") if compile else averaged  # type: ignore[assignment]
    for step in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
        if step == 1:
            graft(layer_of(model), [1], "mlp", alpha=0.3)
        if step == 2:
            layer_of(model).advance([0], SeedLifecycle.CULLED)
            layer_of(model).set_alpha(2, 0.9)
        averaged.update_parameters(model)
        expected = judged(model, dict(averaged.module.named_parameters()))
        with hold_seeds(averaged) if compile else contextlib.nullcontext():
            torch.testing.assert_close(run(X), expected)
    twin = layer_of(averaged.module)
    assert torch.equal(twin.state.stages, layer_of(model).state.stages)


@pytest.mark.parametrize("average", [None, get_ema_avg_fn(0.9), get_ema_avg_fn(0.7)])
def test_state_survives_averages_of_models_in_one_state(average: Any) -> None:
    model = grown()
    averaged = AveragedModel(model, avg_fn=average, use_buffers=True)
    for _ in range(5):
        averaged.update_parameters(model)
    torch.testing.assert_close(averaged(X), model(X))
    layer = layer_of(averaged.module)
    assert torch.equal(layer.state.state_tensor, layer_of(model).state.state_tensor)


def test_an_average_over_a_state_dict_leaves_the_state() -> None:
    model, ema = grown(), grown()
    for _ in range(5):
        now = model.state_dict()
        with torch.no_grad():
            for name, value in ema.state_dict().items():
                value.copy_(0.9 * value + 0.1 * now[name])
    torch.testing.assert_close(ema(X), model(X))


def test_an_average_of_two_states_is_refused_and_taken_back() -> None:
    model = grown()
    averaged = AveragedModel(model, use_buffers=True)
    averaged.update_parameters(model)
    graft(layer_of(model), [1], "mlp")
    before = averaged(X)
    averaged.update_parameters(model)
    for _ in range(2):
        with pytest.raises(LayoutMismatch, match=r"0: somebody wrote.*AveragedModel\(model\)"):
            averaged(X)
    layer_of(averaged.module).publish()
    torch.testing.assert_close(averaged(X), before)
    averaged.update_parameters(model)
    with pytest.raises(LayoutMismatch, match="0: a malformed state dict"):
        grown().load_state_dict(averaged.module.state_dict())


def test_a_saved_state_of_two_moments_is_refused() -> None:
    model = grown()
    saved = model.state_dict()
    saved["0.kasmina.state.state_tensor"] = saved["0.kasmina.state.state_tensor"].clone()
    saved["0.kasmina.state.state_tensor"][0, 2] += 1
    with pytest.raises(LayoutMismatch, match="seal"):
        grown().load_state_dict(saved)


def test_a_write_to_alpha_is_taken_over() -> None:
    layer = KasminaLayer(nn.Linear(4, 6), 2)
    graft(layer, [0, 1], "mlp")
    with torch.no_grad():
        layer.state.alpha.fill_(0.25)
    twin = copy.deepcopy(layer)
    twin.set_alpha([0, 1], 0.25)
    torch.testing.assert_close(layer(X), twin(X))
    assert layer.state.alphas.tolist() == [0.25, 0.25]
    with torch.no_grad():
        layer.state.alpha.fill_(7.0)
    with pytest.raises(LayoutMismatch, match="alpha"):
        layer(X)


def test_a_direct_write_to_the_state_tensor_is_refused() -> None:
    model = grown()
    before = model(X)
    with torch.no_grad():
        layer_of(model).state.state_tensor[1, 0] = 4
    with pytest.raises(LayoutMismatch, match="change seeds by commands"):
        model(X)
    layer_of(model).publish()
    torch.testing.assert_close(model(X), before)


def test_what_is_derived_is_no_buffer() -> None:
    names = {name.rpartition(".")[2] for name, _ in grown().named_buffers()}
    assert names == {
        *("state_tensor", "alpha", "seal", "grad_norm", "slots"),
        *("accumulated", "faults", "previous_loss"),
    }


@pytest.fixture
def alone_in_the_world() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder, "store")), 1)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        yield
        dist.destroy_process_group()


@pytest.mark.usefixtures("alone_in_the_world")
def test_ddp_broadcasts_no_buffer_of_seeds() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model._ddp_params_and_buffers_to_ignore = ["1.running_var"]  # type: ignore[assignment]
    model = copy.deepcopy(kasminify(model, num_seeds=2, compile=False))
    graft(layer_of(model), [0], "mlp")
    broadcast = nn.parallel.DistributedDataParallel(model).modules_buffers
    assert {id(b) for b in broadcast} == {
        id(model.get_buffer("1.running_mean")),
        id(model.get_buffer("1.num_batches_tracked")),
    }
    assert "0.kasmina.state.alpha" in set(seed_buffers(model))


def test_a_broadcast_of_the_same_state_changes_nothing() -> None:
    model = nn.Sequential(grown())  # the outer model knows nothing of it
    before = model(X)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.copy_(buffer.clone())
    torch.testing.assert_close(model(X), before, rtol=0, atol=0)

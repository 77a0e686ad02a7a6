"""Seeds that are off do nothing, and nothing of them changes."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from pack_cases import X, first, grow, optimizer_of, output, plain, small, train
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import AdamW

import kasmina_fx
from kasmina_fx import (
    InsideForward,
    InvalidArgument,
    InvalidType,
    NoTargets,
    SeedIndexError,
    SeedLifecycle,
    kasmina_layers,
    seeds_off,
)
from kasmina_fx.reference import reference_mode
from kasmina_fx.testing import assert_no_recompiles


def grown(**settings: Any) -> nn.Sequential:
    model = small(**settings)
    grow(model, [0, 1], "mlp")
    grow(model, [3], "lora")
    return model


def everything(model: nn.Module) -> dict[str, Tensor]:
    tables = {
        f"{name} {key}": table.clone()
        for name, layer in kasmina_layers(model).items()
        for key, table in layer.kasmina.derived()
    }
    return tables | {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(now: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    assert now.keys() == before.keys()
    assert [name for name, value in now.items() if not value.equal(before[name])] == []


def test_all_off_is_the_host_to_the_bit_and_all_comes_back() -> None:
    model = grown()
    on, before = output(model), everything(model)
    with seeds_off(model):
        assert output(model).equal(plain()(X))
        saved = model.state_dict()
        assert all(saved[name].equal(before[name]) for name in saved)
        with reference_mode(model):
            assert output(model).equal(plain()(X))
    assert output(model).equal(on)
    assert_same(everything(model), before)


def test_an_exception_turns_them_on_again() -> None:
    model = grown()
    on = output(model)
    with pytest.raises(ZeroDivisionError), seeds_off(model):
        _ = 1 / 0
    assert output(model).equal(on)


@pytest.mark.parametrize(
    ("seeds", "off"),
    [
        ("0", {"0": [0, 1, 3]}),
        (["2"], {"2": [0, 1, 3]}),
        ({"0": [1], "2": None}, {"0": [1], "2": [0, 1, 3]}),
        ({"0": 3, "2": torch.tensor([0])}, {"0": [3], "2": [0]}),
        ([], {}),
    ],
)
def test_some_off_is_as_if_these_were_dormant(seeds: Any, off: dict[str, list[int]]) -> None:
    model = grown()
    twin, host = copy.deepcopy(model), output(model)
    for name, ids in off.items():
        kasmina_layers(twin)[name].reset(ids)
    with seeds_off(model, seeds):
        torch.testing.assert_close(output(model), output(twin), rtol=1e-6, atol=1e-6)
        with reference_mode(model):
            torch.testing.assert_close(output(model), output(twin), rtol=1e-6, atol=1e-6)
    assert output(model).equal(host)


def test_they_learn_on_after_a_block_under_inference_mode() -> None:
    model = grown()
    with torch.inference_mode(), seeds_off(model):
        assert model(X).equal(plain()(X))
    model(X).sum().backward()
    assert all(stack.grad is not None for stack in first(model).blueprint_parameters())


def test_blocks_may_be_nested_and_overlap() -> None:
    model = grown()
    with seeds_off(model, {"0": [0]}):
        one = output(model)
        with seeds_off(model, {"0": [0, 1]}):
            assert not output(model).equal(one)
        assert output(model).equal(one)
        assert 0 in first(model).kasmina.off
        assert 1 not in first(model).kasmina.off
    assert not first(model).kasmina.off


def test_parameters_that_are_off_learn_nothing() -> None:
    model, rest = grown(), SeedLifecycle.TRAINING
    optimizer = optimizer_of(model, lambda p: AdamW(p, lr=0.1, weight_decay=0.5))
    layer = first(model)
    layer.request_germination([2], "mlp")  # what starts as the identity has nothing to learn here
    layer.advance([2], rest)
    train(model, optimizer, range(3))
    state = [dict(optimizer.state[stack]) for stack in layer.kasmina.stacks()]
    moments = [own["exp_avg"].clone() for own in state]
    before = everything(model)
    with seeds_off(model):
        pass
    assert_same(everything(model), before)
    assert all(own["exp_avg"].equal(was) for own, was in zip(state, moments, strict=True))
    with seeds_off(model):
        train(model, optimizer, range(3))
    assert_same(
        {name: v for name, v in everything(model).items() if "telemetry" not in name},
        {name: v for name, v in before.items() if "telemetry" not in name},
    )


def test_commands_inside_take_effect() -> None:
    model = grown()
    with seeds_off(model, {"0": [0, 1, 3], "2": None}):
        grow(model, [2], "affine")
        shown = output(model)
        first(model).reset([0])
    assert not shown.equal(plain()(X))
    assert first(model).state.stages.tolist() == [0, 6, 6, 6]


def test_functional_calls_with_another_state_see_them_off() -> None:
    model, other = grown(), grown()
    first(other).reset([1])
    with seeds_off(model):
        tensors = dict(other.named_parameters()) | dict(other.named_buffers())
        out = functional_call(model, tensors, (X,))
    assert out.equal(plain()(X))


def test_a_copy_made_inside_has_its_seeds_on() -> None:
    model = grown()
    on = output(model)
    with seeds_off(model):
        twin = copy.deepcopy(model)
        assert output(twin).equal(on)


def test_a_finished_model_runs_its_blends_meanwhile() -> None:
    model = grown()
    for layer in kasmina_layers(model).values():
        layer.reset([0, 1])
        layer.advance([3], SeedLifecycle.FOSSILIZED)
    folded = output(model)
    assert "folded into" in first(model).get_layer_stats()["folding"]
    with seeds_off(model):
        assert output(model).equal(plain()(X))
    assert output(model).equal(folded)


def test_a_compiled_model_compiles_nothing_for_it() -> None:
    model = grown(compile=True)
    on = output(model)
    host = torch.compile(plain())
    with torch.no_grad():
        wanted = host(X)
    with assert_no_recompiles():
        with seeds_off(model):
            off = output(model)
        with seeds_off(model, {"0": [0]}):
            output(model)
        assert output(model).equal(on)
    assert off.equal(wanted)


def test_another_threads_forwards_see_all_off_or_none() -> None:
    model = grown()
    on, host = output(model), plain()(X)
    model.eval()
    seen: list[Tensor] = []
    done = threading.Event()

    def serve() -> None:
        with torch.no_grad():
            while not done.is_set():
                seen.append(model(X))

    thread = threading.Thread(target=serve)
    thread.start()
    for _ in range(20):
        with seeds_off(model):
            pass
    done.set()
    thread.join()
    assert seen
    assert all(out.equal(on) or out.equal(host) for out in seen)


@pytest.mark.parametrize(
    ("seeds", "error", "match"),
    [
        ("z", InvalidArgument, "no layer 'z'; the model has"),
        (["0", 3], InvalidType, "give the name of a layer"),
        (3, InvalidType, "give the name of a layer"),
        ({"0": [9]}, SeedIndexError, "seed 9 does not exist"),
        ({"0": 0.5}, InvalidType, "give an int"),
    ],
)
def test_bad_seeds_change_nothing(seeds: Any, error: type, match: str) -> None:
    model = grown()
    on = output(model)
    with pytest.raises(error, match=match), seeds_off(model, seeds):
        pass
    assert output(model).equal(on)


def test_where_it_can_not_be_used() -> None:
    model = grown()
    with pytest.raises(NoTargets), seeds_off(nn.Linear(2, 2)):
        pass
    with kasmina_fx.hold_seeds(model), pytest.raises(InsideForward), seeds_off(model):
        pass
    with (
        kasmina_fx.transaction(model),
        pytest.raises(InvalidArgument, match="inside a transaction"),
        seeds_off(model),
    ):
        pass

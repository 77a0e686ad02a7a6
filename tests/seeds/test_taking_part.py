"""Which layers of a model take part in its graphs: those that grow, until others join them."""

from __future__ import annotations

import copy
import io
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

from kasmina_fx import explain, kasmina_layers, kasminify, transaction
from kasmina_fx.reference import reference_mode
from kasmina_fx.seeds import ranks, siblings
from kasmina_fx.testing import graft

X = torch.randn(5, 6)


def three() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6), nn.Linear(6, 6))
    return kasminify(model, num_seeds=3, compile=False)


def grown(*numbers: int) -> Any:
    model = three()
    for number in numbers:
        graft(list(kasmina_layers(model).values())[number], [number], "mlp", 0.5)
    return model


def taking_part(model: Any) -> list[int]:
    """The layers whose banks forwards read."""
    layers = [layer.kasmina for layer in kasmina_layers(model).values()]
    for store in layers:
        stacks = store.stacks() if store.takes_part else []
        assert store.shown.shows(stacks)
        assert store.shown_stacks() == stacks
        assert store.shown.banks == " ".join(str(b.spec) for b in store.bank_list() if stacks)
    return [number for number, store in enumerate(layers) if store.takes_part]


def assert_as_reference(model: Any) -> None:
    out = model(X)
    with reference_mode(model):
        torch.testing.assert_close(out, model(X))


def test_a_layer_rests_with_all_its_parameters_until_one_of_its_seeds_grows() -> None:
    model = grown(1)
    assert taking_part(model) == [1]
    model(X).sum().backward()
    for number, layer in enumerate(kasmina_layers(model).values()):
        parameters = list(layer.blueprint_parameters())
        assert len(parameters) == 4
        assert all((p.grad is not None) == (number == 1) for p in parameters)
    first, second, _ = explain(model, X).layers
    assert (first.lowering, first.why) == (
        "dormant",
        "none of its seeds has grown yet; it joins with the first",
    )
    assert second.lowering != "dormant"
    assert_as_reference(model)


def test_others_join_together_once_a_graph_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = [3]
    monkeypatch.setattr(siblings, "graphs_compiled", lambda: compiled[0])
    model = grown(0)
    first, second, _ = kasmina_layers(model).values()
    compiled[0] += 1
    graft(first, [1], "affine")
    assert taking_part(model) == [0]
    with transaction(model):
        graft(second, [1], "affine")
        assert taking_part(model) == [0]
    assert taking_part(model) == [0, 1, 2]
    assert_as_reference(model)


def test_a_transaction_that_fails_lets_nobody_join() -> None:
    model = three()
    _, layer, _ = kasmina_layers(model).values()
    staged = transaction(model)
    with suppress(KeyError), staged:
        layer.request_germination(0, "mlp")
        raise KeyError
    assert taking_part(model) == []
    assert_as_reference(model)


def test_copies_loaded_and_written_states_bring_in_the_layers_with_seeds() -> None:
    model, fresh, written = grown(0, 2), three(), grown(1)
    assert taking_part(copy.deepcopy(model)) == [0, 2]
    fresh.load_state_dict(model.state_dict())
    assert taking_part(fresh) == [0, 2]
    with torch.no_grad():
        for ours, theirs in zip(
            written.state_dict(keep_vars=True).values(),
            model.state_dict(keep_vars=True).values(),
            strict=True,
        ):
            if isinstance(ours, torch.Tensor) and ours.shape == theirs.shape:
                ours.copy_(theirs)
    torch.testing.assert_close(written(X), model(X))
    assert taking_part(written) == [0, 1, 2]  # a layer that has grown goes on taking part
    for each in (fresh, written):
        assert_as_reference(each)


def test_a_model_pickled_before_there_was_such_a_thing_takes_part_where_it_has_seeds() -> None:
    model = grown(2)
    for layer in kasmina_layers(model).values():
        layer.kasmina.__dict__.pop("takes_part", None)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert taking_part(loaded) == [2]
    assert_as_reference(loaded)


def test_a_state_that_stands_in_for_a_call_is_read_where_the_layer_rests() -> None:
    model, other = grown(0), grown(0, 1)
    state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    torch.testing.assert_close(functional_call(model, state, (X,)), other(X))
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    torch.testing.assert_close(functional_call(model, own, (X,)), model(X))
    assert taking_part(model) == [0]


def test_making_room_lets_all_take_part() -> None:
    model = three()
    next(iter(kasmina_layers(model).values())).reserve(2, "mlp")
    assert taking_part(model) == [0, 1, 2]
    ready = kasminify(nn.Sequential(nn.Linear(6, 6)), num_seeds=2, reserve=2, compile=False)
    assert taking_part(ready) == [0]


def test_ranks_that_train_one_model_let_all_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    late = grown(1)
    for module in (siblings, ranks):
        monkeypatch.setattr(module, "in_group", lambda: True)
    assert taking_part(grown(1)) == [0, 1, 2]
    late(X)  # grew before there was a group
    assert taking_part(late) == [0, 1, 2]

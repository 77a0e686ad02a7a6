"""Packs are captured, activated and deleted; what is in use is the whole pack, or nothing of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pack_cases import PACKS, X, first, grow, output, outputs, plain, small, with_packs
from torch import nn

import kasmina_fx
from kasmina_fx import (
    InsideForward,
    InvalidArgument,
    InvalidType,
    LayoutMismatch,
    NoTargets,
    SeedLifecycle,
    kasmina_layers,
)
from kasmina_fx.banks.bank import Bank
from kasmina_fx.reference import reference_mode
from kasmina_fx.seed_packs import ModelPacks


def test_each_pack_comes_back_to_the_bit_and_none_is_the_host() -> None:
    model = small()
    mine, seen = kasmina_fx.packs(model), {}
    for name, (seeds, kind) in PACKS.items():
        mine.activate(None)
        grow(model, seeds, kind)
        mine.capture(name)
        seen[name] = output(model)
    assert len({tuple(out.flatten().tolist()) for out in seen.values()}) == 3
    for name in "abcbacab":
        mine.activate(name)
        assert mine.active == name
        assert output(model).equal(seen[name])
    mine.activate(None)
    assert mine.active is None
    assert output(model).equal(plain()(X))
    assert first(model).state.get_state_distribution() == {"DORMANT": 4}


def test_a_pack_is_what_the_definition_makes_of_its_seeds_in_float64() -> None:
    model = with_packs().double()
    x = X.double()
    for name in (*PACKS, None):
        kasmina_fx.packs(model).activate(name)
        with reference_mode(model), torch.no_grad():
            wanted = model(x)
        torch.testing.assert_close(output(model, x), wanted, rtol=1e-12, atol=1e-12)


def test_rows_alphas_and_slots_come_back_as_they_were() -> None:
    model = with_packs()
    mine, layer = kasmina_fx.packs(model), first(model)
    layer.advance([0], SeedLifecycle.FOSSILIZED)
    layer.set_alpha([3], 0.25)
    kasmina_fx.step_epoch(model)
    before = layer.state.rows.clone(), layer.state.alphas.clone(), dict(layer.kasmina.derived())
    mine.activate("a")
    assert layer.state.alphas.tolist() == [1, 1, 0, 0]
    mine.activate("c")
    assert layer.state.rows.equal(before[0])
    assert layer.state.alphas.equal(before[1])
    for name, table in layer.kasmina.derived():
        assert table.equal(before[2][name]), name


def test_packs_that_are_put_away_lie_in_no_stack() -> None:
    model = with_packs()
    capacity = {bank.key: bank.capacity for bank in first(model).kasmina.bank_list()}
    assert capacity == {"mlp_run0": 2, "lora_run0": 4, "affine_run0": 2}
    outputs(model)
    banks = {bank.key: bank for bank in first(model).kasmina.bank_list()}
    assert {key: bank.capacity for key, bank in banks.items()} == capacity
    used = {key: int((bank.held > 0).sum()) for key, bank in banks.items()}
    assert used == {"mlp_run0": 0, "lora_run0": 0, "affine_run0": 2}


def test_switching_keeps_parameters_the_same_objects() -> None:
    model = with_packs()
    before = [id(p) for p in model.parameters()]
    outputs(model)
    assert [id(p) for p in model.parameters()] == before


def test_a_second_capture_starts_as_a_copy() -> None:
    model = with_packs()
    mine, was = kasmina_fx.packs(model), output(model)
    mine.capture("d")
    first(model).set_alpha([0], 0.5)
    assert not output(model).equal(was)
    mine.activate("c")
    assert output(model).equal(was)
    assert mine.names() == ["a", "b", "c", "d"]


def test_what_is_done_to_the_pack_in_use_stays_with_it() -> None:
    model = with_packs()
    mine = kasmina_fx.packs(model)
    first(model).reset([0])
    now = output(model)
    mine.activate("a")
    mine.activate("c")
    assert output(model).equal(now)
    assert first(model).state.holding.tolist() == [False, False, False, True]


def test_new_seeds_of_a_pack_have_slots_and_ids_of_their_own() -> None:
    model = with_packs()
    mine, before = kasmina_fx.packs(model), outputs(model)
    mine.activate("a")
    grow(model, [2, 3], "lora")
    mine.activate("b")
    assert output(model).equal(before["b"])
    mine.activate("a")
    held = [bank.held[bank.held > 0].tolist() for bank in first(model).kasmina.bank_list()]
    ids = [number for each in held for number in each]
    assert len(ids) == len(set(ids)) == 4


def test_a_shared_blueprint_is_a_packs_own() -> None:
    model = small()
    mine, layer = kasmina_fx.packs(model), first(model)
    shared = layer.register_blueprint("mlp")
    grown = {}
    for name in "ab":
        mine.activate(None)
        with layer.transaction():
            layer.request_germination([0, 2], shared)
            layer.state.batch_set_lifecycle_state([0, 2], SeedLifecycle.FINE_TUNING)
            layer.set_alpha([0, 2], 1.0)
        bank: Bank = layer.kasmina.banks["mlp_shared_run0"]  # type: ignore[assignment]  # a bank
        for stack in bank.tensors():
            stack.data.normal_()
        mine.capture(name)
        grown[name] = output(model)
    assert not grown["a"].equal(grown["b"])
    for name in "abab":
        mine.activate(name)
        assert output(model).equal(grown[name])


def test_a_bank_grows_once_where_a_pack_needs_more_slots() -> None:
    model, other = with_packs(), small()
    other.load_state_dict(model.state_dict())  # of a capacity for the pack that is in use
    layer, sizes = first(other), set()
    bank: Bank = layer.kasmina.banks["lora_run0"]  # type: ignore[assignment]  # a bank
    while bank.capacity > 2:
        bank.held = bank.held[:0]
        bank.slots = bank.slots[:0]
        for name in list(bank._parameters):
            bank._parameters[name] = nn.Parameter(bank._parameters[name][:0])  # type: ignore[index]
        bank.grow(2)
        layer.kasmina.publish()
    for _ in range(2):
        kasmina_fx.packs(other).activate("b")
        sizes.add(bank.capacity)
        kasmina_fx.packs(other).activate("a")
    assert sizes == {4}


def test_deleted_packs_are_gone() -> None:
    model = with_packs()
    mine, before = kasmina_fx.packs(model), outputs(model)
    mine.delete("a")
    assert mine.names() == ["b", "c"]
    assert outputs(model)["b"].equal(before["b"])
    with pytest.raises(InvalidArgument, match="no pack 'a'; there are"):
        mine.activate("a")
    mine.capture("a")  # the name is free again


def test_names_and_sizes() -> None:
    model = with_packs()
    mine = kasmina_fx.packs(model)
    assert repr(mine) == "packs(['a', 'b', 'c'], active='c')"
    assert mine.nbytes("c") == 0
    stacks = first(model).kasmina.stacks()
    assert mine.nbytes("a") > 0
    mine.activate(None)
    affine = sum(
        s.nbytes
        for layer in kasmina_layers(model).values()
        for s in [
            s for b in layer.kasmina.bank_list() if b.spec.kind == "affine" for s in b.tensors()
        ]
    )
    assert mine.nbytes("c") == affine
    assert stacks


def refused(action: Callable[[ModelPacks, nn.Module], object], error: type, match: str) -> None:
    model = with_packs()
    mine, before = kasmina_fx.packs(model), outputs(model)
    with pytest.raises(error, match=match):
        action(mine, model)
    assert (mine.names(), mine.active) == (["a", "b", "c"], "c")
    after = outputs(model)
    assert all(after[name].equal(out) for name, out in before.items())


def in_transaction(mine: ModelPacks, model: nn.Module) -> None:
    with kasmina_fx.transaction(model):
        mine.activate("a")


def in_forward(mine: ModelPacks, model: nn.Module) -> None:
    with kasmina_fx.hold_seeds(model):
        mine.activate("a")


@pytest.mark.parametrize(
    ("action", "error", "match"),
    [
        (lambda mine, _: mine.capture("a"), InvalidArgument, "that no pack has; there are"),
        (lambda mine, _: mine.capture(""), InvalidArgument, "that no pack has"),
        (lambda mine, _: mine.capture(3), InvalidType, "give a str"),
        (lambda mine, _: mine.activate("z"), InvalidArgument, "no pack 'z'; there are"),
        (lambda mine, _: mine.activate(3), InvalidType, "give the name of a pack"),
        (lambda mine, _: mine.activate("a", discard=1), InvalidType, "give a bool"),
        (lambda mine, _: mine.delete("c"), InvalidArgument, "in use: activate another one"),
        (lambda mine, _: mine.delete("z"), InvalidArgument, "no pack 'z'"),
        (lambda mine, _: mine.nbytes("z"), InvalidArgument, "no pack 'z'"),
        (in_transaction, InvalidArgument, "inside a transaction"),
        (in_forward, InsideForward, "inside a model's forward"),
    ],
)
def test_what_makes_no_sense_changes_nothing(
    action: Callable[[ModelPacks, nn.Module], object], error: type, match: str
) -> None:
    refused(action, error, match)


def test_seeds_that_no_pack_holds_are_not_lost_by_accident() -> None:
    model = with_packs()
    mine = kasmina_fx.packs(model)
    mine.activate(None)
    grow(model, [2], "mlp")
    now = output(model)
    for name in (None, "a"):
        with pytest.raises(InvalidArgument, match=r"seeds \[2\] are in no pack"):
            mine.activate(name)
    assert output(model).equal(now)
    mine.activate("a", discard=True)
    mine.activate(None)
    assert output(model).equal(plain()(X))


def test_an_error_in_one_layer_leaves_all_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_packs()
    mine, before = kasmina_fx.packs(model), outputs(model)
    store = kasmina_layers(model)["2"].kasmina
    kept = store.packs.kept["b"]
    assert kept is not None
    monkeypatch.setattr(kept, "alpha", kept.alpha[:2])  # no longer that of three seeds
    with pytest.raises(RuntimeError):
        mine.activate("b")
    monkeypatch.undo()
    assert mine.active == "c"
    after = outputs(model)
    assert all(after[name].equal(out) for name, out in before.items())


def test_layers_with_other_packs_are_refused() -> None:
    model = with_packs()
    kasmina_layers(model)["2"].kasmina.packs.kept.pop("a")
    with pytest.raises(LayoutMismatch, match="parts of two checkpoints"):
        kasmina_fx.packs(model).activate("b")


def test_a_model_without_seeds_has_no_packs() -> None:
    with pytest.raises(NoTargets):
        kasmina_fx.packs(nn.Linear(2, 2))

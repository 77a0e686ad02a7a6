"""Checkpoint files: what comes back, what is refused, and what a killed writer leaves."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import functools
import io
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kasmina_fx import (
    KasminaLayer,
    LayoutMismatch,
    SeedLifecycle,
    checkpoint,
    kasmina_layers,
    kasminify,
)
from kasmina_fx.blueprints import register
from kasmina_fx.errors import CheckpointError
from kasmina_fx.sealed_file import Sealing
from kasmina_fx.testing import graft


def _net(num_seeds: int = 4, **kwargs: Any) -> Any:
    net = nn.Sequential(nn.Linear(5, 14), nn.LayerNorm(14), nn.GELU(), nn.Linear(14, 6))
    return kasminify(net, num_seeds=num_seeds, compile=False, **kwargs)


def _grown(**kwargs: Any) -> Any:
    """Private and shared blueprints in several stages, and some telemetry."""
    return copy.deepcopy(_template(**kwargs))


@functools.cache
def _template(**kwargs: Any) -> Any:
    model = _net(**kwargs)
    first, last = kasmina_layers(model).values()
    graft(first, [0, 3], "mlp", 0.4)
    graft(first, 1, "lora", 0.9)
    graft(last, [0, 2], last.register_blueprint("affine"), 0.5)
    last.request_germination([1, 3], "lora")
    with torch.no_grad():
        for layer in kasmina_layers(model).values():
            for parameter in layer.blueprint_parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    model(torch.randn(7, 5))
    return model


def _bits(value: Any) -> Any:
    """Something that is equal where every bit is."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), repr(value.tolist())
    if isinstance(value, dict):
        return {key: _bits(item) for key, item in value.items()}
    return [_bits(item) for item in value] if isinstance(value, (list, tuple)) else value


def _everything(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Any:
    """Bits, and identities of parameters: equal only if nothing at all has changed."""
    host = [(layer.state.stages, layer.state.alphas) for layer in kasmina_layers(model).values()]
    groups = [] if optimizer is None else [g["params"] for g in optimizer.param_groups]
    return [
        _bits(model.state_dict()),
        _bits(host),
        [(name, id(p)) for name, p in model.named_parameters()],
        None if optimizer is None else _bits(optimizer.state_dict()),
        [[id(p) for p in group] for group in groups],
    ]


def _used(model: nn.Module) -> Any:
    """What a checkpoint restores whatever the capacity: all but empty banks and free slots."""
    saved = {k: _bits(v) for k, v in model.state_dict().items() if ".kasmina." not in k}
    for name, layer in kasmina_layers(model).items():
        saved[name] = _bits([layer.state.state_tensor, layer.state.alpha])
        saved[name + "telemetry"] = _bits(layer.kasmina.telemetry.state_dict())
        saved[name + "blueprints"] = dict(layer.kasmina.blueprints)
        for seed in range(layer.num_seeds):
            held = layer.bank_of(seed)
            saved[f"{name}:{seed}"] = held and _bits(held[0].slot_tensors(held[1]))
    return saved


def _forge(path: Path, contents: Any) -> None:
    """A file that is sealed as it should be, with any contents."""
    with open(path, "wb") as file:
        sealing = Sealing(file)
        torch.save(contents, sealing)  # type: ignore[arg-type]  # write and flush are all it calls
        sealing.seal()


def _contents(path: Path) -> Any:
    return torch.load(path, weights_only=True)


@functools.cache
def _saved() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(_grown(), Path(folder, "net.pt"))
        return Path(folder, "net.pt").read_bytes()


def _saved_contents() -> Any:
    """What the file of a grown model holds."""
    return torch.load(io.BytesIO(_saved()), weights_only=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "net.pt"


# What comes back.


@pytest.mark.parametrize("reserve", [0, 2, 8], ids=lambda n: f"into {n}")
@pytest.mark.parametrize("saved_reserve", [0, 8], ids=lambda n: f"from {n}")
def test_a_grown_model_comes_back_in_a_fresh_one_of_any_capacity(
    path: Path, saved_reserve: int, reserve: int
) -> None:
    source, fresh = _grown(reserve=saved_reserve), _net(reserve=reserve)
    checkpoint.save(source, path)
    assert _used(fresh) != _used(source)
    assert checkpoint.load(fresh, path) == {}
    assert _used(fresh) == _used(source)
    x = torch.randn(3, 5)
    assert torch.equal(fresh(x), source(x))
    # And it goes on growing.
    for model in (source, fresh):
        layer = kasmina_layers(model)["0"]
        torch.manual_seed(5)
        graft(layer, 2, "mlp", 1.0)
    assert torch.equal(fresh(x), source(x))


def test_loading_replaces_what_the_model_had_grown(path: Path) -> None:
    source, other = _grown(), _net()
    for layer in kasmina_layers(other).values():
        graft(layer, range(4), "bottleneck", 1.0)
    checkpoint.save(source, path)
    checkpoint.load(other, path)
    assert _used(other) == _used(source)


def test_the_model_that_was_saved_is_not_changed_and_loads_its_own_file(path: Path) -> None:
    model = _grown()
    before = _everything(model)
    checkpoint.save(model, path)
    assert _everything(model) == before
    checkpoint.load(model, path)
    assert _everything(model) == before


def test_the_state_dict_alone_holds_everything_and_plain_torch_reads_the_file(path: Path) -> None:
    source, fresh = _grown(), _net()
    checkpoint.save(source, path)
    fresh.load_state_dict(_contents(path)["model"])
    assert _used(fresh) == _used(source)


def test_compiled_models(path: Path) -> None:
    source: Any = torch.compile(_grown(), backend="eager")
    target: Any = torch.compile(_net(), backend="eager")
    x = torch.randn(3, 5)
    target(x)
    checkpoint.save(source, path)
    checkpoint.load(target, path)
    torch.testing.assert_close(target(x), source(x))
    plain = _net()
    checkpoint.load(plain, path)
    torch.testing.assert_close(plain(x), source(x))


def test_a_model_without_seeds(path: Path) -> None:
    source, target = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    source(torch.randn(5, 3))
    checkpoint.save(source, path)
    checkpoint.load(target, path)
    assert _everything(target)[0] == _everything(source)[0]


def test_the_dtype_is_the_models_and_what_is_lazy_is_made(path: Path) -> None:
    source = nn.Sequential(nn.LazyLinear(3))
    source(torch.zeros(1, 2))
    checkpoint.save(source, path)
    target = nn.Sequential(nn.LazyLinear(3))
    checkpoint.load(target, path)
    assert target[0].weight.shape == (3, 2)
    checkpoint.load(source.double(), path)
    assert source[0].weight.dtype == torch.float64


METADATA: dict[str, Any] = {
    "none": None,
    "list": [True, 1, -(2**70), 0.1, float("inf"), "text", [], {}],
    "dict": {"": {"deeper": [[1]]}},
}


def test_metadata_comes_back(path: Path) -> None:
    checkpoint.save(_net(), path, metadata=METADATA)
    assert checkpoint.load(_net(), path) == METADATA
    assert checkpoint.load(_net(), str(path)) == METADATA


class _Number(IntEnum):
    ONE = 1


_LOOP: list[Any] = []
_LOOP.append({"again": _LOOP})
BAD_METADATA = {
    "a list": ([1], "metadata is a list"),
    "a number": (1, "metadata is a int"),
    "a tuple": ({"a": (1, 2)}, r"metadata\['a'\] is a tuple.*convert"),
    "a tensor": ({"a": [torch.zeros(1)]}, r"metadata\['a'\]\[0\] is a Tensor"),
    "a module": ({"a": nn.Linear(1, 1)}, "Linear"),
    "an enum": ({"a": _Number.ONE}, "_Number"),
    "a key": ({"a": {1: 2}}, r"metadata\['a'\] has the key 1"),
    "a loop": ({"a": _LOOP}, "itself again"),
}


@pytest.mark.parametrize(("given", "match"), BAD_METADATA.values(), ids=BAD_METADATA)
def test_metadata_that_would_not_come_back_is_refused(path: Path, given: Any, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        checkpoint.save(_net(), path, metadata=given)
    assert list(path.parent.iterdir()) == []


# Files that are not what was saved.


def _refused(path: Path, match: str, **kwargs: Any) -> None:
    model = _grown()
    before = _everything(model)
    with pytest.raises(CheckpointError, match=match) as caught:
        checkpoint.load(model, path, **kwargs)
    assert str(path) in str(caught.value)
    assert _everything(model) == before


@pytest.mark.parametrize("left", [0, 1, 20, 5000, -5000, -51, -50, -32, -1])
def test_a_file_that_was_cut_off_is_refused(path: Path, left: int) -> None:
    assert len(_saved()) > 10_000
    path.write_bytes(_saved()[:left])
    _refused(path, "cut off")


def test_every_changed_byte_is_noticed(path: Path) -> None:
    checkpoint.save(nn.Linear(2, 2), path)
    data, model = path.read_bytes(), nn.Linear(2, 2)
    before = _everything(model)
    for position in [*range(0, len(data), 7), *range(len(data) - 60, len(data))]:
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"SHA-256|cut off"):
            checkpoint.load(model, path)
    path.write_bytes(data + b"\n")
    with pytest.raises(CheckpointError, match="cut off"):
        checkpoint.load(model, path)
    assert _everything(model) == before
    path.write_bytes(data)
    checkpoint.load(model, path)


class _Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


def test_code_in_a_file_is_not_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _forge(path, {"format": checkpoint.FORMAT, "version": 1, "model": _Evil()})
    _refused(path, "weights_only")
    with open(path, "wb") as file:
        sealing = Sealing(file)
        sealing.write(pickle.dumps(_Evil()))
        sealing.seal()
    _refused(path, "weights_only")
    assert not Path("ran").exists()


OTHER_FILES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a tensor": (lambda c: torch.zeros(1), "did not write"),
    "another dict": (lambda c: c["model"], "did not write"),
    "another format": (lambda c: {**c, "format": "other"}, "did not write"),
    "a newer version": (lambda c: {**c, "version": 2}, "version 2; this release reads version 1"),
    "no version": (lambda c: {"format": c["format"]}, "version None"),
    "no model": (lambda c: {**c, "model": None}, "malformed"),
    "a model without names": (lambda c: {**c, "model": {1: torch.zeros(1)}}, "malformed"),
    "an optimizer of another kind": (lambda c: {**c, "optimizer": 1}, "malformed"),
    "no metadata": (lambda c: {**c, "metadata": None}, "metadata is a NoneType"),
    "other metadata": (lambda c: {**c, "metadata": {"a": (1,)}}, "tuple"),
}


@pytest.mark.parametrize(("change", "match"), OTHER_FILES.values(), ids=OTHER_FILES)
def test_a_sealed_file_of_another_kind_is_refused(
    path: Path, change: Callable[[dict[str, Any]], Any], match: str
) -> None:
    _forge(path, change(_saved_contents()))
    _refused(path, match)


def test_a_plain_state_dict_is_refused_with_what_to_call(path: Path) -> None:
    torch.save(_net().state_dict(), path)
    _refused(path, "model.load_state_dict")


def test_a_file_that_is_not_there(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        checkpoint.load(_net(), path)
    with pytest.raises(FileNotFoundError):
        checkpoint.save(_net(), path / "folder" / "net.pt")


# Entries that are not this model's.

STATE, ALPHA = "3.kasmina.state.state_tensor", "3.kasmina.state.alpha"
EXTRA, TELEMETRY = "3.kasmina._extra_state", "3.kasmina.telemetry.accumulated"
PRIVATE, UNUSED = "3.kasmina.banks.lora_run0.", "3.kasmina.banks.mlp_run0."
SHARED = "3.kasmina.banks.affine_shared_run0."


def _put(key: str, index: Any, value: float) -> Callable[[dict[str, Any]], None]:
    def change(saved: dict[str, Any]) -> None:
        saved[key][index] = value

    return change


def _become(key: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    def changed(saved: dict[str, Any]) -> None:
        saved[key] = change(saved[key])

    return changed


def _extra(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return _become(EXTRA, lambda extra: {**extra, name: value})


def _without(*keys: str) -> Callable[[dict[str, Any]], None]:
    def change(saved: dict[str, Any]) -> None:
        for key in keys:
            del saved[key]

    return change


def _a_bank_that_does_not_fit(saved: dict[str, Any]) -> None:
    wide = nn.Linear(5, 5)  # for chunks of 5 features alone; this layer's have 2 and 1
    kind = register(wide, name="wide")
    for name, value in wide.state_dict().items():
        saved[f"3.kasmina.banks.{kind}_run0.{name}"] = torch.stack([value, value])
    saved[f"3.kasmina.banks.{kind}_run0.slots"] = torch.zeros(2, dtype=torch.int64)
    saved[EXTRA]["banks"][f"{kind}_run0"] = f"{kind}@0*2"


def _a_bank_with_one_slot(saved: dict[str, Any]) -> None:
    for name in [name for name in saved if name.startswith(UNUSED)]:
        saved[name] = saved[name][:1]


#: All in the last layer: a check that comes while a model loads would find the first one changed.
EDITED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "stage": (_put(STATE, (1, 0), 11), "out of range"),
    "negative strategy": (_put(STATE, (1, 3), -1), "out of range"),
    "unknown strategy": (_put(STATE, (1, 3), 99), "out of range"),
    "epochs": (_put(STATE, (1, 2), 2**15), "out of range"),
    "dtype of the state": (_become(STATE, lambda t: t.float()), "state_tensor is torch.float32"),
    "rows of the state": (_become(STATE, lambda t: t[:3]), r"state_tensor is .*\(3, 4\).*\(4, 4\)"),
    "no state": (_without(STATE), "lacks 'kasmina.state.state_tensor'"),
    "a state of another kind": (_become(STATE, lambda t: t.tolist()), "is a list"),
    "an id that is in no bank": (_put(STATE, (1, 1), 99), r"seeds \[1\] hold blueprints"),
    "no id": (_put(STATE, (1, 1), 0), "no seed has the ids"),
    "an id too high": (_extra("highest_id", -1), "highest_id -1; allowed are 0 to"),
    "an id of another run": (_put(STATE, (1, 1), 3), r"seeds \[1\] hold blueprints"),
    "a private id for two": (_put(STATE, (0, 1), 2), "several seeds have one slot"),
    "a dormant seed with an id": (_put(STATE, (1, 0), 0), r"seeds \[1\] are DORMANT"),
    "alpha above 1": (_put(ALPHA, 1, 1.5), "alpha"),
    "alpha NaN": (_put(ALPHA, 1, float("nan")), "alpha"),
    "dtype of alpha": (_become(ALPHA, lambda t: t.double()), "alpha is torch.float64"),
    "no alpha": (_without(ALPHA), "lacks 'kasmina.state.alpha'"),
    "rows of telemetry": (_become(TELEMETRY, lambda t: t[1:]), "accumulated is"),
    "dtype of telemetry": (_become(TELEMETRY, lambda t: t.half()), "accumulated is torch.float16"),
    "no telemetry": (_without(TELEMETRY), "lacks 'kasmina.telemetry.accumulated'"),
    "no extra state": (_without(EXTRA), "lacks 'kasmina._extra_state'"),
    "version": (_extra("version", 99), "version 99"),
    "layout": (_extra("layout", "dim=-1 runs=6x1"), "num_seeds"),
    "unknown blueprint": (_extra("blueprints", {1: "nope"}), "not registered here"),
    "blueprint id 0": (_extra("blueprints", {0: "affine"}), "blueprint id 0"),
    "blueprint id as a text": (_extra("blueprints", {"1": "affine"}), "blueprint id '1'"),
    "blueprints of another kind": (_extra("blueprints", [1]), "malformed"),
    "a shared blueprint is gone": (_extra("blueprints", {}), "another blueprint"),
    "a shared blueprint is another": (_extra("blueprints", {1: "mlp"}), "another blueprint"),
    "no banks": (_extra("banks", {}), "no kasmina.banks"),
    "banks of another kind": (_extra("banks", {"lora_run0": 7}), "malformed"),
    "a bank in evaluation": (
        lambda d: d[EXTRA]["banks"].update({"lora_run0": "lora:eval@0*2"}),
        "as evaluation runs it",
    ),
    "a bank of no run": (
        lambda d: d[EXTRA]["banks"].update({"lora_run7": "lora@7*2"}),
        "run 7; the layer has 2",
    ),
    "a bank that does not fit": (_a_bank_that_does_not_fit, "wide@0.2 in chunks of 2 features"),
    "a bank with too few slots": (_a_bank_with_one_slot, "slots has 1 rows.* 2 or more"),
    "a bank with other stacks": (_become(SHARED + "scale", lambda t: t[:, :1]), "scale has shape"),
    "a bank of ints": (_become(SHARED + "scale", lambda t: t.int()), "scale is torch.int32"),
    "an unknown entry": (lambda d: d.update({"3.kasmina.more": torch.zeros(1)}), "no kasmina.more"),
    "negative slot": (_put(PRIVATE + "slots", 0, -2), "slots holds"),
    "slot beyond int32": (_put(PRIVATE + "slots", 0, 2**31), "slots holds"),
    "an id in two banks": (_put(UNUSED + "slots", 0, 2), "of another blueprint"),
    "a shared id in a private bank": (_put(PRIVATE + "slots", 1, 1), "of another blueprint"),
    "an id twice": (lambda d: d[PRIVATE + "slots"].fill_(2), "slots holds .*each once"),
    "dtype of slots": (_become(PRIVATE + "slots", lambda t: t.float()), "slots is torch.float32"),
    "no slots": (_without(PRIVATE + "slots"), "lacks .*slots"),
    "slots of another kind": (_become(PRIVATE + "slots", lambda t: 7), "slots is a int"),
}


@pytest.mark.parametrize("target", [_grown, _net], ids=["into grown", "into fresh"])
@pytest.mark.parametrize(("edit", "match"), EDITED.values(), ids=EDITED)
def test_edited_entries_are_refused_and_nothing_changes(
    path: Path, edit: Callable[[dict[str, Any]], None], match: str, target: Callable[[], Any]
) -> None:
    contents = _saved_contents()
    edit(contents["model"])
    _forge(path, contents)
    model = target()
    before = _everything(model)
    with pytest.raises(LayoutMismatch, match=f"^3: .*{match}"):
        checkpoint.load(model, path)
    assert _everything(model) == before
    with pytest.raises(LayoutMismatch, match=f"^3: .*{match}"):
        model.load_state_dict(contents["model"])
    assert _everything(model) == before


@pytest.mark.parametrize("num_seeds", [1, 2, 5])
def test_another_number_of_seeds_is_refused_with_the_numbers(path: Path, num_seeds: int) -> None:
    checkpoint.save(_grown(), path)
    model = _net(num_seeds)
    before = _everything(model)
    with pytest.raises(LayoutMismatch, match=r"^0: .*\[dim=-1 runs=2x4\+2x3\].*num_seeds"):
        checkpoint.load(model, path)
    assert _everything(model) == before


def test_a_shared_layer_is_checked_by_each_of_its_names(path: Path) -> None:
    def net() -> Any:
        shared = nn.Linear(4, 4)
        return kasminify(nn.Sequential(shared, nn.GELU(), shared), num_seeds=4, compile=False)

    checkpoint.save(net(), path)
    contents, model = _contents(path), net()
    contents["model"]["2.kasmina.state.alpha"] = torch.full((4,), 2.0)
    _forge(path, contents)
    before = _everything(model)
    with pytest.raises(LayoutMismatch, match="alpha"):
        checkpoint.load(model, path)
    assert _everything(model) == before


HOST: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "missing": (_without("3.bias"), r"missing are \['3.bias'\], unknown none"),
    "unknown": (lambda d: d.update(other=torch.zeros(1)), r"unknown \['other'\]"),
    "shape": (_become("3.bias", lambda t: t[:2]), r"3.bias is \(2,\); the model takes \(6,\)"),
    "kind": (_become("1.weight", lambda t: 1.0), r"1.weight is float.*\(14,\)"),
}


@pytest.mark.parametrize(("edit", "match"), HOST.values(), ids=HOST)
def test_the_host_is_checked_before_anything_changes(
    path: Path, edit: Callable[[dict[str, Any]], None], match: str
) -> None:
    contents = _saved_contents()
    edit(contents["model"])
    _forge(path, contents)
    _refused(path, match)


def test_names_may_differ_where_it_is_not_strict(path: Path) -> None:
    source, fresh = _grown(), _net()
    checkpoint.save(source, path)
    contents = _contents(path)
    contents["model"]["other"] = contents["model"].pop("3.bias")
    _forge(path, contents)
    bias = fresh[3].bias.detach().clone()
    checkpoint.load(fresh, path, strict=False)
    assert torch.equal(fresh[3].bias, bias)
    assert torch.equal(fresh[3].weight, source[3].weight)
    contents["model"]["3.weight"] = torch.zeros(1)
    _forge(path, contents)
    _refused(path, "3.weight", strict=False)


def test_a_kasminified_file_and_a_plain_model(path: Path) -> None:
    checkpoint.save(_grown(), path)
    plain: Any = nn.Sequential(nn.Linear(5, 14), nn.LayerNorm(14), nn.GELU(), nn.Linear(14, 6))
    with pytest.raises(CheckpointError, match=r"unknown \['0.kasmina.*kasminify the model"):
        checkpoint.load(plain, path)
    checkpoint.save(plain, path)
    model = _grown()
    seeds = _bits(kasmina_layers(model)["0"].kasmina.state_dict())
    checkpoint.load(model, path)
    assert torch.equal(model[0].weight, plain[0].weight)
    assert _bits(kasmina_layers(model)["0"].kasmina.state_dict()) == seeds


def test_what_could_not_be_loaded_is_not_saved(path: Path) -> None:
    model = _grown()
    checkpoint.save(model, path)
    before = path.read_bytes()
    layer = kasmina_layers(model)["0"]
    layer.state.set_rows(2, lifecycle_state=SeedLifecycle.GRAFTING, blueprint_id=99)
    with pytest.raises(LayoutMismatch, match=r"seeds \[2\]"):
        checkpoint.save(model, path)
    assert path.read_bytes() == before


class _Custom(nn.Module):
    def get_extra_state(self) -> Any:
        return _Number.ONE

    def set_extra_state(self, state: Any) -> None:
        self.state = state


def test_extra_state_that_would_run_code_is_refused_unless_it_is_allowed(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"_Number.*add_safe_globals"):
        checkpoint.save(_Custom(), path)
    assert list(path.parent.iterdir()) == []
    model = _Custom()
    with torch.serialization.safe_globals([_Number]):
        checkpoint.save(model, path)
        checkpoint.load(model, path)
    assert model.state is _Number.ONE


# Optimizers.


def _adam(model: nn.Module, groups: int = 1) -> Any:
    named = list(model.named_parameters())
    split = [[p for name, p in named if name.startswith("0")], [p for _, p in named]]
    first = {id(p) for p in split[0]}
    split[1] = [p for p in split[1] if id(p) not in first]
    lists = split if groups == 2 else [[p for _, p in named]]
    return torch.optim.Adam([{"params": p, "lr": 0.1 / (i + 1)} for i, p in enumerate(lists)])


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    torch.manual_seed(9)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(7, 5)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("saved_reserve", "reserve"), [(0, 0), (0, 8), (8, 0), (2, 2)])
def test_training_goes_on_as_if_it_had_not_stopped(
    path: Path, saved_reserve: int, reserve: int, groups: int
) -> None:
    model, fresh = _grown(reserve=saved_reserve), _net(reserve=reserve)
    optimizer = _adam(model, groups)
    _train(model, optimizer, 3)
    checkpoint.save(model, path, optimizer=optimizer)
    other = _adam(fresh, groups)
    for group in other.param_groups:
        group["lr"] = 7.0
    checkpoint.load(fresh, path, optimizer=other)
    owned = {id(p) for group in other.param_groups for p in group["params"]}
    assert owned == {id(p) for p in fresh.parameters()}
    for each, its in ((model, optimizer), (fresh, other)):
        _train(each, its, 3)
    assert _used(fresh) == _used(model)
    assert [g["lr"] for g in other.param_groups] == [g["lr"] for g in optimizer.param_groups]


def test_what_the_target_and_its_optimizer_had_before_does_not_matter(path: Path) -> None:
    model, target = _grown(), _net()
    for layer in kasmina_layers(target).values():
        graft(layer, [1, 2, 3], "mlp", 0.7)
    optimizer, other = _adam(model), _adam(target)
    _train(model, optimizer, 3)
    _train(target, other, 1)
    graft(kasmina_layers(target)["0"], 0, "mlp", 0.7)
    checkpoint.save(model, path, optimizer=optimizer)
    checkpoint.load(target, path, optimizer=other)
    for each, its in ((model, optimizer), (target, other)):
        _train(each, its, 3)
    assert _used(target) == _used(model)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.Adagrad, torch.optim.SGD])
def test_banks_that_only_the_model_has_stay_in_their_group(path: Path, kind: Any) -> None:
    source, target = _net(), _net(reserve=2)
    optimizer, other = (
        kind([{"params": model[0].parameters()}, {"params": model[3].parameters()}])
        for model in (source, target)
    )
    before = [{id(p) for p in group["params"]} for group in other.param_groups]
    _train(source, optimizer, 1)
    checkpoint.save(source, path, optimizer=optimizer)
    checkpoint.load(target, path, optimizer=other)
    assert [{id(p) for p in group["params"]} for group in other.param_groups] == before
    for each, its in ((source, optimizer), (target, other)):
        graft(kasmina_layers(each)["0"], 1, "affine", 0.7)
        _train(each, its, 2)
    assert _used(target) == _used(source)
    graft(kasmina_layers(target)["0"], 2, "mlp", 0.7)
    _train(target, other, 2)


@pytest.mark.parametrize("named", [(True, True), (True, False), (False, True)])
def test_names_in_the_groups_follow_the_parameters(path: Path, named: tuple[bool, bool]) -> None:
    models = [_grown(), _net()]
    optimizers = [
        torch.optim.SGD(m.named_parameters() if n else m.parameters(), momentum=0.9)
        for m, n in zip(models, named, strict=True)
    ]
    _train(models[0], optimizers[0], 1)
    checkpoint.save(models[0], path, optimizer=optimizers[0])
    checkpoint.load(models[1], path, optimizer=optimizers[1])
    (group,) = optimizers[1].param_groups
    parameters = dict(models[1].named_parameters())
    for name, parameter in zip(group["param_names"], group["params"], strict=True):
        assert parameters[name] is parameter
    for each, its in zip(models, optimizers, strict=True):
        _train(each, its, 2)
    assert _used(models[0]) == _used(models[1])


def test_a_model_alone_is_taken_from_a_file_with_an_optimizer(path: Path) -> None:
    model, fresh = _grown(), _net()
    checkpoint.save(model, path, optimizer=_adam(model))
    checkpoint.load(fresh, path)
    assert _used(fresh) == _used(model)


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters())


def _host_only(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for n, p in model.named_parameters() if n.startswith("0.base")])


def _other_way_round(model: nn.Module) -> torch.optim.Optimizer:
    """The stacks of the first layer in the second layer's group."""
    stacks = [p for n, p in model.named_parameters() if n.startswith("0.kasmina")]
    moved = {id(p) for p in stacks}
    first = [p for n, p in model.named_parameters() if n[0] == "0" and id(p) not in moved]
    rest = [p for n, p in model.named_parameters() if n[0] != "0"]
    return torch.optim.Adam([{"params": first}, {"params": rest + stacks}])


def _stranger(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam([*model.parameters(), nn.Parameter(torch.zeros(1))])


def _packed(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    def changed(contents: dict[str, Any]) -> None:
        change(contents["optimizer"])

    return changed


#: How the file is edited, the optimizer that loads it, and what the refusal says.
OTHER_OPTIMIZERS: dict[str, tuple[Callable[[dict[str, Any]], None], Any, str]] = {
    "none": (lambda c: c.update(optimizer=None), _adam, "holds no optimizer"),
    "another class": (lambda c: None, _sgd, "holds a Adam .*the optimizer is a SGD"),
    "another number of groups": (lambda c: None, lambda m: _adam(m, 1), "2 parameter groups"),
    "fewer parameters": (
        _packed(lambda o: o.update(names=o["names"][1:], state=_one_group(o["state"]))),
        _host_only,
        r"other parameters: \['0.base.bias'",
    ),
    "other groups": (lambda c: None, _other_way_round, "in another group"),
    "a bank that no layer has": (
        _packed(lambda o: o["names"][0].__setitem__(-1, "0.kasmina.banks.nope.x")),
        lambda m: _adam(m, 2),
        "other parameters",
    ),
    "a parameter of no model": (lambda c: None, _stranger, "1 of the optimizer's"),
    "no names": (_packed(lambda o: o.pop("names")), lambda m: _adam(m, 2), "malformed"),
    "names that don't match": (
        _packed(lambda o: o["names"][0].pop()),
        lambda m: _adam(m, 2),
        "don't match",
    ),
    "no state": (
        _packed(lambda o: o["state"].update(state=None)),
        lambda m: _adam(m, 2),
        "don't match",
    ),
}


def _one_group(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "param_groups": state["param_groups"][1:]}


@pytest.mark.parametrize(
    ("edit", "build", "match"), OTHER_OPTIMIZERS.values(), ids=OTHER_OPTIMIZERS
)
def test_an_optimizer_that_does_not_fit_is_refused_and_nothing_changes(
    path: Path, edit: Callable[[dict[str, Any]], None], build: Any, match: str
) -> None:
    source, model = _grown(), _grown()
    optimizer = _adam(source, 2)
    _train(source, optimizer, 1)
    checkpoint.save(source, path, optimizer=optimizer)
    contents = _contents(path)
    edit(contents)
    _forge(path, contents)
    other = build(model)
    _train(model, other, 1)
    before = _everything(model, other)
    with pytest.raises(CheckpointError, match=match):
        checkpoint.load(model, path, optimizer=other)
    assert _everything(model, other) == before


def test_an_optimizer_of_another_model_is_not_saved(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"2 of the optimizer's 2 .*optim.sync"):
        checkpoint.save(nn.Linear(2, 2), path, optimizer=_adam(nn.Linear(2, 2)))
    assert list(path.parent.iterdir()) == []


# Writing.


@contextlib.contextmanager
def _umask(mask: int) -> Iterator[None]:
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)


def test_permissions_are_those_of_the_old_file_or_of_any_new_one(path: Path) -> None:
    model = nn.Linear(1, 1)
    with _umask(0o027):
        checkpoint.save(model, path)
    assert path.stat().st_mode & 0o777 == 0o640
    path.chmod(0o604)
    checkpoint.save(model, path)
    assert path.stat().st_mode & 0o777 == 0o604


def test_a_link_stays_and_its_target_is_replaced(path: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    target = tmp_path / "folder" / "target.pt"
    path.symlink_to(target)
    checkpoint.save(nn.Linear(1, 1), path)
    assert path.is_symlink()
    assert sorted(tmp_path.rglob("*.pt")) == [target, path]
    checkpoint.load(nn.Linear(1, 1), target)


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_after_an_exception_the_old_file_is_whole_and_no_other_is_left(
    path: Path, where: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(_net(), path)
    before = path.read_bytes()

    def fail(*args: Any) -> Any:
        raise error

    owner: Any = Sealing if where == "write" else os
    monkeypatch.setattr(owner, where, fail)
    with pytest.raises((type(error), RuntimeError)):
        checkpoint.save(_grown(), path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_the_data_is_on_the_disk_before_the_name_and_the_name_before_the_end(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        seen.append(f"fsync {'folder' if name == str(path.parent) else 'file'}")
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        seen.append(f"replace {source.parent == target.parent} {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    checkpoint.save(_net(), path)
    assert seen == ["fsync file", "replace True net.pt", "fsync folder"]


def test_what_a_killed_writer_left_is_removed_by_the_next_one_and_nothing_else(path: Path) -> None:
    left, live = (path.with_name(f".net.pt.{digit * 16}.tmp") for digit in "ab")
    other, own = path.with_name(".other.pt.aaaaaaaaaaaaaaaa.tmp"), path.with_name(".net.pt.my.tmp")
    for file in (left, live, other, own):
        file.write_bytes(b"half")
    with open(live, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        checkpoint.save(_net(), path)
    assert set(path.parent.iterdir()) == {path, live, other, own}


def test_a_new_file_that_another_process_removed_is_made_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = fcntl.flock, []

    def removed_before_it_was_locked(descriptor: int, flags: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            os.unlink(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor, flags)

    monkeypatch.setattr(fcntl, "flock", removed_before_it_was_locked)
    checkpoint.save(_net(), path)
    checkpoint.load(_net(), path)
    assert len(calls) == 2
    assert list(path.parent.iterdir()) == [path]


def test_a_file_system_without_locks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError("no locks")

    left = path.with_name(f".net.pt.{'a' * 16}.tmp")
    left.touch()
    monkeypatch.setattr(fcntl, "flock", refuse)
    checkpoint.save(_net(), path)
    checkpoint.load(_net(), path)
    assert set(path.parent.iterdir()) == {path, left}


#: Forks a writer that saves two models by turns, kills it, and checks the file; again and again.
KILLING = """
import glob, hashlib, json, os, random, signal, sys, time
import torch
from torch import nn
from kasmina_fx import checkpoint, kasmina_layers, kasminify
from kasmina_fx.testing import graft

path, kills = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
random.seed(0)


def network():
    net = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))
    return kasminify(net, num_seeds=8, compile=False)


def digest(model):
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        data = value.numpy().tobytes() if torch.is_tensor(value) else repr(value).encode()
        found.update(name.encode() + data)
    return found.hexdigest()


def write_for_ever(models, turn):
    while True:
        checkpoint.save(models[turn % 2], path, metadata={"turn": turn % 2})
        turn += 1


models = [network(), network()]
for seeds, model in zip(([0, 1, 2], [5]), models):
    for layer in kasmina_layers(model).values():
        graft(layer, seeds, "mlp", 0.5)
expected = [digest(model) for model in models]
target = network()
checkpoint.save(models[0], path, metadata={"turn": 0})
start = time.perf_counter()
checkpoint.save(models[0], path, metadata={"turn": 0})
once = time.perf_counter() - start
loaded, interrupted = [0, 0], 0
for turn in range(1, kills + 1):
    writer = os.fork()
    if writer == 0:
        try:
            write_for_ever(models, turn)
        finally:
            os._exit(1)
    time.sleep(random.uniform(0, 4 * once))
    os.kill(writer, signal.SIGKILL)
    _, status = os.waitpid(writer, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    interrupted += bool(glob.glob(os.path.join(glob.escape(os.path.dirname(path)), ".*.tmp")))
    which = checkpoint.load(target, path)["turn"]
    assert digest(target) == expected[which]
    loaded[which] += 1
checkpoint.save(models[0], path)
print(json.dumps({"loaded": loaded, "interrupted": interrupted, "once": once}))
"""


@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_a_writer_killed_at_any_moment_leaves_the_old_or_the_new_file_whole(
    path: Path, kills: int
) -> None:
    command = [sys.executable, "-c", KILLING, str(path), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert sum(found["loaded"]) == kills
    assert found["interrupted"] >= kills // 5, found  # else the kills have missed the writing
    assert kills < 100 or min(found["loaded"]) > 0, found
    assert list(path.parent.iterdir()) == [path]


def test_a_checkpoint_beside_a_busy_controller_is_of_one_moment(tmp_path: Path) -> None:
    layer = KasminaLayer(nn.Linear(8, 64), 64, reserve=64)
    done = threading.Event()

    def control() -> None:
        while not done.is_set():
            with layer.transaction():
                layer.reset(range(64))
                layer.request_germination(range(64))
                layer.advance(range(64), SeedLifecycle.TRAINING)

    controller = threading.Thread(target=control)
    controller.start()
    try:
        for _ in range(40):
            checkpoint.save(layer, tmp_path / "model.ckpt")  # refuses a state that is torn
    finally:
        done.set()
        controller.join()
    checkpoint.load(layer, tmp_path / "model.ckpt")

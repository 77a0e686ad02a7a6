"""Entries of a checkpoint that are not this model's are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import (
    Number,
    bits,
    contents_of,
    everything,
    forge,
    grown,
    network,
    refused,
    saved_contents,
)
from torch import Tensor, nn

from kasmina_fx import (
    LayoutMismatch,
    SeedLifecycle,
    checkpoint,
    kasmina_layers,
    kasminify,
)
from kasmina_fx.blueprints import register
from kasmina_fx.errors import CheckpointError
from kasmina_fx.seeds.extra_state import unpacked

STATE, ALPHA = "3.kasmina.state.state_tensor", "3.kasmina.state.alpha"
FAULTS = "3.kasmina.telemetry.faults"
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
    "a count that is NaN": (_put(TELEMETRY, (0, 1), float("nan")), "counts below 0, or not finite"),
    "a count below 0": (_put(TELEMETRY, (0, 1), -5.0), "counts below 0"),
    "a negative variance": (_put(TELEMETRY, (2, 1), -1.0), "squares below 0"),
    "NaN faults": (_put(FAULTS, 1, float("nan")), "faults below 0, or not finite"),
    "negative faults": (_put(FAULTS, 1, -100.0), "faults below 0"),
    "negative losses": (_put(FAULTS.replace("faults", "previous_loss"), 1, -1.0), "squares below"),
    "a host weight of another layer": (
        lambda d: d.update({"3.kasmina.reference_weight": torch.zeros(3, 3)}),
        "reference_weight is",
    ),
    "no telemetry": (_without(TELEMETRY), "lacks 'kasmina.telemetry.accumulated'"),
    "another moment": (_put(STATE, (1, 2), 5), "seal is not that of"),
    "extra state of another kind": (_become(EXTRA, lambda e: 7), "_extra_state holds 7"),
    "extra state of floats": (
        _become(EXTRA, lambda e: torch.ones(2)),
        r"_extra_state is torch.float32 \(2,\)",
    ),
    "extra state that is no JSON": (
        _become(EXTRA, lambda e: torch.tensor([123, 1], dtype=torch.uint8)),
        "malformed",
    ),
    "extra state that is a list": (
        _become(EXTRA, lambda e: torch.tensor(list(b"[1]"), dtype=torch.uint8)),
        r"_extra_state holds \[1\]",
    ),
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


@pytest.mark.parametrize("target", [grown, network], ids=["into grown", "into fresh"])
@pytest.mark.parametrize(("edit", "match"), EDITED.values(), ids=EDITED)
def test_edited_entries_are_refused_and_nothing_changes(
    path: Path, edit: Callable[[dict[str, Any]], None], match: str, target: Callable[[], Any]
) -> None:
    contents = saved_contents()
    contents["model"][EXTRA] = unpacked(contents["model"][EXTRA])  # as it was in earlier releases
    edit(contents["model"])
    forge(path, contents)
    model = target()
    before = everything(model)
    with pytest.raises(LayoutMismatch, match=f"^3: .*{match}"):
        checkpoint.load(model, path)
    assert everything(model) == before
    with pytest.raises(LayoutMismatch, match=f"^3: .*{match}"):
        model.load_state_dict(contents["model"])
    assert everything(model) == before


@pytest.mark.parametrize("num_seeds", [1, 2, 5])
def test_another_number_of_seeds_is_refused_with_the_numbers(path: Path, num_seeds: int) -> None:
    checkpoint.save(grown(), path)
    model = network(num_seeds)
    before = everything(model)
    with pytest.raises(LayoutMismatch, match=r"^0: .*\[dim=-1 runs=2x4\+2x3\].*num_seeds"):
        checkpoint.load(model, path)
    assert everything(model) == before


def test_a_shared_layer_is_checked_by_each_of_its_names(path: Path) -> None:
    def net() -> Any:
        shared = nn.Linear(4, 4)
        return kasminify(nn.Sequential(shared, nn.GELU(), shared), num_seeds=4, compile=False)

    checkpoint.save(net(), path)
    contents, model = contents_of(path), net()
    contents["model"]["2.kasmina.state.alpha"] = torch.full((4,), 2.0)
    forge(path, contents)
    before = everything(model)
    with pytest.raises(LayoutMismatch, match="alpha"):
        checkpoint.load(model, path)
    assert everything(model) == before


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t.to("meta"), "on the meta device"),
        (lambda t: t.to_sparse(), "(no dense tensor|weights_only)"),
    ],
)
def test_tensors_without_plain_values_are_refused_before_anything_changes(
    path: Path, change: Callable[[Tensor], Tensor], why: str
) -> None:
    contents = saved_contents()
    contents["model"]["3.weight"] = change(contents["model"]["3.weight"])
    forge(path, contents)
    refused(path, why)  # torch 2.11 refuses a sparse one by itself


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
    contents = saved_contents()
    edit(contents["model"])
    forge(path, contents)
    refused(path, match)


def test_names_may_differ_where_it_is_not_strict(path: Path) -> None:
    source, fresh = grown(), network()
    checkpoint.save(source, path)
    contents = contents_of(path)
    contents["model"]["other"] = contents["model"].pop("3.bias")
    forge(path, contents)
    bias = fresh[3].bias.detach().clone()
    checkpoint.load(fresh, path, strict=False)
    assert torch.equal(fresh[3].bias, bias)
    assert torch.equal(fresh[3].weight, source[3].weight)
    contents["model"]["3.weight"] = torch.zeros(1)
    forge(path, contents)
    refused(path, "3.weight", strict=False)


def test_a_kasminified_file_and_a_plain_model(path: Path) -> None:
    checkpoint.save(grown(), path)
    plain: Any = nn.Sequential(nn.Linear(5, 14), nn.LayerNorm(14), nn.GELU(), nn.Linear(14, 6))
    with pytest.raises(CheckpointError, match=r"unknown \['0.kasmina.*kasminify the model"):
        checkpoint.load(plain, path)
    checkpoint.save(plain, path)
    model = grown()
    seeds = bits(kasmina_layers(model)["0"].kasmina.state_dict())
    checkpoint.load(model, path)
    assert torch.equal(model[0].weight, plain[0].weight)
    assert bits(kasmina_layers(model)["0"].kasmina.state_dict()) == seeds


def test_what_could_not_be_loaded_is_not_saved(path: Path) -> None:
    model = grown()
    checkpoint.save(model, path)
    before = path.read_bytes()
    layer = kasmina_layers(model)["0"]
    layer.state.set_rows(2, lifecycle_state=SeedLifecycle.GRAFTING, blueprint_id=99)
    with pytest.raises(LayoutMismatch, match=r"seeds \[2\]"):
        checkpoint.save(model, path)
    assert path.read_bytes() == before


class _Custom(nn.Module):
    def get_extra_state(self) -> Any:
        return Number.ONE

    def set_extra_state(self, state: Any) -> None:
        self.state = state


def test_extra_state_that_would_run_code_is_refused_unless_it_is_allowed(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Number.*add_safe_globals"):
        checkpoint.save(_Custom(), path)
    assert list(path.parent.iterdir()) == []
    model = _Custom()
    with torch.serialization.safe_globals([Number]):
        checkpoint.save(model, path)
        checkpoint.load(model, path)
    assert model.state is Number.ONE

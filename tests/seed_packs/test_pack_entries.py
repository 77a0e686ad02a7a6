"""Packs are in state dicts and checkpoints, go where the model goes, and bad ones are refused."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pack_cases import X, first, output, outputs, plain, small, with_packs
from torch import Tensor, nn
from torch.optim import AdamW

import kasmina_fx
from kasmina_fx import LayoutMismatch, host_state_dict, unkasminify
from kasmina_fx.seeds.extra_state import packed, unpacked

EXTRA = "0.kasmina._extra_state"


def same(model: nn.Module, wanted: dict[str | None, Tensor]) -> bool:
    found = outputs(model)
    return found.keys() == wanted.keys() and all(found[n].equal(wanted[n]) for n in wanted)


def by_state_dict(model: nn.Module, _: Path) -> nn.Module:
    other, buffer = small(), io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    return other


def by_checkpoint(model: nn.Module, folder: Path) -> nn.Module:
    other = small(reserve=8)
    kasmina_fx.checkpoint.save(model, folder / "net.pt")
    kasmina_fx.checkpoint.load(other, folder / "net.pt")
    return other


def by_copy(model: nn.Module, _: Path) -> nn.Module:
    return copy.deepcopy(model)


def by_pickle(model: nn.Module, _: Path) -> nn.Module:
    found: nn.Module = pickle.loads(pickle.dumps(model))
    return found


def to_a_model_with_other_packs(model: nn.Module, _: Path) -> nn.Module:
    other = with_packs()
    kasmina_fx.packs(other).capture("other")
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize(
    "carry", [by_state_dict, by_checkpoint, by_copy, by_pickle, to_a_model_with_other_packs]
)
@pytest.mark.parametrize("active", ["a", None])
def test_packs_go_with_their_model(
    carry: Callable[[nn.Module, Path], nn.Module], active: str | None, tmp_path: Path
) -> None:
    model = with_packs()
    mine, wanted = kasmina_fx.packs(model), outputs(model)
    mine.activate(active)
    other = carry(model, tmp_path)
    found = kasmina_fx.packs(other)
    assert (found.names(), found.active) == (["a", "b", "c"], active)
    assert same(other, wanted)
    assert same(model, wanted)


def test_a_checkpoint_with_an_optimizer_goes_on(tmp_path: Path) -> None:
    model = with_packs()
    optimizer = AdamW(model.parameters())
    output(model)
    kasmina_fx.checkpoint.save(model, tmp_path / "net.pt", optimizer=optimizer)
    kasmina_fx.checkpoint.load(model, tmp_path / "net.pt", optimizer=optimizer)
    assert kasmina_fx.packs(model).active == "c"


def test_a_plain_checkpoint_leaves_packs_as_they_are() -> None:
    model = with_packs()
    wanted = outputs(model)
    model.load_state_dict(plain().state_dict())
    assert same(model, wanted)
    assert host_state_dict(model).keys() == plain().state_dict().keys()


def test_a_state_dict_without_packs_takes_them_away() -> None:
    model = with_packs()
    model.load_state_dict(small().state_dict())
    assert kasmina_fx.packs(model).names() == []
    assert output(model).equal(plain()(X))


def test_nothing_else_meets_packs_that_are_put_away() -> None:
    model = with_packs()
    kasmina_fx.packs(model).activate(None)
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    assert not [name for name in names if "packs" in name]
    assert len([name for name in model.state_dict() if ".packs." in name]) == 2 * (4 + 2 + 2)
    unkasminify(model)
    assert model(X).equal(plain()(X))


def test_packs_have_the_models_dtype() -> None:
    model = with_packs()
    wanted = outputs(model)
    model.double()
    found = dict.fromkeys(wanted)
    for name in found:
        kasmina_fx.packs(model).activate(name)
        out = output(model, X.double())
        assert out.dtype == torch.float64
        torch.testing.assert_close(out.float(), wanted[name])
    saved = model.state_dict()
    assert saved["0.kasmina.packs.0.mlp_run0.up/weight"].dtype == torch.float64
    single = small()
    single.load_state_dict(saved)
    assert single.state_dict()["0.kasmina.packs.0.mlp_run0.up/weight"].dtype == torch.float32


def edited(change: Callable[[Any], object]) -> Callable[[dict[str, Any]], None]:
    """A state dict with another description of its packs."""

    def edit(saved: dict[str, Any]) -> None:
        extra = unpacked(saved[EXTRA])
        change(extra["packs"])
        saved[EXTRA] = packed(extra)

    return edit


def put(saved: dict[str, Any], name: str, value: Any) -> None:
    saved[f"0.kasmina.packs.{name}"] = value


BAD: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "lost": (lambda s: s.pop("0.kasmina.packs.0.mlp_run0.up/weight"), "lacks"),
    "strange": (lambda s: put(s, "9.mlp_run0.up", torch.zeros(1)), "no pack has"),
    "no tensor": (lambda s: put(s, "0.mlp_run0.up/weight", 3), "takes a tensor"),
    "shape": (
        lambda s: put(s, "0.mlp_run0.up/weight", torch.zeros(2, 1)),
        r"the pack 'a': .*is \(2, 1\)",
    ),
    "one name": (edited(lambda p: p["kept"][0].update(name="b")), "name of its own"),
    "no name": (edited(lambda p: p["kept"][0].update(name="")), "name of its own"),
    "in use": (edited(lambda p: p.update(active="a")), "not put away are"),
    "seeds": (edited(lambda p: p["kept"][0].update(seeds=[0, 9])), "the layer has 4"),
    "twice": (edited(lambda p: p["kept"][0].update(seeds=[0, 0])), "the layer has 4"),
    "floats": (edited(lambda p: p["kept"][0].update(seeds=[0.0, 1.5])), "no ints"),
    "alpha": (edited(lambda p: p["kept"][0].update(alpha=[0.5, 3.0])), "alpha"),
    "rows": (edited(lambda p: p["kept"][0]["rows"][0].__setitem__(0, 99)), "out of range"),
    "ids": (edited(lambda p: p["kept"][0]["rows"][0].__setitem__(1, 77)), "in no bank"),
    "slots": (edited(lambda p: p["kept"][0]["banks"].update(mlp_run0=[1, 1])), "each once"),
    "bank": (edited(lambda p: p["kept"][0]["banks"].update(gone=[1])), "no banks"),
    "no dict": (edited(lambda p: p["kept"].append(3)), "malformed"),
}


@pytest.mark.parametrize(("change", "match"), BAD.values(), ids=BAD)
def test_packs_that_could_not_be_are_refused(
    change: Callable[[dict[str, Any]], object], match: str
) -> None:
    saved, other = with_packs().state_dict(), with_packs()
    wanted = outputs(other)
    change(saved)
    with pytest.raises(LayoutMismatch, match=match):
        other.load_state_dict(saved)
    assert same(other, wanted)


def test_packs_of_one_layer_alone_are_found_out() -> None:
    model, saved = with_packs(), small().state_dict()
    first(model).load_state_dict(
        {key.removeprefix("0."): value for key, value in saved.items() if key.startswith("0.")}
    )
    with pytest.raises(LayoutMismatch, match="parts of two checkpoints"):
        kasmina_fx.packs(model).activate(None)

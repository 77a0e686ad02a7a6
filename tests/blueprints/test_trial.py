"""The registry of blueprints, and what may enter a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from blueprint_cases import BUILTINS, user
from torch import Tensor, nn
from torch.nn import functional as F

from kasmina_fx import (
    InvalidArgument,
    InvalidBlueprint,
    InvalidType,
    KasminaError,
    KasminaLayer,
    UnknownBlueprint,
    reference,
)
from kasmina_fx.blueprints import Blueprint, ModuleBlueprint, lookup, names, register
from kasmina_fx.testing import graft


def test_the_built_ins_are_registered() -> None:
    assert names()[:5] == BUILTINS
    assert [lookup(name).kind for name in BUILTINS] == list(BUILTINS)


@pytest.mark.parametrize(
    ("asked", "hint"),
    [("lroa", "lora"), ("affin", "affine"), ("botleneck", "bottleneck"), ("MLP", "known: mlp")],
)
def test_an_unknown_name_is_refused_with_the_closest(asked: str, hint: str) -> None:
    with pytest.raises(UnknownBlueprint, match=rf"'{asked}'.*{hint}") as caught:
        lookup(asked)
    assert isinstance(caught.value, ValueError)


def test_names_are_made_up_from_what_is_registered() -> None:
    assert register(user) == "user"
    assert register(nn.Tanh()) == "Tanh"
    assert register(nn.Tanh()) == "Tanh-2"
    assert register(lambda size: nn.Tanh()) == "lambda"
    assert names()[5:] == ("user", "Tanh", "Tanh-2", "lambda")


@pytest.mark.parametrize("name", ["", "1st", "a b", "a@b", "a*2", "a:shared", "a.b", "a/b", "-a"])
def test_a_malformed_name_is_refused(name: str) -> None:
    before = names()
    with pytest.raises(InvalidArgument, match="name"):
        register(user, name=name)
    assert names() == before


def test_a_name_is_taken_once() -> None:
    assert register(user, name="mine") == "mine"
    assert register(user, name="mine") == "mine"  # the same object
    assert register(user) == "mine"
    assert register(user, name="other") == "other"
    for taken in ("mine", "mlp"):
        with pytest.raises(InvalidArgument, match=f"'{taken}' is taken"):
            register(lambda size: nn.Tanh(), name=taken)
    blueprint = lookup("mine")
    assert isinstance(blueprint, ModuleBlueprint)
    assert blueprint.factory is user


class Doubled(Blueprint):
    kind = "doubled"

    def module(self, size: int) -> nn.Module:
        return nn.Softplus(beta=2)

    def stacked(self, params: Sequence[Tensor], chunks: Tensor, dim: int) -> Tensor:
        return F.softplus(chunks, beta=2)

    def accepts(self, size: int) -> bool:
        return size != 2


def test_a_blueprint_of_the_users_own_class() -> None:
    mine = Doubled()
    layer = KasminaLayer(nn.Linear(4, 8), 3)  # 3, 3, 2
    with pytest.raises(InvalidBlueprint, match=r"2 features.*not accept"):
        layer.register_blueprint(mine)
    with pytest.raises(InvalidArgument, match="'doubled', not 'other'"):
        register(mine, name="other")
    assert register(mine) == register(mine) == register(mine, name="doubled") == "doubled"
    with pytest.raises(InvalidArgument, match="taken"):
        register(Doubled())
    graft(layer, [0, 1], "doubled", 0.5)
    x = torch.randn(3, 4)
    torch.testing.assert_close(layer(x), reference.forward(layer, x))
    assert not torch.equal(layer(x)[:, :6], layer.base(x)[:, :6])
    with pytest.raises(UnknownBlueprint, match="2 features"):
        layer.request_germination(2, "doubled")


def _layer() -> KasminaLayer:
    return KasminaLayer(nn.Linear(4, 10), 3, layer_id="fc")  # 4, 3, 3


class Counting(nn.Module):
    """Writes to a buffer in train mode, through its own forward."""

    calls: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return x


class Fixed(nn.Module):
    """Returns what it is told to."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(x)


def _raising(size: int) -> nn.Module:
    raise OSError(f"no weights for {size}")


UNFIT: dict[str, tuple[Any, type[Exception], str]] = {
    "wider": (lambda size: nn.Linear(size, size + 1), InvalidBlueprint, r"\(3, 4\) into \(3, 5\)"),
    "reduced": (lambda size: Fixed(lambda x: x.sum()), InvalidBlueprint, "into"),
    "broadcast": (lambda size: Fixed(lambda x: x[:1]), InvalidBlueprint, "into"),
    "transposed": (lambda size: Fixed(lambda x: x.mT), InvalidBlueprint, "into"),
    "another dtype": (
        lambda size: Fixed(lambda x: x.double()),
        InvalidBlueprint,
        "float32 into .*float64",
    ),
    "a tuple": (lambda size: Fixed(lambda x: (x, x)), InvalidBlueprint, "tuple"),
    "None": (lambda size: Fixed(lambda x: None), InvalidBlueprint, "NoneType"),
    "batch norm": (lambda size: nn.BatchNorm1d(size), InvalidBlueprint, "buffer"),
    "a counter": (Counting, InvalidBlueprint, "train mode writes to its buffer 'calls'"),
    "a factory that raises": (_raising, InvalidBlueprint, "OSError: no weights for 4"),
    "a factory of a tensor": (lambda size: torch.zeros(size), InvalidBlueprint, "Tensor.*Module"),
    "a factory of None": (lambda size: None, InvalidBlueprint, "NoneType.*Module"),
    "a class that takes no size": (nn.Tanh, InvalidBlueprint, "TypeError"),
    "a module that fits no chunk": (nn.Linear(5, 5), InvalidBlueprint, "features"),
    "a number": (3, InvalidType, "int"),
    "None itself": (None, InvalidType, "NoneType"),
    "a tensor": (torch.zeros(3), InvalidType, "Tensor"),
    "an unknown name": ("mpl", UnknownBlueprint, "mlp"),
}


@pytest.mark.parametrize(("blueprint", "error", "message"), UNFIT.values(), ids=UNFIT)
@pytest.mark.parametrize("name", [None, "mine"])
def test_what_can_not_be_a_blueprint_is_refused_and_nothing_is_registered(
    blueprint: Any, error: type[Exception], message: str, name: str | None
) -> None:
    layer = _layer()
    before, random = names(), torch.get_rng_state()
    with pytest.raises(error, match=message) as caught:
        layer.register_blueprint(blueprint, name=name)
    assert isinstance(caught.value, KasminaError)
    if error is InvalidBlueprint:
        assert "Supported are modules" in str(caught.value)
        assert "on a chunk of" in str(caught.value)
    assert names() == before
    assert layer.kasmina.blueprints == {}
    assert not layer.kasmina.bank_list()
    assert torch.equal(torch.get_rng_state(), random)


def test_a_name_that_is_unfit_for_a_layer_is_refused_at_germination() -> None:
    register(lambda size: nn.Linear(size, size + 1), name="wider")
    layer = _layer()
    with pytest.raises(KasminaError, match=r"fc: .*'wider'.*\(3, 4\) into \(3, 5\)"):
        layer.request_germination(0, "wider")
    assert not layer.kasmina.bank_list()
    assert layer.state.get_state_distribution() == {"DORMANT": 3}


@pytest.mark.parametrize(
    ("module", "works"),
    [
        (nn.BatchNorm1d(3, track_running_stats=False), True),
        (nn.LayerNorm(3), True),
        (nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 3)), True),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), True),
        (nn.Identity(), True),
        (nn.LSTM(3, 3), False),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap's, for weight_norm
def test_modules_of_torch_as_blueprints(module: nn.Module, works: bool) -> None:
    layer = _layer()
    if not works:
        with pytest.raises(InvalidBlueprint):
            layer.register_blueprint(module)
        return
    graft(layer, [1, 2], layer.register_blueprint(module, name="mine"), 0.5)
    x = torch.randn(5, 4)
    torch.testing.assert_close(layer(x), reference.forward(layer, x))
    layer(x).sum().backward()


def test_the_module_that_was_given_is_neither_run_nor_changed_nor_held_on_to() -> None:
    layer = _layer()
    mine = nn.Linear(3, 3).double()
    calls: list[int] = []
    before = {name: t.clone() for name, t in mine.state_dict().items()}
    graft(layer, 1, layer.register_blueprint(mine), 1.0)
    mine.register_forward_hook(lambda *args: calls.append(1))
    layer(torch.randn(2, 4)).sum().backward()
    assert calls == []
    assert mine.weight.grad is None
    assert all(torch.equal(t, before[name]) for name, t in mine.state_dict().items())
    assert mine.weight.dtype == torch.float64
    ours = {t.data_ptr() for t in layer.parameters()}
    assert ours.isdisjoint(t.data_ptr() for t in mine.parameters())


def test_a_factory_is_asked_for_every_chunk_size_and_seeds_differ() -> None:
    sizes: set[int] = set()

    def factory(size: int) -> nn.Module:
        sizes.add(size)
        return nn.Linear(size, size)

    layer = _layer()
    layer.register_blueprint(factory, name="mine")
    assert sizes == {3, 4}
    graft(layer, [0, 1, 2], "mine", 1.0)
    held = [layer.bank_of(seed) for seed in (1, 2)]
    weights = [bank.slot_tensors(slot)["weight"] for bank, slot in filter(None, held)]
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_integer_buffers_keep_their_dtype_and_floats_follow_the_host(dtype: torch.dtype) -> None:
    layer = KasminaLayer(nn.Linear(4, 9).to(dtype), 3)
    graft(layer, 0, register(user, name="user"), 0.5)
    bank = layer.kasmina.bank_list()[0]
    dtypes = {name: t.dtype for name, t in bank.slot_tensors(0).items()}
    assert dtypes == {"gain": dtype, "frozen": dtype, "powers": torch.int64, "floor": dtype}
    flags = {name: t.requires_grad for name, t in bank.named_parameters()}
    assert flags == {"gain": True, "frozen": False, "powers": False, "floor": False}
    assert layer(torch.randn(2, 4, dtype=dtype)).dtype == dtype


def test_a_stacked_form_that_changes_shape_or_dtype_is_refused() -> None:
    class Narrow(Blueprint):
        kind = "narrow"

        def module(self, size: int) -> nn.Module:
            return nn.Linear(size, size)

        def stacked(self, params: Sequence[Tensor], chunks: Tensor, dim: int) -> Tensor:
            return chunks.narrow(dim, 0, 1).double()

    layer = KasminaLayer(nn.Linear(4, 6), 3)
    with pytest.raises((InvalidBlueprint, UnknownBlueprint), match=r"its stacked\(\) turns"):
        layer.register_blueprint(Narrow())


@pytest.mark.parametrize("size", [2, 3, 5, 7])
def test_no_dim_of_a_trial_is_taken_for_another(size: int) -> None:
    layer = KasminaLayer(nn.Conv2d(1, 2 * size, 1), 2)
    with pytest.raises(InvalidBlueprint, match="shapes cannot be multiplied"):
        layer.register_blueprint(lambda n: nn.Linear(n, n), name=f"linear_for_conv_{size}")


class _OfTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        _batch, _tokens, _size = x.shape
        return x - x.mean(1, keepdim=True)


def test_a_linears_output_may_have_any_rank() -> None:
    layer = KasminaLayer(nn.Linear(2, 4), 2)
    layer.register_blueprint(lambda n: _OfTokens(), name="of_tokens")
    graft(layer, [0], "of_tokens", alpha=1.0)
    y = layer.base(x := torch.randn(3, 5, 2))
    torch.testing.assert_close(layer(x)[..., :2], (y - y.mean(1, keepdim=True))[..., :2])
    with pytest.raises(InvalidBlueprint, match="not enough values to unpack"):
        KasminaLayer(nn.Conv1d(1, 4, 1), 2).register_blueprint(
            lambda n: nn.Sequential(nn.Flatten(), _OfTokens()), name="of_tokens_flat"
        )

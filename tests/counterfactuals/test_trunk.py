"""What comes before the first seed that is off is computed once, where it can be."""

from __future__ import annotations

from typing import Any

import torch
from counterfactual_cases import BATCHES, Noisy, loss_fn
from pack_cases import grow, small
from torch import Tensor, nn

import kasmina_fx
from kasmina_fx import counterfactual, kasminify
from kasmina_fx.counterfactuals.trunk import Trunk


def counted(model: nn.Sequential) -> list[str]:
    """Names of the children that are called, as they are."""
    calls: list[str] = []
    for name, child in model.named_children():
        child.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


def deep() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Sequential(nn.Linear(8, 8), nn.Tanh()),
        nn.Linear(8, 8),
    )  # fmt: skip
    model = kasminify(made, num_seeds=4, compile=False)
    grow(model, [0, 1], "mlp")
    return model


def test_what_comes_before_a_group_is_run_once() -> None:
    model = deep()
    calls = counted(model)
    report = counterfactual(model, BATCHES[0], loss_fn, {"last": "3", "middle": "2.0"})
    # All on; then from child 3, from child 2, and, with all off, from child 0.
    assert calls == ["0", "1", "2", "3", "3", "2", "3", "0", "1", "2", "3"]
    model = deep()
    for name, layer in (("last", "3"), ("middle", "2.0")):
        with kasmina_fx.seeds_off(model, layer), torch.no_grad():
            assert report[name].loss == float(loss_fn(model, BATCHES[0]))


def test_an_input_that_was_written_to_is_not_used_again() -> None:
    model = deep()
    trunk = Trunk.of(model)
    assert trunk is not None
    x = torch.randn(2, 8)
    with torch.no_grad():
        wanted = trunk.forward(x)
        trunk.start_at(1)  # ReLU wrote to its own input
        assert trunk.forward(x).equal(wanted)
        assert trunk.skipped == 0
        trunk.start_at(3)
        assert trunk.forward(x).equal(wanted)
        assert trunk.skipped == 3
        trunk.start_at(3)
        other = torch.randn(2, 8)
        assert trunk.forward(other).equal(model(other))  # another input
        assert trunk.forward(x).equal(wanted)  # more calls than were kept
        assert trunk.skipped == 3


class Pair(nn.Module):
    """Hands a tuple on."""

    def forward(self, x: Any) -> tuple[Tensor, Tensor]:
        return (x, x) if isinstance(x, Tensor) else (x[0], x[1])


class Sum(nn.Module):
    """Takes a tuple."""

    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        return x[0] + x[1]


def test_inputs_that_are_no_tensors_are_made_again() -> None:
    model = nn.Sequential(Pair(), Sum(), nn.Linear(8, 8))
    trunk = Trunk.of(model)
    assert trunk is not None
    x = torch.randn(2, 8)
    with torch.no_grad():
        wanted = trunk.forward((x, x))  # and nothing is kept of it
        trunk.start_at(2)
        assert trunk.forward((x, x)).equal(wanted)
        assert trunk.skipped == 0
        trunk.keep()
        trunk.forward(x)
        trunk.start_at(1)
        assert trunk.forward(x).equal(wanted)
        assert trunk.skipped == 0


def test_only_plain_rows_of_modules_have_a_trunk() -> None:
    model = small()
    assert Trunk.of(model) is not None
    assert Trunk.of(Noisy()) is None
    assert Trunk.of(torch.compile(model)) is None  # type: ignore[arg-type]  # what it returns
    assert Trunk.of(small(compile=True)) is None
    assert Trunk.of(nn.Sequential(nn.Linear(2, 2))).first_of([]) == 0  # type: ignore[union-attr]  # there is one
    model.__dict__["forward"] = model.forward
    assert Trunk.of(model) is None

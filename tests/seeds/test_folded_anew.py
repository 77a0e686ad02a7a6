"""A folded model never runs with what was before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from folded_cases import (
    CallsWithOthers,
    X,
    assert_as_reference,
    by_a_write_to_a_blueprint,
    by_an_optimizer,
    by_other_memory,
    evaluated,
    finished,
    fossils,
    held,
    is_folded,
)
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call

from kasmina_fx import (
    host_state_dict,
)

# Never with what was before.


class Through(torch.optim.Optimizer):
    """Writes through ``.data``, as many do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(0.25)


def by_one_that_writes_through_data(model: Any) -> None:
    Through(model.parameters()).step()


def by_a_file(model: Any) -> None:
    model.load_state_dict({k: v + 0.5 for k, v in host_state_dict(model).items()})


def by_other_parameters(model: Any) -> None:
    new = {k: v + 0.5 for k, v in host_state_dict(model).items()}
    model.load_state_dict(new, assign=True)


def by_another_bias(model: Any) -> None:
    model[0].bias = nn.Parameter(torch.ones(12))


def by_no_bias(model: Any) -> None:
    model[0].bias = None


def by_another_alpha(model: Any) -> None:
    model[0].set_alpha([0, 2], 0.1)


def by_a_move(model: Any) -> None:
    model.double().float()
    model[0].weight.data.add_(0.25)  # which alone would not be seen


def by_a_reset(model: Any) -> None:
    model[0].reset([0])


@pytest.mark.parametrize(
    "change",
    [
        by_an_optimizer,
        by_one_that_writes_through_data,
        by_a_file,
        by_other_parameters,
        by_other_memory,
        by_another_bias,
        by_no_bias,
        by_a_write_to_a_blueprint,
        by_another_alpha,
        by_a_move,
        by_a_reset,
    ],
)
def test_what_changes_is_folded_anew(change: Callable[[Any], None]) -> None:
    model = finished()
    assert is_folded(model, X)
    before = evaluated(model, X)
    change(model)
    assert not torch.allclose(evaluated(model, X), before, atol=1e-3)
    assert_as_reference(model, X)
    assert is_folded(model, X)
    first = held(model)
    evaluated(model, X)
    assert held(model) is first  # nothing is made twice


def test_a_write_to_a_host_without_fossils_is_seen_as_it_is() -> None:
    model = finished()
    assert is_folded(model, X, "2")
    with torch.no_grad():
        model[2].weight.mul_(2)
    model[2].bias.data.add_(1)
    assert_as_reference(model, X)
    model[2].weight.data = model[2].weight.data * 2
    assert_as_reference(model, X)


def test_other_parameters_for_one_call() -> None:
    model = finished()
    assert is_folded(model, X)
    other = {"0.weight": nn.Parameter(torch.ones(12, 6)), "0.bias": torch.zeros(12)}
    with torch.no_grad():
        out = functional_call(model, other, (X,))
        model[0].weight.copy_(torch.ones(12, 6))
        model[0].bias.zero_()
    torch.testing.assert_close(out, evaluated(model, X))


def test_a_model_that_puts_other_parameters_into_its_layer() -> None:
    model = finished(CallsWithOthers(), lambda layer: fossils(layer, [0], "lora"))
    assert is_folded(model, X, "fc")
    assert_as_reference(model, X)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_transforms_traces_and_fakes_are_not_folded() -> None:
    model = finished()
    with torch.no_grad():
        mapped = torch.vmap(model)(X)
        assert held(model) is None
        torch.jit.trace(model, X, check_trace=False)
        torch.export.export(model, (X,))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            model(mode.from_tensor(X))
    assert held(model) is None
    torch.testing.assert_close(mapped, evaluated(model, X), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        torch.export.export(model, (X,)).module()(X), evaluated(model, X), atol=1e-6, rtol=1e-5
    )

"""Inductor pads small products on a GPU; here it is made to pad them on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.fx_passes import pad_mm
from torch._inductor.utils import fresh_inductor_cache
from torch.fx import Graph

from kasmina_fx import kasminify
from kasmina_fx._torch.padding import ViewsOfProducts

pytestmark = pytest.mark.untraced


@pytest.fixture
def padded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let Inductor pad what it can; return what it has padded."""
    asked: list[Any] = []

    def should_pad(_match: Any, *operands: Any) -> bool:
        asked.append([tuple(t.shape) for t in operands if isinstance(t, Tensor)])
        return True

    monkeypatch.setattr(pad_mm, "check_device", lambda *_: True)
    monkeypatch.setattr(pad_mm, "has_triton", lambda: True)
    monkeypatch.setattr(pad_mm, "_should_pad", should_pad)
    return asked


def whole(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return torch.bmm(torch.bmm(x, down), up)


def in_pieces(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    q, k, v = torch.bmm(x, down).split(2, -1)
    blend = torch.bmm(q, up[:, :2]) + torch.bmm(k, up[:, 2:4])
    out: Tensor = torch.bmm(blend, up[:, 2:].mT) + v[..., :1]
    return out


def backward_at_two_sizes(product: Callable[..., Tensor] = whole, width: int = 2) -> None:
    torch._dynamo.reset()
    down = torch.randn(3, 4, width, requires_grad=True)
    up = torch.randn(3, width, 4, requires_grad=True)
    run = torch.compile(product)
    for rows in (512, 700):
        x = torch.randn(3, rows, 4)
        torch._dynamo.mark_dynamic(x, 1)
        run(x, down, up).sum().backward()


@pytest.mark.parametrize(("product", "width"), [(whole, 2), (in_pieces, 6)])
def test_views_of_a_padded_product_have_its_strides(
    product: Callable[..., Tensor], width: int, padded: list[Any]
) -> None:
    with fresh_inductor_cache(), config.patch(joint_custom_post_pass=ViewsOfProducts()):
        backward_at_two_sizes(product, width)
    assert len(padded) > 1


def test_torch_alone_still_forgets_them(padded: list[Any]) -> None:
    """Where this fails the pass is needed no longer."""
    with fresh_inductor_cache(), pytest.raises(AssertionError, match="stride 2800==2048"):
        backward_at_two_sizes()


def test_what_is_no_view_of_a_cut_product_stays(padded: list[Any]) -> None:
    """All elements in one row: what is cut has gaps, and Inductor copies it."""

    def flat(x: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(x, weight).view(-1)

    torch._dynamo.reset()
    x, weight = torch.randn(512, 6), torch.randn(6, 7)
    with fresh_inductor_cache(), config.patch(joint_custom_post_pass=ViewsOfProducts()):
        out = torch.compile(flat)(x, weight)
    assert len(padded) == 1
    torch.testing.assert_close(out, flat(x, weight))


class Own(CustomGraphPass):
    """A pass of a user's."""

    def __call__(self, graph: Graph) -> None:
        """Do nothing."""

    def uuid(self) -> str:
        return "own"


def test_graphs_with_layers_are_looked_at_unless_a_user_has_a_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Graph] = []
    monkeypatch.setattr(ViewsOfProducts, "__call__", lambda _, graph: seen.append(graph))
    model: Any = kasminify(nn.Sequential(nn.Linear(5, 14)), num_seeds=2, telemetry=False)
    with fresh_inductor_cache():
        model(torch.randn(3, 5))
        assert len(seen) == 1
        torch._dynamo.reset()
        with config.patch(joint_custom_post_pass=Own()):
            model(torch.randn(3, 5))
    assert len(seen) == 1

"""The matmul lowering: how many nodes it writes, and what Inductor is told of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_cases import PLAIN, Convolution, OneLayer, dormant_graph, layer_of, wrapped
from torch import Tensor, nn
from torch._inductor.config import cpp

from kasmina_fx import capture, kasmina_layers, kasminify
from kasmina_fx._torch.inductor import inductor_option_names
from kasmina_fx.blueprints.builtin import BUILTINS
from kasmina_fx.blueprints.registry import register
from kasmina_fx.passes import run_passes
from kasmina_fx.passes.infra.small_loops import inductor_options
from kasmina_fx.passes.lower_blend import LowerBlend
from kasmina_fx.testing import graft

pytestmark = pytest.mark.untraced

#: Nodes that a bank may bring, its blueprint's among them.
MOST = 60
#: Of these are the same whatever the blueprint: a size and views of the output and of the result
#: (3), gather, whether its chunks are finite and faults are counted (5), guard and its outputs but
#: the parameters (4), reconstruct, mix and its output (2), notes.
AROUND = 17
INPUTS = {"rows": (3, 8), "texts": (3, 5, 8), "images": (3, 3, 5, 5)}


class TwoLinears(nn.Module):
    """A user's module."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.relu(self.up(x)))
        return out


def lowered(blueprint: str, shape: str, *, shared: bool = False, **options: Any) -> Any:
    """A layer with a bank, whose notes telemetry reads, after LowerBlend; and its new nodes."""
    x = torch.randn(INPUTS[shape], dtype=options.pop("dtype", torch.float32))
    net = Convolution() if shape == "images" else OneLayer(**options)
    model = wrapped(net, telemetry=True, targets=(nn.Linear, nn.Conv2d)).to(x.dtype)
    (layer,) = kasmina_layers(model).values()
    graft(layer, [0, 2], layer.register_blueprint(blueprint) if shared else blueprint)
    gm = capture(model, x)
    host = set(gm.graph.nodes)
    LowerBlend()(gm)
    return gm, [n for n in gm.graph.nodes if n not in host and n.op == "call_function"]


def check_nodes(blueprint: str, shape: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        _, mine = lowered(blueprint, shape, dtype=dtype)
        assert AROUND < len(mine) <= MOST
        # A shared one runs its blueprint a second time, for what must not train it, and chooses.
        _, ours = lowered(blueprint, shape, dtype=dtype, shared=True)
        assert len(ours) - AROUND <= 2 * (len(mine) - AROUND) + 3


@pytest.mark.parametrize("shape", INPUTS)
@pytest.mark.parametrize("blueprint", [b.kind for b in BUILTINS])
def test_a_bank_brings_at_most_sixty_nodes(blueprint: str, shape: str) -> None:
    check_nodes(blueprint, shape)


@pytest.mark.parametrize("shape", ["rows", "texts"])
def test_so_does_one_of_a_users_module_of_two_linears(shape: str) -> None:
    check_nodes(register(TwoLinears, name="two_linears_of_a_test"), shape)


def test_around_a_blueprint_the_nodes_are_always_the_same() -> None:
    _, mine = lowered("affine", "rows")
    # Of affine: 2 parameters, their views, product and sum, a size, a view there and one back.
    assert len(mine) == AROUND + 9


def test_banks_of_a_run_share_what_brings_them_back() -> None:
    alone = [len(lowered(kind, "rows")[1]) for kind in ("affine", "lora")]
    model = wrapped(OneLayer(), telemetry=True)
    for seed, kind in ((0, "affine"), (1, "lora")):
        graft(layer_of(model), [seed], kind)
    gm = capture(model, torch.randn(3, 8))
    host = set(gm.graph.nodes)
    LowerBlend()(gm)
    # A size, two views, mix, its output, and notes are there once.
    assert len(set(gm.graph.nodes) - host) == sum(alone) - 6


def test_loops_shorter_than_a_vector_are_left_to_plain_numbers() -> None:
    gm, _ = lowered("mlp", "rows", features=60)
    assert inductor_options(gm) == {"cpp.enable_loop_tail_vec": False}
    assert inductor_options(gm).keys() <= inductor_option_names()


def test_other_graphs_are_compiled_as_inductor_would() -> None:
    assert inductor_options(lowered("mlp", "rows", features=64)[0]) == {}
    assert inductor_options(lowered("mlp", "images")[0]) == {}  # chunks of 2, in rows of 5
    dormant = dormant_graph()
    run_passes(dormant, PLAIN)
    assert inductor_options(dormant) == {}


@pytest.mark.parametrize("given", [None, pytest.param(True, marks=pytest.mark.slow)])
def test_an_option_that_is_given_wins(given: bool | None) -> None:
    seen: list[bool] = []
    options: dict[str, Any] = {
        "lowering": "matmul",
        "post_grad_custom_pre_pass": lambda _: seen.append(cpp.enable_loop_tail_vec),
    }
    model = kasminify(
        OneLayer(),
        num_seeds=4,
        options=options if given is None else options | {"cpp.enable_loop_tail_vec": given},
    )
    graft(layer_of(model), [0, 2], "mlp")
    with torch.no_grad():
        model(torch.randn(3, 8))
    assert seen == [bool(given)]
    assert cpp.enable_loop_tail_vec

"""The fused lowering, its kernels run by Triton's interpreter, against plain operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_cases import growing_graph
from kernel_cases import (
    STAGES,
    Blend,
    assert_fused_is_right,
    each_bad_output,
    each_bad_parameter,
    fused,
    interpreter,
    kernels,
)
from torch import Tensor, nn

from kasmina_fx import KasminaLayer, kasmina_layers, kasminify
from kasmina_fx.lowerings import tiles
from kasmina_fx.lowerings.plan import KERNELS
from kasmina_fx.lowerings.sample import OBSERVE_ROWS
from kasmina_fx.lowerings.tiles import _PROGRAMS, FUSED, _Launch
from kasmina_fx.passes import passes_for, run_passes
from kasmina_fx.passes.infra.metadata import origin_of
from kasmina_fx.testing import graft

__all__ = ["interpreter", "kernels"]
pytestmark = [
    pytest.mark.usefixtures("kernels"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of what is not finite
]


def kinds(kind: str) -> dict[int, str]:
    return dict.fromkeys(STAGES, kind)


@pytest.mark.parametrize(
    ("tiles", "rows", "parts"),
    [(3, 16_384, 256), (15, 16_384, 256), (16, 16_384, 512), (256, 16_384, 33), (16, 40, 3)],
)
def test_rows_fall_into_twice_as_many_parts_where_tiles_are_many(
    tiles: int, rows: int, parts: int
) -> None:
    assert _Launch(rows, tiles, tiles, 1).parts(_PROGRAMS[0]) == parts


@pytest.mark.parametrize("size", [1, 3, pytest.param(4, marks=pytest.mark.slow), 20])
@pytest.mark.parametrize("kind", KERNELS)
def test_every_kernel_computes_its_blueprint(kind: str, size: int) -> None:
    assert_fused_is_right(Blend([size] * 9, kinds(kind)))


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 100])
@pytest.mark.parametrize("kind", ["mlp", "bottleneck"])
def test_any_number_of_rows(kind: str, rows: int) -> None:
    assert_fused_is_right(Blend([4] * 9, kinds(kind), rows=rows))


def test_chunks_of_several_sizes_and_blueprints_of_several_kinds() -> None:
    grown = {0: "mlp", 1: "affine", 2: "lora", 3: "mlp", 5: "affine", 8: "residual_mlp"}
    assert_fused_is_right(Blend([3] * 4 + [2] * 5, grown))


def test_all_seeds_at_once_and_none() -> None:
    assert_fused_is_right(Blend([2] * 20, dict.fromkeys(range(20), "mlp"), stages={}))
    idle = Blend([2] * 4, {0: "mlp"}, stages={0: next(iter(STAGES.values()))})
    asked, _ = idle.arguments()
    nobody = [torch.full_like(t, -1) for t in asked.order]
    off = [torch.full_like(t, -1) for t in asked.positions]
    out, notes = fused(asked._replace(order=nobody, positions=off))
    assert torch.equal(out, asked.y)
    assert notes.tolist() == [[0.0] * 4, [-1.0] * 4, [0.0] * 4]


def bad_parameter(value: float, which: int) -> Callable[[KasminaLayer, Tensor], None]:
    def poison(layer: KasminaLayer, y: Tensor) -> None:
        (bank,) = layer.kasmina.bank_list()
        bank.tensors()[which].data[1].view(-1)[0] = value

    return poison


@each_bad_parameter
@pytest.mark.parametrize("which", [0, -1])
@pytest.mark.parametrize("kind", KERNELS)
def test_a_bad_parameter_reaches_no_neighbour(kind: str, which: int, value: float) -> None:
    assert_fused_is_right(Blend([4] * 9, kinds(kind), poison=bad_parameter(value, which)))


@each_bad_output
@pytest.mark.parametrize("kind", KERNELS)
def test_a_bad_output_of_the_host_reaches_no_neighbour(kind: str, value: float) -> None:
    def poison(layer: KasminaLayer, y: Tensor) -> None:
        y[3, 17] = y[36, 5] = y[0, 30] = value

    assert_fused_is_right(Blend([4] * 9, kinds(kind), poison=poison))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_gradient_reaches_no_neighbour(value: float) -> None:
    class Bad(Blend):
        def arguments(self) -> tuple[Any, Tensor]:
            asked, grad = super().arguments()
            grad[5, 6] = value
            return asked, grad

    assert_fused_is_right(Bad([4] * 9, kinds("mlp")))


@pytest.mark.parametrize(
    "row",
    [pytest.param(0, marks=pytest.mark.slow), 17, 40, pytest.param(99, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("whose", ["output", "gradient"])
@pytest.mark.parametrize("kind", ["mlp", "lora", "residual_mlp"])
def test_a_program_goes_on_with_care_from_its_first_bad_block(
    kind: str, whose: str, row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program has several blocks here, some before the bad one and some after it."""
    monkeypatch.setattr(tiles, "_MOST", 2)

    class Bad(Blend):
        def arguments(self) -> tuple[Any, Tensor]:
            asked, grad = super().arguments()
            (asked.y if whose == "output" else grad)[row, 4] = torch.inf
            return asked, grad

    assert_fused_is_right(Bad([3] * 9, kinds(kind), rows=100))


def steep(layer: KasminaLayer, y: Tensor) -> None:
    for parameter in layer.blueprint_parameters():
        parameter.data.mul_(50)


@pytest.mark.parametrize("kind", KERNELS)
def test_a_gradient_that_overflows_on_its_way_is_refused_and_blamed(kind: str) -> None:
    class Steep(Blend):
        def arguments(self) -> tuple[Any, Tensor]:
            asked, grad = super().arguments()
            grad[5, 4:6] = 3e38
            return asked, grad

    case = Steep([4] * 9, kinds(kind), poison=steep)
    assert_fused_is_right(case, rtol=1e-3, atol=1e-3)  # of numbers 2,500 times as large
    assert case.run(fused, torch.float32)[3].any()  # what is said of faults


def test_a_scaled_loss_scales_reconstruction_and_blames_nobody() -> None:
    class Scaled(Blend):
        def arguments(self) -> tuple[Any, Tensor]:
            asked, grad = super().arguments()
            alpha, roles, faults, scale = asked.layer
            grad[5, 4:6] = 3e38
            return asked._replace(layer=[alpha, roles, faults, scale * 8]), grad

    case = Scaled([4] * 9, kinds("mlp"), poison=steep)
    assert_fused_is_right(case, rtol=1e-3, atol=1e-3)  # of numbers 2,500 times as large
    assert not case.run(fused, torch.float32)[3].any()


def test_a_shared_blueprint_has_one_gradient_of_all_its_seeds() -> None:
    class Shared(Blend):
        def arguments(self) -> tuple[Any, Tensor]:
            asked, grad = super().arguments()
            # Two slots of four places each: seeds 1, 3, 4 share the first, 6 and 7 the second.
            seeds = torch.tensor([[1, 3, 4, -1], [6, 7, -1, -1]])
            order = torch.tensor([0, 1, 2, 4, 5])
            positions = torch.full((9,), -1)
            positions[seeds.view(-1)[order]] = order
            modes = torch.tensor([[1, 2, 0, 0], [1, 1, 0, 0]])
            order = nn.functional.pad(order, (0, 3), value=-1)  # two tiles of four
            changed = {"seeds": seeds, "order": order, "positions": positions, "modes": modes}
            trainees = torch.tensor([1, -1])
            tables: Any = {name: [table] for name, table in changed.items()}
            banks = asked.banks.replace("mlp@", "mlp:shared@")
            return asked._replace(**tables, trainees=[trainees], banks=banks), grad

    assert_fused_is_right(Shared([4] * 9, kinds("mlp")))


def test_an_output_that_is_not_contiguous_is_blended_all_the_same() -> None:
    asked, _ = Blend([4] * 9, kinds("mlp")).arguments()
    wide = torch.randn(37, 72)
    (out, _), (expected, _) = (fused(asked._replace(y=y)) for y in (wide[:, ::2], wide[:, ::2] + 0))
    assert torch.equal(out, expected)


def test_nothing_of_the_hosts_is_written_to() -> None:
    asked, _ = Blend([4] * 9, kinds("mlp")).arguments()
    before = asked.y.clone()
    out, _ = fused(asked)
    assert torch.equal(asked.y, before)
    assert not torch.equal(out, before)


def test_a_graph_for_inference_keeps_nothing_and_refuses_a_backward() -> None:
    case = Blend([4] * 9, kinds("affine"))
    asked, _ = case.arguments()
    tables = [asked.order[0], asked.seeds[0], asked.positions[0], asked.modes[0], *asked.layer]
    plan = "affine size=4 hidden=0 offset=0 first_seed=0 count=9 dot=float32"
    params = [p.detach() for p in asked.params]
    out, kept, notes = FUSED(
        asked.y,
        [*tables[:6], tables[6].detach(), tables[7]],
        params,
        None,
        plan,
        False,
        False,
        False,
    )
    assert torch.equal(out, fused(asked)[0])
    assert kept.numel() == notes.numel() == 0
    with pytest.raises(RuntimeError, match="for inference"):
        FUSED(asked.y.requires_grad_(), tables, params, None, plan, False, False, False)


def test_the_number_of_nodes_depends_on_banks_alone() -> None:
    gm = growing_graph()
    run_passes(gm, passes_for("fused"))
    ours = [n for n in gm.graph.nodes if origin_of(n) is not None]
    assert len(ours) <= 60
    assert sum(n.target is FUSED for n in ours) == 1
    assert sum(n.target is OBSERVE_ROWS for n in ours) == 1


def test_a_pipeline_with_kernels_computes_what_the_layer_does() -> None:
    torch.manual_seed(0)
    model: Any = kasminify(nn.Sequential(nn.Linear(6, 10), nn.GELU()), num_seeds=4, compile=False)
    (layer,) = kasmina_layers(model).values()
    graft(layer, [0, 2], "mlp", 0.5)
    graft(layer, [3], "affine", 0.5)

    def passes_alone(gm: Any, inputs: Any) -> Any:
        return run_passes(gm, passes_for("fused")).graph_module

    x, parameters = torch.randn(5, 6), [*model.parameters()]
    compiled: Any = torch.compile(model, backend=passes_alone)
    found, expected = compiled(x), model(x)
    torch.testing.assert_close(found, expected)
    both = (
        torch.autograd.grad(out.square().sum(), parameters, allow_unused=True)
        for out in (found, expected)
    )
    for a, b in zip(*both, strict=True):
        # An idle bank's kernels write zeros where plain operators send nothing.
        torch.testing.assert_close(*(torch.zeros(()) if t is None else t.sum() for t in (a, b)))
    assert layer.get_health_report()["runs"].tolist() == [2.0, 0.0, 2.0, 2.0]

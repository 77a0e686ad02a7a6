"""The eager layer: numbers against the reference, rules, and what PyTorch does with modules."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kasmina_fx import (
    ChunkedKasminaLayer,
    IllegalTransition,
    InvalidArgument,
    InvalidType,
    KasminaError,
    KasminaLayer,
    LogicalSeed,
    SeedIndexError,
    SeedLifecycle,
    UnknownBlueprint,
    reference,
)
from kasmina_fx.bank import StackedParameter
from kasmina_fx.blueprints import register
from kasmina_fx.testing import graft

BUILTINS = ("mlp", "lora", "affine", "bottleneck")
ODD_BITS = (-0.0, float("inf"), float("-inf"), float("nan"))


# Cases: a base, an input for it, and how its features are cut.


class Case(NamedTuple):
    base: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    num_seeds: int
    chunk_sizes: tuple[int, ...] | None = None


def _rows(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(*shape, dtype=torch.float64),)


def _attended() -> tuple[Tensor, ...]:
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    return x, x * 0.5, x + 1


CASES = {
    "linear, one row of features": Case(lambda: nn.Linear(7, 12), _rows(7), 6),
    "linear, 2-D": Case(lambda: nn.Linear(7, 12), _rows(5, 7), 6),
    "linear, 3-D": Case(lambda: nn.Linear(7, 12), _rows(3, 5, 7), 6),
    "linear, chunks of one feature": Case(lambda: nn.Linear(7, 6), _rows(5, 7), 6),
    "linear, does not divide": Case(lambda: nn.Linear(7, 15), _rows(5, 7), 6),
    "linear, sizes given": Case(lambda: nn.Linear(7, 15), _rows(5, 7), 6, (3, 3, 1, 4, 2, 2)),
    "linear, no bias": Case(lambda: nn.Linear(7, 12, bias=False), _rows(5, 7), 6),
    "layer norm": Case(lambda: nn.LayerNorm(13), _rows(4, 3, 13), 6),
    "embedding": Case(lambda: nn.Embedding(11, 13), lambda: (torch.randint(0, 11, (4, 5)),), 6),
    "conv2d": Case(lambda: nn.Conv2d(3, 13, 3), _rows(2, 3, 6, 5), 6),
    "conv1d": Case(lambda: nn.Conv1d(3, 12, 3), _rows(2, 3, 9), 6),
    "batch norm": Case(lambda: nn.BatchNorm2d(13), _rows(4, 13, 3, 2), 6),
    "attention": Case(lambda: nn.MultiheadAttention(12, 2, batch_first=True), _attended, 6),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def _scale(size: int) -> nn.Module:
    """Not like any built-in, and with a buffer that forward reads."""
    module = nn.Sequential(nn.Linear(size, size + 1), nn.Tanh(), nn.Linear(size + 1, size))
    module.register_buffer("unused", torch.arange(3))
    return module


class Gated(nn.Module):
    """Works on a chunk wherever its features are: it treats all elements alike."""

    floor: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("floor", torch.tensor(0.25))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.gain * x) * x + self.floor


def _no_seed(layer: KasminaLayer) -> None:
    pass


def _all_builtins(layer: KasminaLayer) -> None:
    for seed, (kind, alpha) in enumerate(zip(BUILTINS, (0.3, 1.0, 0.0, 0.7), strict=True)):
        graft(layer, seed, kind, alpha)


def _every_seed(layer: KasminaLayer) -> None:
    graft(layer, range(layer.num_seeds), "mlp", 0.4)


def _shared(layer: KasminaLayer) -> None:
    """Two ids of one class, one of them used by three seeds, and a private copy of that class."""
    first, second = layer.register_blueprint("mlp"), layer.register_blueprint("mlp")
    graft(layer, [0, 5, 2], first, 0.6)
    graft(layer, 3, second, 0.9)
    graft(layer, 4, "mlp", 0.2)


def _user_module(layer: KasminaLayer) -> None:
    layer.register_blueprint(Gated, name="gated")
    graft(layer, [1, 4], "gated", 0.5)
    graft(layer, [0, 3], layer.register_blueprint(Gated), 0.8)
    graft(layer, 2, "affine", 0.5)


MIXES = (_no_seed, _all_builtins, _every_seed, _shared, _user_module)
mixes = pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix.__name__.strip("_"))


def _perturb(layer: KasminaLayer) -> None:
    """Blueprints that start as the identity would hide errors."""
    with torch.no_grad():
        for parameter in layer.blueprint_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def _grown(case: Case, mix: Callable[[KasminaLayer], None], dtype: torch.dtype) -> KasminaLayer:
    base = case.base().to(dtype)
    layer = KasminaLayer(base, case.num_seeds, chunk_sizes=case.chunk_sizes, layer_id="grown")
    mix(layer)
    _perturb(layer)
    return layer


def _step(
    layer: KasminaLayer, run: Callable[..., Any], inputs: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """Output and all gradients of one step."""
    layer.zero_grad()
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = run(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    loss = torch.zeros(())
    for i, part in enumerate(outs):
        weight = torch.linspace(-1, 2, part.numel(), dtype=part.dtype).reshape(part.shape)
        loss = loss + (part * weight).sum()
        assert part.dtype == outs[0].dtype, i
    loss.backward()
    found = {f"out {i}": part.detach() for i, part in enumerate(outs)}
    found |= {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    found |= {f"input {i}": x.grad for i, x in enumerate(leaves) if x.grad is not None}
    return found


def _assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    # A bank that nothing uses gets no gradient from the reference and zeros from the graph.
    for name in got.keys() | expected.keys():
        zero = torch.zeros_like(got[name] if name in got else expected[name])
        torch.testing.assert_close(
            got.get(name, zero),
            expected.get(name, zero),
            atol=tolerance,
            rtol=tolerance,
            msg=name,
        )


def _any(value: Any) -> Any:
    """What the types would refuse too."""
    return value


def _bits(t: Tensor) -> Tensor:
    return (
        t.detach().contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[t.itemsize])
    )


def _assert_bitwise(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    assert torch.equal(_bits(got), _bits(expected))


def _through(size: int, num_seeds: int = 4) -> KasminaLayer:
    """A layer whose base hands its input on: what comes out of the base is the test's to choose."""
    sizes = [size] * num_seeds
    return KasminaLayer(nn.Identity(), num_seeds, chunk_sizes=sizes, feature_dim=-1)


# Numbers.


@mixes
@cases
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"]
)
def test_outputs_and_gradients_equal_the_reference(
    case: Case, mix: Callable[[KasminaLayer], None], dtype: torch.dtype, tolerance: float
) -> None:
    layer = _grown(case, mix, dtype)
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in case.inputs())
    if dtype == torch.float32:
        tolerance *= 10  # sums over some dozens of elements
    got = _step(layer, layer, inputs)
    expected = _step(layer, lambda *xs: reference.forward(layer, *xs), inputs)
    _assert_same(got, expected, tolerance)


@cases
def test_blended_seeds_change_their_chunks_and_no_other(case: Case) -> None:
    layer = _grown(case, _all_builtins, torch.float64)
    inputs = case.inputs()
    out, plain = (
        o[0] if isinstance(o, tuple) else o for o in (layer(*inputs), layer.base(*inputs))
    )
    changed = {
        i
        for i, (a, b) in enumerate(
            zip(layer.chunks.split_tensor(out), layer.chunks.split_tensor(plain), strict=True)
        )
        if not torch.equal(a, b)
    }
    assert changed == {0, 1, 3}  # seed 2 has alpha 0


def test_gradients_reach_base_blueprints_and_input() -> None:
    layer = _grown(CASES["linear, 2-D"], _all_builtins, torch.float64)
    found = _step(layer, layer, CASES["linear, 2-D"].inputs())
    expected = {name for name, _ in layer.named_parameters()} | {"input 0", "out 0"}
    assert found.keys() == expected
    for kind in ("mlp", "lora", "bottleneck"):
        assert any(
            t.abs().sum() > 0 for n, t in found.items() if n.startswith(f"kasmina.banks.{kind}")
        )


def test_one_step_by_hand() -> None:
    base = nn.Linear(2, 4, bias=False)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 0]]))
    layer = KasminaLayer(base, 2)
    graft(layer, 1, "affine", 0.25)
    with torch.no_grad():
        for name, parameter in layer.kasmina.banks["affine_run0"].named_parameters():
            parameter[0] = torch.tensor([3.0, 2.0] if name == "scale" else [1.0, -1.0])
    # base [1, 2, 3, 2]; chunk 1: B = [3*3+1, 2*2-1] = [10, 3]; 3 + .25*7, 2 + .25*1
    assert layer(torch.tensor([[1.0, 2.0]])).tolist() == [[1.0, 2.0, 4.75, 2.25]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_all_dormant_is_the_base_bit_for_bit(dtype: torch.dtype) -> None:
    layer = _through(3)
    x = torch.randn(5, 12, dtype=dtype)
    x.view(-1)[: len(ODD_BITS)] = torch.tensor(ODD_BITS, dtype=dtype)
    _assert_bitwise(layer(x), x)


@cases
def test_all_dormant_equals_each_kind_of_base(case: Case) -> None:
    layer = _grown(case, _no_seed, torch.float64).eval()
    inputs = case.inputs()
    out, plain = layer(*inputs), layer.base(*inputs)
    for a, b in zip(*((o if isinstance(o, tuple) else (o,)) for o in (out, plain)), strict=True):
        _assert_bitwise(a, b)


@pytest.mark.parametrize("kind", BUILTINS)
def test_dormant_again_after_a_life_is_the_base_bit_for_bit(kind: str) -> None:
    layer = _through(3)
    graft(layer, [0, 2], kind, 0.7)
    graft(layer, 1, layer.register_blueprint(kind), 0.7)
    _perturb(layer)
    x = torch.randn(5, 12)
    x.view(-1)[: len(ODD_BITS)] = torch.tensor(ODD_BITS)
    assert not torch.equal(layer(x)[:, 3:9], x[:, 3:9])
    layer.advance([0, 1, 2], SeedLifecycle.CULLED)
    layer.reset([0, 1, 2])
    _assert_bitwise(layer(x), x)
    assert layer.state.get_state_distribution() == {"DORMANT": 4}


@pytest.mark.parametrize("kind", BUILTINS)
@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
@pytest.mark.parametrize("stage", [SeedLifecycle.GERMINATED, SeedLifecycle.TRAINING])
def test_unblended_chunks_keep_their_bits_beside_blended_ones(
    kind: str, shared: bool, stage: SeedLifecycle
) -> None:
    layer = _through(4)
    blueprint: int | str = layer.register_blueprint(kind) if shared else kind
    graft(layer, [1, 2], blueprint, 0.5)
    layer.request_germination(3, blueprint)
    if stage is SeedLifecycle.TRAINING:
        layer.advance(3, stage)
    layer.set_alpha(3, 1.0)  # not blended yet: must not matter
    _perturb(layer)
    x = torch.randn(4, 16)
    x[:, :4] = torch.tensor(ODD_BITS)  # seed 0, dormant
    x[:, 12:] = torch.tensor(ODD_BITS)  # seed 3
    out = layer(x)
    for chunk in (slice(0, 4), slice(12, 16)):
        _assert_bitwise(out[:, chunk], x[:, chunk])
    assert not torch.equal(out[:, 4:12], x[:, 4:12])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", [*BUILTINS, "user"])
@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_a_blueprint_with_non_finite_weights_falls_back_and_harms_nothing(
    kind: str, shared: bool, value: float
) -> None:
    layer = KasminaLayer(nn.Linear(5, 14).double(), 6)
    if kind == "user":
        layer.register_blueprint(_scale, name="user")
    for seed in (0, 4, 5):
        graft(layer, seed, layer.register_blueprint(kind) if shared else kind, 0.5)
    _perturb(layer)
    healthy = copy.deepcopy(layer)
    healthy.advance(4, SeedLifecycle.CULLED)
    healthy.reset(4)
    held = layer.bank_of(4)
    assert held is not None
    bank, slot = held
    assert bank.run.size == 2  # a run of its own beside seed 0's: seed 5 shares the bank

    x = torch.randn(6, 5, dtype=torch.float64)
    expected = _step(healthy, healthy, (x,))
    trained = [tensor for tensor in bank.tensors() if tensor.requires_grad]
    if kind in ("mlp", "user") and not math.isnan(value):
        trained = trained[-2:]  # a ReLU or a tanh makes something finite of an Inf before it
    for tensor in trained:
        before = tensor.detach().clone()
        with torch.no_grad():
            tensor[slot] = value
        layer.kasmina.telemetry.reset()
        got = _step(layer, layer, (x,))
        layer.zero_grad()
        _assert_bitwise(
            got["out 0"][:, layer.seeds[4].chunk], layer.base(x)[:, layer.seeds[4].chunk]
        )
        assert layer.get_health_report()["rejected"].tolist() == [0, 0, 0, 0, 1, 0]
        for name, grad in got.items():
            key = name.removeprefix("kasmina.banks.").split(".")[0]
            if name.startswith("kasmina.") and key == bank.key:
                other = healthy.bank_of(5)
                assert other is not None
                torch.testing.assert_close(grad[other[1]], expected[name][other[1]])
            else:
                assert bool(grad.isfinite().all()), name
                torch.testing.assert_close(grad, expected[name], msg=name)
        with torch.no_grad():
            tensor.copy_(before)


def test_one_bad_row_rejects_the_chunk_of_the_whole_batch() -> None:
    layer = _through(2)
    graft(layer, [0, 1], "affine", 1.0)
    with torch.no_grad():
        layer.kasmina.banks["affine_run0"].get_parameter("scale").fill_(2.0)
    x = torch.ones(3, 8)
    x[1, 0] = 3e38  # twice that overflows
    out = layer(x)
    assert torch.equal(out[:, :2], x[:, :2])
    assert torch.equal(out[:, 2:4], 2 * x[:, 2:4])


@pytest.mark.parametrize("kind", ["none", *BUILTINS])
def test_an_empty_batch_passes(kind: str) -> None:
    layer = KasminaLayer(nn.Linear(5, 12), 4)
    if kind != "none":
        graft(layer, 0, kind)
    layer(torch.randn(3, 5))
    before = layer.kasmina.telemetry.accumulated.clone()
    assert layer(torch.randn(0, 5)).shape == (0, 12)
    assert torch.equal(layer.kasmina.telemetry.accumulated, before)


def test_forward_writes_neither_to_its_input_nor_to_what_the_base_returned() -> None:
    layer = _through(2)
    graft(layer, [0, 1, 2, 3], "mlp", 1.0)
    x = torch.randn(3, 8)
    version, before = x._version, x.clone()
    out = layer(x)
    assert x._version == version
    assert torch.equal(x, before)
    assert out.data_ptr() != x.data_ptr()


def test_alpha_one_is_the_blueprint_alone_and_zero_the_base() -> None:
    layer = KasminaLayer(nn.Linear(5, 12).double(), 4)
    graft(layer, [0, 1], "bottleneck")
    _perturb(layer)
    layer.set_alpha([0, 1], torch.tensor([0.0, 1.0]))
    x = torch.randn(3, 5, dtype=torch.float64)
    y, out = layer.base(x), layer(x)
    held = layer.bank_of(1)
    assert held is not None
    module = held[0].blueprint.module(3).double()
    module.load_state_dict(held[0].slot_tensors(held[1]))
    torch.testing.assert_close(out[:, :3], y[:, :3], atol=0, rtol=0)
    torch.testing.assert_close(out[:, 3:6], module(y[:, 3:6]), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("base", [nn.Linear(4, 6), nn.Conv2d(3, 6, 1), nn.Conv1d(3, 6, 1)])
def test_input_without_a_batch_dimension_works_as_it_does_in_the_base(base: nn.Module) -> None:
    layer = KasminaLayer(base.double(), 3)
    graft(layer, [0, 2], "mlp")
    shape = {nn.Linear: (4,), nn.Conv2d: (3, 4, 5), nn.Conv1d: (3, 7)}[type(base)]
    x = torch.randn(shape, dtype=torch.float64)
    batched = layer(x.unsqueeze(0)).squeeze(0)
    torch.testing.assert_close(layer(x), batched)


def test_dropout_of_a_user_module_follows_train_and_eval() -> None:
    layer = _through(8)
    layer.register_blueprint(lambda size: nn.Dropout(0.5), name="drop")
    graft(layer, [0, 1], "drop", 1.0)
    x = torch.randn(4, 32)
    assert not torch.equal(layer.train()(x), x)
    assert torch.equal(layer.eval()(x), x)


def test_a_user_module_without_tensors_works() -> None:
    layer = _through(2)
    layer.register_blueprint(lambda size: nn.Softplus(), name="softplus")
    graft(layer, [0, 2, 3], "softplus", 0.5)
    x = torch.randn(3, 8)
    torch.testing.assert_close(layer(x), reference.forward(layer, x))
    assert not torch.equal(layer(x), x)


def test_a_user_module_may_have_an_attribute_named_dim() -> None:
    layer = KasminaLayer(nn.Conv1d(2, 8, 1), 4)
    layer.register_blueprint(lambda size: nn.Softmax(dim=-1), name="softmax")
    graft(layer, [0, 2], "softmax", 0.5)
    x = torch.randn(3, 2, 5)
    torch.testing.assert_close(layer(x), reference.forward(layer, x))


def test_a_module_instance_serves_only_the_chunks_that_it_fits_and_is_copied() -> None:
    layer = KasminaLayer(nn.Linear(5, 11), 4)  # 3, 3, 3, 2
    mine = nn.Linear(3, 3)
    number = layer.register_blueprint(mine, name="mine")
    graft(layer, 0, number, 1.0)
    graft(layer, 1, "mine", 1.0)
    with pytest.raises(UnknownBlueprint, match="2 features"):
        layer.request_germination([2, 3], "mine")
    x = torch.randn(3, 5)
    y = layer.base(x)
    expected = mine(y[:, :3])
    torch.testing.assert_close(layer(x)[:, :3], expected)
    torch.testing.assert_close(layer(x)[:, 3:6], mine(y[:, 3:6]))
    with torch.no_grad():
        mine.weight.zero_()
    torch.testing.assert_close(layer(x)[:, :3], expected)


# Rules.


def _snapshot(layer: KasminaLayer) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return value.tolist() if isinstance(value, Tensor) else copy.deepcopy(value)

    saved = {key: plain(value) for key, value in layer.state_dict().items()}
    saved |= {"alpha": layer.state.alphas.tolist(), "stages": layer.state.stages.tolist()}
    return saved | {"stats": layer.get_layer_stats()}


@pytest.mark.parametrize("seeds", [1, [1], [0, 1, 2], torch.tensor([1, 3])])
def test_germination_of_a_seed_that_is_not_dormant_is_false_and_changes_nothing(
    seeds: Any,
) -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)
    assert layer.request_germination(1)
    shared = layer.register_blueprint("mlp")
    before = _snapshot(layer)
    assert layer.request_germination(seeds, "lora") is False
    assert layer.request_germination(seeds, shared) is False
    assert _snapshot(layer) == before


def test_germination_of_several_kinds_of_ids() -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 6)
    for ids in (0, [1], (2,), torch.tensor(3), torch.tensor([4, 5])):
        assert layer.request_germination(ids, "affine", grafting_strategy=2) is True
    state = layer.state.state_tensor
    assert state[:, 0].tolist() == [SeedLifecycle.GERMINATED] * 6
    assert state[:, 1].unique().numel() == 6  # a name gives each a copy, with an id of its own
    assert state[:, 2:].tolist() == [[0, 2]] * 6
    assert layer.request_germination([]) is True


def test_an_int_id_shares_and_a_name_does_not() -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 6)
    number = layer.register_blueprint("mlp")
    assert number == 1
    graft(layer, [0, 1], number)
    graft(layer, [2, 3], "mlp")
    assert layer.state.blueprint_ids[:2].tolist() == [number, number]
    assert len({number, *layer.state.blueprint_ids[2:4].tolist()}) == 3
    used = {name: bank["used"] for name, bank in layer.get_layer_stats()["banks"].items()}
    assert used == {"mlp_run0": 2, "mlp_shared_run0": 1}


def test_the_default_blueprint_is_the_mlp() -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)
    layer.request_germination(2)
    held = layer.bank_of(2)
    assert held is not None
    assert held[0].spec.kind == "mlp"
    shapes = {name: tuple(t.shape) for name, t in held[0].slot_tensors(0).items()}
    assert shapes == {
        "up.weight": (6, 3),
        "up.bias": (6,),
        "down.weight": (3, 6),
        "down.bias": (3,),
    }


BAD_SEEDS = {
    "negative": (-1, SeedIndexError, "seed -1 .*0 to 3"),
    "too large": (4, SeedIndexError, "seed 4 .*0 to 3"),
    "one of many": ([0, 7], SeedIndexError, "seed 7"),
    "float": (1.0, InvalidType, "float"),
    "bool": (True, InvalidType, "bool"),
    "float tensor": (torch.tensor([1.0]), InvalidType, "float32"),
    "twice": ([1, 2, 1], InvalidArgument, "seed 1 .*twice"),
    "str": ("1", InvalidType, "str"),
}
CALLS: dict[str, Callable[[KasminaLayer, Any], Any]] = {
    "germinate": lambda layer, ids: layer.request_germination(ids),
    "cancel": lambda layer, ids: layer.cancel_germination(ids),
    "advance": lambda layer, ids: layer.advance(ids, SeedLifecycle.TRAINING),
    "set_alpha": lambda layer, ids: layer.set_alpha(ids, 0.5),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("ids", "error", "message"), BAD_SEEDS.values(), ids=BAD_SEEDS)
def test_bad_seed_ids_are_refused_by_name_and_change_nothing(
    call: Callable[[KasminaLayer, Any], Any], ids: Any, error: type[Exception], message: str
) -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4, layer_id="fc7")
    layer.request_germination(0, "affine")
    before = _snapshot(layer)
    with pytest.raises(error, match=f"fc7.*{message}") as caught:
        call(layer, ids)
    assert isinstance(caught.value, KasminaError)
    assert _snapshot(layer) == before


BAD_CALLS: dict[str, tuple[Callable[[KasminaLayer], Any], type[Exception], str]] = {
    "unknown id": (lambda x: x.request_germination(1, 5), UnknownBlueprint, "id 5.*register"),
    "id 0": (lambda x: x.request_germination(1, 0), UnknownBlueprint, "id 0"),
    "negative id": (lambda x: x.request_germination(1, -1), UnknownBlueprint, "id -1"),
    "bool id": (lambda x: x.request_germination(1, True), InvalidType, "True"),
    "float id": (lambda x: x.request_germination(1, _any(1.0)), InvalidType, r"1\.0"),
    "unknown name": (lambda x: x.request_germination(1, "lroa"), UnknownBlueprint, "lora"),
    "strategy": (lambda x: x.request_germination(1, None, 9), InvalidArgument, "9.*FIXED_RAMP"),
    "registering an unknown name": (
        lambda x: x.register_blueprint("botleneck"),
        UnknownBlueprint,
        "bottleneck",
    ),
    "alpha NaN": (lambda x: x.set_alpha(0, float("nan")), InvalidArgument, "NaN"),
    "one alpha NaN": (
        lambda x: x.set_alpha([0, 1], torch.tensor([0.5, float("nan")])),
        InvalidArgument,
        "NaN",
    ),
    "too many alphas": (
        lambda x: x.set_alpha([0, 1], torch.tensor([0.5, 0.1, 0.2])),
        InvalidArgument,
        "3",
    ),
    "alpha a str": (lambda x: x.set_alpha(0, _any("half")), InvalidType, "half"),
    "illegal": (
        lambda x: x.advance(0, SeedLifecycle.GRAFTING),
        IllegalTransition,
        "seed 0.*GERMINATED to GRAFTING.*TRAINING, CANCELLED",
    ),
    "illegal for one": (
        lambda x: x.advance([0, 1], SeedLifecycle.TRAINING),
        IllegalTransition,
        "seed 1.*DORMANT to TRAINING",
    ),
    "no such stage": (lambda x: x.advance(0, 11), InvalidArgument, "11.*DORMANT"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_are_refused_and_change_nothing(
    call: Callable[[KasminaLayer], Any], error: type[Exception], message: str
) -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)
    layer.request_germination(0, "affine")
    before = _snapshot(layer)
    with pytest.raises(error, match=message) as caught:
        call(layer)
    assert isinstance(caught.value, KasminaError)
    assert _snapshot(layer) == before


def test_an_empty_list_of_seeds_is_no_error() -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)
    before = layer.state.state_tensor.clone()
    for stage in SeedLifecycle:
        layer.advance([], stage)
    layer.set_alpha([], 0.5)
    assert layer.cancel_germination([]) is True
    assert torch.equal(layer.state.state_tensor, before)


BAD_LAYERS: dict[str, tuple[Callable[[], Any], str]] = {
    "no seeds": (lambda: KasminaLayer(nn.Linear(4, 6), 0), "num_seeds|num_chunks=0"),
    "negative seeds": (lambda: KasminaLayer(nn.Linear(4, 6), -3), "-3"),
    "more seeds than features": (lambda: KasminaLayer(nn.Linear(4, 6), 7), "7.*6 features"),
    "float seeds": (lambda: KasminaLayer(nn.Linear(4, 6), _any(2.0)), "float"),
    "bool seeds": (lambda: KasminaLayer(nn.Linear(4, 6), True), "bool"),
    "sizes do not sum": (
        lambda: KasminaLayer(nn.Linear(4, 6), 2, chunk_sizes=[2, 3]),
        "sum to 5.*6",
    ),
    "zero size": (lambda: KasminaLayer(nn.Linear(4, 6), 3, chunk_sizes=[3, 0, 3]), "positive"),
    "too few sizes": (lambda: KasminaLayer(nn.Linear(4, 6), 3, chunk_sizes=[3, 3]), "2 chunk"),
    "no sizes": (lambda: KasminaLayer(nn.Linear(4, 6), 3, chunk_sizes=[]), "0"),
    "unknown base": (lambda: KasminaLayer(nn.ReLU(), 2), "ReLU.*chunk_sizes.*feature_dim"),
    "base half described": (lambda: KasminaLayer(nn.ReLU(), 2, feature_dim=-1), "ReLU"),
    "negative reserve": (lambda: KasminaLayer(nn.Linear(4, 6), 2, reserve=-1), "reserve=-1"),
    "bool reserve": (lambda: KasminaLayer(nn.Linear(4, 6), 2, reserve=True), "reserve=True"),
}


@pytest.mark.parametrize(("make", "message"), BAD_LAYERS.values(), ids=BAD_LAYERS)
def test_a_layer_that_can_not_be_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(KasminaError, match=message):
        make()


def test_cancel() -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)
    layer.request_germination([0, 1, 2])
    layer.advance(1, SeedLifecycle.TRAINING)
    assert layer.cancel_germination([0, 3]) is False  # 3 is dormant
    assert layer.seeds[0].stage is SeedLifecycle.GERMINATED
    assert layer.cancel_germination([0, 1]) is True
    assert layer.cancel_germination(0) is False
    assert layer.state.get_state_distribution() == {"DORMANT": 1, "GERMINATED": 1, "CANCELLED": 2}
    assert layer.get_layer_stats()["banks"]["mlp_run0"]["used"] == 1
    layer.advance([0, 1], SeedLifecycle.DORMANT)
    assert layer.state.blueprint_ids.tolist()[:2] == [0, 0]
    assert layer.request_germination([0, 1]) is True


def test_a_slot_is_used_again_with_fresh_values() -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)
    layer.request_germination([0, 1], "affine")
    with torch.no_grad():
        for parameter in layer.blueprint_parameters():
            parameter.fill_(9.0)
    stacks = list(layer.blueprint_parameters())
    layer.cancel_germination(0)
    layer.request_germination(2, "affine")
    assert all(a is b for a, b in zip(stacks, layer.blueprint_parameters(), strict=True))
    two, one = layer.bank_of(2), layer.bank_of(1)
    assert two is not None
    assert one is not None
    assert two[0].slot_tensors(two[1])["scale"].tolist() == [1.0] * 3
    assert one[0].slot_tensors(one[1])["scale"].tolist() == [9.0] * 3
    assert two[0].capacity == 2


@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_growing_keeps_the_values_of_old_slots(shared: bool) -> None:
    layer = KasminaLayer(nn.Linear(4, 24).double(), 8)
    first: int | str = layer.register_blueprint("mlp") if shared else "mlp"
    graft(layer, 0, first)
    held = layer.bank_of(0)
    assert held is not None
    before = {name: t.clone() for name, t in held[0].slot_tensors(held[1]).items()}
    x = torch.randn(3, 4, dtype=torch.float64)
    chunk = layer(x)[:, :3]
    for seed in range(1, 8):
        graft(layer, seed, layer.register_blueprint("mlp") if shared else "mlp")
    after = layer.bank_of(0)
    assert after is not None
    assert after[0].capacity == 8
    for name, tensor in after[0].slot_tensors(after[1]).items():
        assert tensor.dtype == torch.float64
        assert torch.equal(tensor, before[name])
    assert torch.equal(layer(x)[:, :3], chunk)


def test_reserve_keeps_the_same_parameters_until_it_is_used_up() -> None:
    layer = KasminaLayer(nn.Linear(4, 24), 8, reserve=4)
    stacks = list(layer.blueprint_parameters())
    assert [tuple(p.shape) for p in stacks] == [(4, 6, 3), (4, 6), (4, 3, 6), (4, 3)]
    assert all(isinstance(p, StackedParameter) for p in stacks)
    for seed in range(4):
        graft(layer, seed)
        assert all(a is b for a, b in zip(stacks, layer.blueprint_parameters(), strict=True))
    graft(layer, 4)
    assert not any(a is b for a, b in zip(stacks, layer.blueprint_parameters(), strict=True))
    assert all(len(p) == 8 for p in layer.blueprint_parameters())


def test_blueprint_parameters_are_the_trainable_stacks() -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)
    assert list(layer.blueprint_parameters()) == []
    layer.request_germination(0, register(_scale, name="scale"))
    assert len(list(layer.blueprint_parameters())) == 4
    assert len(list(layer.blueprint_parameters(trainable_only=False))) == 5  # and a buffer
    base = {id(p) for p in layer.base.parameters()}
    assert base.isdisjoint(id(p) for p in layer.blueprint_parameters(trainable_only=False))


def test_an_optimizer_trains_blended_blueprints() -> None:
    layer = KasminaLayer(nn.Linear(4, 12).requires_grad_(False), 4, reserve=2)
    optimizer = torch.optim.Adam(layer.blueprint_parameters(), lr=0.05)
    graft(layer, [0, 3], alpha=1.0)
    x = torch.randn(32, 4)
    target = torch.zeros(32, 6)
    losses = []
    for _ in range(60):
        out = layer(x)
        loss = (torch.cat([out[:, :3], out[:, 9:]], 1) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 3


def test_a_training_seed_does_not_touch_the_host() -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)
    layer.request_germination([0, 1])
    layer.advance([0, 1], SeedLifecycle.TRAINING)
    layer.set_alpha([0, 1], 1.0)
    x = torch.randn(3, 4)
    got = _step(layer, layer, (x,))
    expected = _step(layer, layer.base, (x,))
    _assert_bitwise(got["out 0"], expected["out 0"])
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    assert all(got[n].any() for n in got if n.startswith("kasmina."))  # they learn by themselves


def test_a_transaction_shows_all_or_nothing() -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)
    graft(layer, 0)
    x = torch.randn(3, 4)
    before, out = _snapshot(layer), layer(x)
    published = layer.state.state_tensor

    def fail() -> None:
        with layer.transaction():
            layer.request_germination([1, 2])
            layer.set_alpha(0, 1.0)
            layer.advance(0, SeedLifecycle.CULLED)
            assert layer.state.state_tensor is published  # nothing visible yet
            assert torch.equal(layer(x), out)
            raise RuntimeError("controller failed")

    with pytest.raises(RuntimeError, match="controller failed"):
        fail()
    layer.state.increment_epochs()  # publishes: nothing staged may come out with it
    layer.state.set_rows(0, epochs_in_state=0)
    layer.kasmina.telemetry.reset()
    before["kasmina.telemetry.accumulated"] = layer.kasmina.telemetry.accumulated.tolist()
    after = _snapshot(layer)
    assert after["stages"] == before["stages"]
    assert after["alpha"] == before["alpha"]
    used = {name: bank["used"] for name, bank in after["stats"]["banks"].items()}
    assert used == {"mlp_run0": 1}
    assert torch.equal(layer(x), out)


def test_a_failed_first_germination_leaves_no_slot_in_use() -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)

    def fail(blueprint: int | str) -> None:
        with layer.transaction():
            layer.request_germination([1, 2], blueprint)
            raise RuntimeError("controller failed")

    for blueprint in ("mlp", layer.register_blueprint("affine")):
        with pytest.raises(RuntimeError, match="controller failed"):
            fail(blueprint)
    assert all(bank["used"] == 0 for bank in layer.get_layer_stats()["banks"].values())
    assert layer.request_germination([1, 2]) is True


def test_an_inner_transaction_that_fails_is_undone_alone() -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)

    def fail() -> None:
        with layer.transaction():
            layer.request_germination(1)
            raise RuntimeError("inner")

    with layer.transaction():
        layer.request_germination(0)
        with pytest.raises(RuntimeError, match="inner"):
            fail()
    assert layer.state.get_state_distribution() == {"DORMANT": 3, "GERMINATED": 1}
    assert layer.bank_of(0) is not None


@pytest.mark.parametrize("build", [KasminaLayer, ChunkedKasminaLayer])
def test_seeds_are_views(build: Callable[[nn.Module, int], KasminaLayer]) -> None:
    layer = build(nn.Linear(4, 11), 4)
    seeds = layer.seeds
    assert len(seeds) == 4
    assert [seed.chunk for seed in seeds] == [slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 11)]
    seed = seeds[3]
    graft(layer, 3, "affine", 0.5)
    assert isinstance(seed, LogicalSeed)
    assert (seed.stage, seed.alpha, seed.is_blended) == (SeedLifecycle.GRAFTING, 0.5, True)
    assert seed.blueprint_id == int(layer.state.state_tensor[3, 1])
    assert [s.seed_id for s in seeds[1:3]] == [1, 2]
    assert "GRAFTING" in repr(seed)
    for outside in (4, -1):
        with pytest.raises(SeedIndexError):
            seeds[outside]


def test_the_health_report() -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4, layer_id="fc")
    graft(layer, 2, alpha=0.25)
    x = torch.randn(32, 4)
    out = layer(x)
    report = layer.get_health_report()
    chunks = out.detach().view(32, 4, 3)
    assert report["layer_id"] == "fc"
    assert report["num_seeds"] == 4
    assert report["count"].tolist() == [96.0] * 4
    torch.testing.assert_close(report["mean"], chunks.mean((0, 2)))
    torch.testing.assert_close(report["variance"], chunks.var((0, 2), correction=0))
    assert report["alpha"].tolist() == [0, 0, 0.25, 0]
    assert report["stage"].tolist() == [0, 0, 3, 0]
    assert all(t.device.type == "cpu" for t in report.values() if isinstance(t, Tensor))


def test_layer_stats() -> None:
    layer = KasminaLayer(nn.Linear(4, 11), 4, layer_id="fc", telemetry=False)
    graft(layer, 0)
    layer.request_germination([1, 3])
    assert layer.get_layer_stats() == {
        "layer_id": "fc",
        "num_seeds": 4,
        "features": 11,
        "layout": "dim=-1 runs=3x3+1x2",
        "stages": {"DORMANT": 1, "GERMINATED": 2, "GRAFTING": 1},
        "blended": 1,
        "banks": {
            "mlp_run0": {"slots": 2, "used": 2},
            "mlp_run1": {"slots": 2, "used": 1},
        },
        "telemetry_enabled": False,
    }


# What PyTorch does with modules.


def _copied(layer: KasminaLayer) -> KasminaLayer:
    return copy.deepcopy(layer)


def _pickled(layer: KasminaLayer) -> KasminaLayer:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded: KasminaLayer = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [_copied, _pickled])
@pytest.mark.parametrize("mix", [_all_builtins, _shared, _user_module])
def test_a_copy_is_equal_and_independent(
    copied: Callable[[KasminaLayer], KasminaLayer], mix: Callable[[KasminaLayer], None]
) -> None:
    layer = _grown(CASES["linear, does not divide"], mix, torch.float64)
    x = torch.randn(3, 7, dtype=torch.float64)
    out = layer(x).detach()
    twin = copied(layer)
    assert torch.equal(twin(x), out)
    assert all(isinstance(p, StackedParameter) for p in twin.blueprint_parameters())
    ours = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    assert ours.isdisjoint(t.data_ptr() for t in (*twin.parameters(), *twin.buffers()))

    twin.set_alpha(0, 1.0)
    twin.request_germination(5 if bool(twin.state.stages[5] == 0) else 1, "affine")
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert torch.equal(layer(x), out)
    changed = twin(x)
    layer.set_alpha(0, 0.1)
    assert torch.equal(twin(x), changed)
    assert not torch.equal(layer(x), out)  # the original goes on working


@pytest.mark.parametrize("pickled", [False, True])
def test_the_layers_of_a_copied_model_start_growing_together(pickled: bool) -> None:
    first, second = KasminaLayer(nn.Linear(4, 8), 4), KasminaLayer(nn.Linear(8, 6), 3)
    model: Any = nn.Sequential(first, second)
    second.colony = first.colony
    second.publish()
    if pickled:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copy.deepcopy(model)
    assert isinstance(twin[0], KasminaLayer)
    assert isinstance(twin[1], KasminaLayer)
    assert twin[0].colony is twin[1].colony
    assert twin[0].colony is not first.colony
    assert set(twin[0].colony) == {twin[0], twin[1]}
    twin[0].request_germination(0)
    assert list(twin[1].kasmina.banks) == ["mlp_run0"]
    assert len(first.kasmina.banks) == len(second.kasmina.banks) == 0


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix.__name__.strip("_"))
def test_a_state_dict_restores_a_grown_layer_in_a_fresh_one(
    mix: Callable[[KasminaLayer], None], assign: bool
) -> None:
    case = CASES["linear, does not divide"]
    layer = _grown(case, mix, torch.float64)
    x = torch.randn(3, 7, dtype=torch.float64)
    out = layer(x)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = KasminaLayer(case.base().double(), case.num_seeds)
    result = fresh.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert result.missing_keys == result.unexpected_keys == []
    # The step above is in the telemetry that was saved.
    assert torch.equal(fresh.kasmina.telemetry.accumulated, layer.kasmina.telemetry.accumulated)
    assert torch.equal(fresh(x), out)
    assert all(isinstance(p, StackedParameter) for p in fresh.blueprint_parameters())
    assert fresh.get_layer_stats()["stages"] == layer.get_layer_stats()["stages"]
    for seed in range(case.num_seeds):
        assert fresh.seeds[seed].blueprint_id == layer.seeds[seed].blueprint_id

    # And it goes on growing: no id is given twice, shared ones are known.
    for each in (layer, fresh):
        free = (
            int(each.state.find_seeds_by_state(SeedLifecycle.DORMANT)[0])
            if mix is not _every_seed
            else None
        )
        if free is not None:
            torch.manual_seed(3)
            graft(each, free, "mlp", 0.5)
        if each.kasmina.blueprints:
            each.advance(0, SeedLifecycle.CULLED)
            each.reset(0)
            graft(each, 0, next(iter(each.kasmina.blueprints)), 1.0)
    assert torch.equal(fresh(x), layer(x))


def test_loading_replaces_what_the_layer_had_grown() -> None:
    """Slots of the old life must not blend into the new one, even where ids coincide."""
    source, target = (KasminaLayer(nn.Linear(4, 12).double(), 4) for _ in range(2))
    graft(source, [0, 1], "mlp", 0.5)
    graft(target, [0, 1, 2], "affine", 1.0)
    graft(target, 3, target.register_blueprint("lora"), 1.0)
    _perturb(source)
    _perturb(target)
    x = torch.randn(3, 4, dtype=torch.float64)
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(target(x), source(x), atol=0, rtol=0)
    torch.testing.assert_close(target(x), reference.forward(target, x))
    used = {name: bank["used"] for name, bank in target.get_layer_stats()["banks"].items()}
    assert {name: n for name, n in used.items() if n} == {"mlp_run0": 2}


@pytest.mark.parametrize("capacity", [2, 8])
def test_loading_another_capacity_keeps_the_dtype_of_the_layer(capacity: int) -> None:
    source = KasminaLayer(nn.Linear(4, 24), 8)
    graft(source, range(capacity))
    target = KasminaLayer(nn.Linear(4, 24), 8)
    graft(target, range(4))
    target.double()
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 4)
    assert {p.dtype for p in target.parameters()} == {torch.float64}
    torch.testing.assert_close(target(x.double()).float(), source(x))


def test_a_state_dict_holds_tensors_and_plain_data_only() -> None:
    layer = _grown(CASES["linear, 2-D"], _shared, torch.float32)
    saved = layer.state_dict()
    own = sorted(key for key in saved if "banks" not in key)
    assert own == [
        "bias",
        "kasmina._extra_state",
        "kasmina.state.alpha",
        "kasmina.state.state_tensor",
        "kasmina.telemetry.accumulated",
        "kasmina.telemetry.faults",
        "kasmina.telemetry.previous_loss",
        "weight",
    ]
    assert all(isinstance(v, Tensor) for k, v in saved.items() if not k.endswith("_extra_state"))
    assert saved["kasmina.state.state_tensor"].dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_casting_keeps_alpha_and_telemetry_in_float32(dtype: torch.dtype) -> None:
    layer = _grown(CASES["linear, does not divide"], _all_builtins, torch.float32)
    layer.set_alpha(0, 0.3)  # not a bfloat16 number
    layer(torch.randn(3, 7))
    accumulated = layer.kasmina.telemetry.accumulated.clone()
    model = nn.Sequential(layer).to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert layer.state.alpha.dtype == torch.float32
    assert layer.state.alpha[0] == torch.tensor(0.3)
    assert layer.kasmina.telemetry.accumulated.dtype == torch.float32
    assert torch.equal(layer.kasmina.telemetry.accumulated, accumulated)
    for bank in layer.kasmina.bank_list():
        assert bank.slots.dtype == bank.seeds.dtype == bank.positions.dtype == torch.int64
    assert layer.state.state_tensor.dtype == torch.int32
    x = torch.randn(5, 7, dtype=dtype)
    out = layer(x)
    assert out.dtype == dtype
    tolerance = 1e-10 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(out, reference.forward(layer, x), atol=tolerance, rtol=tolerance)
    layer.request_germination(5, "mlp")
    assert {p.dtype for p in layer.blueprint_parameters()} == {dtype}


def test_the_device_of_a_meta_model_is_kept() -> None:
    layer = KasminaLayer(nn.Linear(4, 12, device="meta"), 4)
    assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {"meta"}
    layer.to_empty(device="cpu")
    layer.request_germination(0)
    assert layer.state.state_tensor[:, 0].tolist() == [1, 0, 0, 0]


def test_attributes_of_the_base_are_read_and_set_through_the_layer() -> None:
    base = nn.Linear(4, 12)
    layer = KasminaLayer(base, 4)
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert (layer.in_features, layer.out_features) == (4, 12)
    tied = nn.Parameter(torch.randn(12, 4))
    layer.weight = tied
    assert base.weight is tied
    assert "weight" not in layer._parameters
    x = torch.randn(2, 4)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, tied, base.bias))
    layer.bias = None
    assert base.bias is None
    with pytest.raises(AttributeError, match="nothing"):
        layer.nothing  # noqa: B018
    assert not hasattr(layer, "_nothing")


def test_functional_call_replaces_base_and_blueprint_parameters() -> None:
    layer = _grown(CASES["linear, 2-D"], _all_builtins, torch.float64)
    x = torch.randn(3, 7, dtype=torch.float64)
    fresh = {name: p.detach() * 0.5 for name, p in layer.named_parameters()}
    got = torch.func.functional_call(layer, fresh, (x,))
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    torch.testing.assert_close(got, twin(x), atol=0, rtol=0)
    assert not torch.equal(got, layer(x))


def test_torch_func_grad_over_parameters_equals_backward() -> None:
    layer = _grown(CASES["linear, 2-D"], _all_builtins, torch.float64)
    x = torch.randn(3, 7, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        out: Tensor = torch.func.functional_call(layer, values, (x,))
        return out.square().sum()

    got = torch.func.grad(loss)(parameters)
    layer.zero_grad()
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, msg=name)


def test_blueprint_gradients_are_right_by_finite_differences() -> None:
    layer = _grown(CASES["linear, 2-D"], _all_builtins, torch.float64)
    names = [name for name, _ in layer.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    x = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(names, values, strict=True))
        out: Tensor = torch.func.functional_call(layer, named, (x,))
        return out

    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)


@pytest.mark.parametrize("mix", MIXES[1:], ids=lambda mix: mix.__name__.strip("_"))
def test_autocast_to_bfloat16(mix: Callable[[KasminaLayer], None]) -> None:
    layer = _grown(CASES["linear, 3-D"], mix, torch.float32)
    x = torch.randn(3, 5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        expected = reference.forward(layer, x)
        plain = layer.base(x)
    assert out.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, atol=0.05, rtol=0.05)
    out.float().sum().backward()
    assert all(
        p.grad is not None and bool(p.grad.isfinite().all()) and p.grad.dtype == torch.float32
        for p in layer.parameters()
        if p.requires_grad
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], Any]) -> None:
    layer = _grown(CASES["linear, 2-D"], _all_builtins, torch.float64)
    x = torch.randn(3, 7, dtype=torch.float64)
    expected = layer(x)
    with mode():
        out = layer(x)
    assert not out.requires_grad
    assert torch.equal(out, expected)
    assert layer.get_health_report()["count"][0] == 2 * 3 * 2
    layer(x).sum().backward()  # training goes on


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_seeds_changed_without_gradients_train_afterwards(mode: Callable[[], Any]) -> None:
    layer = KasminaLayer(nn.Linear(4, 12), 4)
    with mode():
        graft(layer, [0, 1], "mlp", 0.5)
        graft(layer, 2, layer.register_blueprint("lora"), 0.5)
    got = _step(layer, layer, (torch.randn(3, 4),))
    assert any(t.any() for name, t in got.items() if name.startswith("kasmina.banks.mlp"))
    layer.set_alpha(0, 1.0)
    graft(layer, 3, "mlp", 0.5)
    with torch.no_grad():
        for parameter in layer.blueprint_parameters():
            parameter.add_(1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients_and_counts_a_step_once(reentrant: bool) -> None:
    layer = _grown(CASES["linear, 2-D"], _all_builtins, torch.float64)
    x = (torch.randn(3, 7, dtype=torch.float64),)
    expected = _step(layer, layer, x)
    layer.kasmina.telemetry.reset()
    got = _step(layer, lambda *xs: checkpoint(layer, *xs, use_reentrant=reentrant), x)
    _assert_same(got, expected, 1e-12)
    assert layer.get_health_report()["count"].tolist() == [6.0] * 6


def test_two_layers_may_share_a_base() -> None:
    base = nn.Linear(6, 6).double()
    first, second = KasminaLayer(base, 3), KasminaLayer(base, 2)
    graft(first, 0, "mlp", 0.5)
    graft(second, 1, "bottleneck", 0.5)
    _perturb(second)
    model = nn.Sequential(first, second)
    x = torch.randn(4, 6, dtype=torch.float64)
    out = model(x)
    torch.testing.assert_close(
        out, reference.forward(second, reference.forward(first, x)), atol=1e-12, rtol=1e-12
    )
    out.sum().backward()
    grad = base.weight.grad
    assert grad is not None
    got = grad.clone()
    model.zero_grad()
    reference.forward(second, reference.forward(first, x)).sum().backward()
    assert base.weight.grad is not None
    torch.testing.assert_close(got, base.weight.grad)
    assert len({id(p) for p in model.parameters() if not isinstance(p, StackedParameter)}) == 2


def test_a_layer_called_twice_in_one_step_sums_its_gradients() -> None:
    layer = KasminaLayer(nn.Linear(6, 6).double(), 3)
    graft(layer, [0, 2], "mlp", 0.5)
    x = (torch.randn(4, 6, dtype=torch.float64),)
    got = _step(layer, lambda x: layer(layer(x).relu()), x)
    expected = _step(
        layer, lambda x: reference.forward(layer, reference.forward(layer, x).relu()), x
    )
    _assert_same(got, expected, 1e-12)
    assert layer.get_health_report()["count"].tolist() == [16.0] * 3


def test_seeds_may_change_between_forward_and_backward() -> None:
    layer = KasminaLayer(nn.Linear(4, 24).double(), 8)
    graft(layer, [0, 1], "mlp", 0.5)
    x = torch.randn(3, 4, dtype=torch.float64)
    expected = _step(layer, layer, (x,))
    layer.zero_grad()
    parameters = dict(layer.named_parameters())
    out = layer(x)
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).reshape(out.shape)
    layer.set_alpha([0, 1], 0.9)
    layer.advance(0, SeedLifecycle.CULLED)
    graft(layer, range(2, 8), "mlp", 0.5)  # outgrows the bank, and takes seed 0's slot
    (out * weight).sum().backward()
    for name, parameter in layer.named_parameters():
        if parameter is not parameters[name]:  # the gradient goes to the stack that took its place
            assert parameters[name].grad is None
        assert parameter.grad is not None
        rows = len(expected[name])
        torch.testing.assert_close(parameter.grad[:rows], expected[name], msg=name)
        assert not parameter.grad[rows:].any()


def test_ten_thousand_seeds_make_no_ten_thousand_objects() -> None:
    layer = KasminaLayer(nn.Linear(2, 10_000), 10_000)
    graft(layer, range(0, 10_000, 100), "affine")
    assert len(list(layer.modules())) < 10
    assert len(list(layer.state_dict())) < 15
    assert layer(torch.randn(2, 2)).shape == (2, 10_000)


@pytest.fixture
def _default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("_default_dtype")
def test_a_base_without_parameters_takes_the_default_dtype() -> None:
    layer = _through(3)
    graft(layer, 0, "mlp")
    assert {p.dtype for p in layer.blueprint_parameters()} == {torch.float64}
    assert layer.state.alpha.dtype == torch.float32
    assert layer(torch.randn(2, 12)).dtype == torch.float64


def test_room_can_be_made_at_any_time() -> None:
    layer = KasminaLayer(nn.Linear(4, 25), 8)  # two sizes of chunks
    graft(layer, [0, 1], "affine", alpha=0.5)
    x = torch.randn(3, 4)
    before = layer(x)
    layer.reserve(7, "affine")
    layer.reserve(3, "affine")  # less than there is
    layer.reserve(7)
    assert torch.equal(layer(x), before)
    held = list(layer.blueprint_parameters())
    assert {len(stack) for stack in held} == {7}
    graft(layer, range(2, 8), "affine")
    assert all(a is b for a, b in zip(layer.blueprint_parameters(), held, strict=True))


@pytest.mark.parametrize("slots", [0, -1, True, 2.0])
def test_room_for_no_number_of_slots_is_refused(slots: Any) -> None:
    layer = KasminaLayer(nn.Linear(4, 24), 8)
    with pytest.raises(InvalidArgument, match=r"reserve\("):
        layer.reserve(slots)
    with pytest.raises(UnknownBlueprint):
        layer.reserve(2, "no such")
    assert not list(layer.blueprint_parameters())


class Doubled(nn.Module):
    """A base with 8 features, which its class does not tell."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], -1)


@pytest.mark.parametrize("telemetry", [True, False])
@pytest.mark.parametrize(("sizes", "dim"), [([2, 2, 2], -1), ([4, 4], 2), ([4, 4], -3)])
def test_an_output_other_than_described_is_refused(
    sizes: list[int], dim: int, telemetry: bool
) -> None:
    layer = KasminaLayer(
        Doubled(), len(sizes), chunk_sizes=sizes, feature_dim=dim, telemetry=telemetry
    )
    for seed in range(2):
        with pytest.raises(InvalidArgument, match=r"shape \(8, 8\); its layer was made for"):
            layer(torch.randn(8, 4))
        graft(layer, [seed])
    right = KasminaLayer(Doubled(), 2, chunk_sizes=[4, 4], feature_dim=-1, telemetry=telemetry)
    graft(right, [1])
    assert right(torch.randn(8, 4)).shape == (8, 8)


@pytest.mark.parametrize("dim", ["x", True, 1.0])
def test_a_feature_dim_is_a_number(dim: Any) -> None:
    with pytest.raises(InvalidArgument, match="feature_dim="):
        KasminaLayer(nn.Linear(4, 6), 3, feature_dim=dim)


@pytest.mark.parametrize("sizes", [6, ["a"], [2.5, 3.5]])
def test_chunk_sizes_are_numbers(sizes: Any) -> None:
    with pytest.raises((InvalidArgument, InvalidType), match="chunk"):
        KasminaLayer(nn.Linear(4, 6), 2, chunk_sizes=sizes)


def test_a_blueprint_can_be_tried_on_a_dimension_far_back() -> None:
    layer = KasminaLayer(nn.Linear(4, 6), 3, feature_dim=9)
    layer.register_blueprint("affine")


def test_a_refused_layer_has_not_moved_its_base() -> None:
    base = nn.Linear(4, 6)
    with pytest.raises(InvalidArgument):
        ChunkedKasminaLayer(base, 7, device="meta")
    assert base.weight.device.type == "cpu"
    moved = ChunkedKasminaLayer(base, 6, device="meta")
    assert {t.device.type for t in moved.state_dict().values() if torch.is_tensor(t)} == {"meta"}

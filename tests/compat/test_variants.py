"""The older layers around convolutions, attention and norms."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_cases import assert_same, training_step
from torch import Tensor, nn

from kasmina_fx import KasminaError, op_counts
from kasmina_fx.compat import (
    AsyncKasminaConv2dLayer,
    KasminaAttentionLayer,
    KasminaBatchNorm1dLayer,
    KasminaBatchNorm2dLayer,
    KasminaConv2dLayer,
    KasminaLayer,
    KasminaLayerNormLayer,
)
from kasmina_fx.reference import reference_mode
from kasmina_fx.testing import RecordingBackend, graft

EMPTY = inspect.Parameter.empty
SEEDS = {"num_seeds": 4, "cache_size_mb": 128, "telemetry_enabled": True}
CONV = {
    "in_channels": EMPTY,
    "out_channels": EMPTY,
    "kernel_size": EMPTY,
    "stride": 1,
    "padding": 0,
    "dilation": 1,
    "groups": 1,
    "bias": True,
}
BATCH = {
    "num_features": EMPTY,
    "eps": 1e-5,
    "momentum": 0.1,
    "affine": True,
    "track_running_stats": True,
}
SIGNATURES: dict[type[KasminaLayer], dict[str, Any]] = {
    KasminaConv2dLayer: CONV | SEEDS | {"layer_name": "kasmina_conv2d_layer"},
    AsyncKasminaConv2dLayer: CONV
    | SEEDS
    | {"layer_name": "async_kasmina_conv2d_layer", "enable_gradient_sync": True},
    KasminaAttentionLayer: {
        "embed_dim": EMPTY,
        "num_heads": EMPTY,
        "dropout": 0.0,
        "bias": True,
        "add_bias_kv": False,
        "add_zero_attn": False,
        "kdim": None,
        "vdim": None,
        "batch_first": False,
    }
    | SEEDS
    | {"layer_name": "attention_layer"},
    KasminaLayerNormLayer: {
        "normalized_shape": EMPTY,
        "eps": 1e-5,
        "elementwise_affine": True,
        "bias": True,
    }
    | SEEDS
    | {"layer_name": "layernorm_layer"},
    KasminaBatchNorm1dLayer: BATCH | SEEDS | {"layer_name": "batchnorm1d_layer"},
    KasminaBatchNorm2dLayer: BATCH | SEEDS | {"layer_name": "batchnorm2d_layer"},
}


@pytest.mark.parametrize("cls", SIGNATURES, ids=lambda cls: cls.__name__)
def test_constructors_have_the_names_order_and_defaults_of_before(cls: type[KasminaLayer]) -> None:
    parameters = inspect.signature(cls.__init__).parameters
    found = {name: p.default for name, p in parameters.items() if name != "self"}
    assert list(found.items()) == list(SIGNATURES[cls].items())


def test_forward_of_attention_has_the_signature_of_before() -> None:
    parameters = inspect.signature(KasminaAttentionLayer.forward).parameters
    assert {name: p.default for name, p in parameters.items() if name != "self"} == {
        "query": EMPTY,
        "key": None,
        "value": None,
        "key_padding_mask": None,
        "need_weights": True,
        "attn_mask": None,
        "average_attn_weights": True,
        "is_causal": False,
    }


CASES: dict[str, tuple[Callable[[], KasminaLayer], tuple[int, ...]]] = {
    "conv": (lambda: KasminaConv2dLayer(3, 10, 3, padding=1, layer_name="x"), (2, 3, 5, 4)),
    "async conv": (lambda: AsyncKasminaConv2dLayer(4, 8, (3, 1), groups=2), (2, 4, 5, 4)),
    "attention": (lambda: KasminaAttentionLayer(12, 2, batch_first=True), (3, 5, 12)),
    "layer norm": (lambda: KasminaLayerNormLayer(10), (3, 5, 10)),
    "batch norm, 2-D": (lambda: KasminaBatchNorm1dLayer(10), (6, 10)),
    "batch norm, 3-D": (lambda: KasminaBatchNorm1dLayer(10), (6, 10, 3)),
    "batch norm, 4-D": (lambda: KasminaBatchNorm2dLayer(10), (6, 10, 3, 2)),
}


def first(out: Any) -> Tensor:
    tensor: Tensor = out[0] if isinstance(out, tuple) else out
    return tensor


@pytest.mark.parametrize("case", CASES)
def test_dormant_it_is_its_module_to_the_bit_and_active_the_reference(case: str) -> None:
    torch.manual_seed(0)
    build, shape = CASES[case]
    layer, x = build().double(), torch.randn(shape, dtype=torch.float64)
    assert layer.num_seeds == 4
    own = (x, x, x) if isinstance(layer, KasminaAttentionLayer) else (x,)
    with torch.no_grad():
        plain = layer.eval().default_transform(*own)
        assert torch.equal(first(layer(x)), first(plain))
    layer.train()
    graft(layer, [0, 3], "mlp", 0.6)
    for parameter in layer.blueprint_parameters():
        nn.init.normal_(parameter, std=0.4)
    with reference_mode(layer):
        expected = training_step(layer, layer, own)
    got = training_step(layer, layer, own)
    assert_same(got, expected, 1e-9)
    with torch.no_grad():
        assert float((first(layer.eval()(x)) - first(plain)).abs().max()) > 1e-3


@pytest.mark.untraced
@pytest.mark.parametrize("case", ["conv", "attention", "batch norm, 4-D"])
def test_compiled_it_is_lowered(case: str) -> None:
    torch.manual_seed(0)
    build, shape = CASES[case]
    layer, x = build().double().eval(), torch.randn(shape, dtype=torch.float64)
    graft(layer, [0, 3], "mlp", 0.6)
    backend = RecordingBackend("aot_eager")
    got = first(torch.compile(layer, backend=backend, fullgraph=True)(x))
    torch.testing.assert_close(got, first(layer(x)))
    assert op_counts(backend.before[0])["kasmina.blend.default"] == 1
    assert "kasmina.blend.default" not in op_counts(backend.after[0])


# Convolutions.


def test_convolution_members() -> None:
    layer = KasminaConv2dLayer(4, 8, 3, 2, 1, 1, 2, False)
    assert layer.conv_params == {
        "in_channels": 4,
        "out_channels": 8,
        "kernel_size": (3, 3),
        "stride": (2, 2),
        "padding": (1, 1),
        "dilation": (1, 1),
        "groups": 2,
        "bias": False,
    }
    assert not layer.bias_enabled
    assert (layer.kernel_size, layer.stride, layer.groups) == ((3, 3), (2, 2), 2)
    assert (layer.padding, layer.dilation) == ((1, 1), (1, 1))
    assert (layer.in_channels, layer.out_channels) == (4, 8)
    assert (layer.input_size, layer.output_size) == (4, 8)
    stats = layer.get_layer_stats()
    assert stats["conv_params"] == layer.conv_params
    keys = ("input_channels", "output_channels", "kernel_size", "stride", "padding")
    assert [stats[key] for key in keys] == [4, 8, (3, 3), (2, 2), (1, 1)]
    assert "state_stats" in stats


def test_training_adds_no_noise() -> None:
    layer, x = KasminaConv2dLayer(3, 8, 3).train(), torch.randn(2, 3, 5, 5)
    graft(layer, 0, "mlp", 0.5)
    assert torch.equal(layer(x), layer(x))


def test_convolution_copies() -> None:
    conv, layer = nn.Conv2d(3, 8, 3), KasminaConv2dLayer(3, 8, 3)
    layer.copy_weights_from_conv2d(conv)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(layer(x), conv(x))
    before = layer.weight.clone()
    for source, message in (
        (nn.Linear(3, 8), "Source must be a Conv2d layer"),
        (nn.Conv2d(4, 8, 3), r"Channel mismatch: source\(4, 8\) != target\(3, 8\)"),
        (nn.Conv2d(3, 8, 5), "weight: source"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.copy_weights_from_conv2d(source)  # type: ignore[arg-type]  # the point
    assert torch.equal(layer.weight, before)
    with pytest.raises(KasminaError, match="the source has a bias"):
        KasminaConv2dLayer(3, 8, 3, bias=False).copy_weights_from_conv2d(conv)


@pytest.mark.parametrize(
    ("build", "shape", "message"),
    [
        (lambda: KasminaConv2dLayer(3, 8, 3), (3, 5, 5), "must be 4D"),
        (lambda: KasminaConv2dLayer(3, 8, 3), (2, 4, 5, 5), "Input channels 4 != expected 3"),
        (lambda: KasminaLayerNormLayer(8), (2, 7), "last dimension 8, got"),
        (lambda: KasminaLayerNormLayer(8), (), "last dimension 8, got"),
        (lambda: KasminaBatchNorm1dLayer(8), (2, 8, 3, 3), "Expected 2D or 3D input, got 4D"),
        (lambda: KasminaBatchNorm2dLayer(8), (2, 8, 3), "Expected 4D input"),
        (lambda: KasminaBatchNorm2dLayer(8), (2, 7, 3, 3), "with 8 channels, got 7"),
    ],
)
def test_inputs_that_are_refused(
    build: Callable[[], KasminaLayer], shape: tuple[int, ...], message: str
) -> None:
    layer = build()
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(shape))
    assert layer.total_forward_calls == 0


def test_the_asynchronous_convolution_is_the_same_one() -> None:
    layer, x = AsyncKasminaConv2dLayer(3, 8, 3, enable_gradient_sync=False), torch.randn(2, 3, 5, 5)
    assert torch.equal(asyncio.run(layer.forward_async(x)), layer(x))
    assert layer.get_async_stats() == {"total_forward_calls": 2, "enable_gradient_sync": False}
    layer.cleanup()
    assert torch.equal(layer(x), layer.default_transform(x))


# Attention.


@pytest.mark.parametrize("kdim", [None, 5])
def test_attention_projections_are_views(kdim: int | None) -> None:
    layer = KasminaAttentionLayer(8, 2, kdim=kdim, vdim=kdim)
    q, k = torch.randn(4, 3, 8), torch.randn(4, 3, kdim or 8)
    layer(q, k)[0].square().sum().backward()
    base: Any = layer.default_transform
    for part in ("q", "k", "v"):
        view: nn.Linear = getattr(layer, f"{part}_proj")
        assert (view.out_features, view.in_features) == (8, 8 if part == "q" else kdim or 8)
        assert view.weight.grad is not None
        assert view.bias.grad is not None
        with torch.no_grad():
            view.weight.fill_(0.5)
            view.bias.fill_(0.25)
        assert float(getattr(layer, f"{part}_proj").weight.detach().mean()) == 0.5
    assert float(base.in_proj_bias.detach().mean()) == 0.25
    assert layer.out_proj is base.out_proj
    without = KasminaAttentionLayer(8, 2, bias=False)
    assert without.q_proj.bias is None
    assert without.q_proj.weight.grad is None


def test_attention_takes_masks_and_returns_weights() -> None:
    layer = KasminaAttentionLayer(8, 2, batch_first=True)
    x, mask = torch.randn(3, 4, 8), torch.tensor([[False, False, False, True]] * 3)
    out, weights = layer(x, key_padding_mask=mask)
    assert (out.shape, weights.shape) == ((3, 4, 8), (3, 4, 4))
    assert not bool(weights[..., 3].any())
    assert layer(x, need_weights=False)[1] is None
    assert layer(x, x, x, average_attn_weights=False)[1].shape == (3, 2, 4, 4)
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    _, weights = layer(x, attn_mask=causal, is_causal=True)
    assert not bool(weights[0, 0, 1:].any())


def test_attention_copies_and_errors() -> None:
    source, layer, x = (
        nn.MultiheadAttention(8, 2),
        KasminaAttentionLayer(8, 2),
        torch.randn(4, 3, 8),
    )
    layer.copy_weights_from_attention(source)
    assert torch.equal(layer(x)[0], source(x, x, x)[0])
    for bad, message in (
        (nn.Linear(8, 8), "must be a Multihead"),
        (nn.MultiheadAttention(4, 2), "!="),
    ):
        with pytest.raises(ValueError, match=message):
            layer.copy_weights_from_attention(bad)  # type: ignore[arg-type]  # the point
    assert torch.equal(layer(x)[0], source(x, x, x)[0])
    for embed, heads in ((8, 3), (8, 0)):
        with pytest.raises(ValueError, match="must be divisible by num_heads"):
            KasminaAttentionLayer(embed, heads)


@pytest.mark.parametrize("kdim", [None, 5])
def test_a_state_dict_of_before_loads_into_attention(kdim: int | None) -> None:
    source, layer = KasminaAttentionLayer(8, 2, kdim=kdim), KasminaAttentionLayer(8, 2, kdim=kdim)
    old = {"default_transform.weight": torch.zeros(24, 8)}
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        module: nn.Linear = getattr(source, part)
        old |= {f"{part}.weight": module.weight.detach(), f"{part}.bias": module.bias.detach()}
    layer.load_state_dict(old)
    q, k = torch.randn(4, 3, 8), torch.randn(4, 3, kdim or 8)
    v = torch.randn(4, 3, 8)
    assert torch.equal(layer(q, k, v)[0], source(q, k, v)[0])


# Norms.


def test_norm_members() -> None:
    layer = KasminaLayerNormLayer(8, eps=1e-4)
    assert layer.get_adaptation_stats() == {
        "active_adaptations": 0,
        "total_seeds": 4,
        "adaptation_strength": 0.0,
        "normalized_shape": (8,),
        "eps": 1e-4,
        "elementwise_affine": True,
    }
    graft(layer, [0, 1], "affine", 0.5)
    stats = layer.get_adaptation_stats()
    assert (stats["active_adaptations"], stats["adaptation_strength"]) == (2, 0.5)
    text = "normalized_shape=(8,), eps=0.0001, elementwise_affine=True, num_seeds=4"
    assert layer.extra_repr() == text
    batch = KasminaBatchNorm2dLayer(8, momentum=0.2)
    assert list(batch.get_adaptation_stats())[3:] == list(BATCH)
    assert batch.extra_repr().endswith(
        "momentum=0.2, affine=True, track_running_stats=True, num_seeds=4"
    )
    assert (batch.input_size, batch.output_size) == (8, 8)


def test_running_statistics_move_once_a_call_however_many_seeds_run() -> None:
    for layer, shape in (
        (KasminaBatchNorm1dLayer(8), (6, 8)),
        (KasminaBatchNorm2dLayer(8), (6, 8, 3, 3)),
    ):
        plain = type(layer.default_transform)(8)
        graft(layer, range(4), "affine", 0.5)
        for _ in range(3):
            x = torch.randn(shape)
            layer(x), plain(x)
        assert int(layer.num_batches_tracked) == 3
        assert torch.equal(layer.running_mean, plain.running_mean)
        assert torch.equal(layer.running_var, plain.running_var)


def test_norms_copy() -> None:
    norm, layer = nn.LayerNorm(8), KasminaLayerNormLayer(8)
    nn.init.normal_(norm.weight)
    layer.copy_weights_from_layernorm(norm)
    assert torch.equal(layer.weight, norm.weight)
    for mine, theirs in (
        (KasminaBatchNorm1dLayer(8), nn.BatchNorm1d(8)),
        (KasminaBatchNorm2dLayer(8), nn.BatchNorm2d(8)),
    ):
        assert theirs.running_mean is not None
        assert theirs.num_batches_tracked is not None
        nn.init.normal_(theirs.running_mean)
        theirs.num_batches_tracked.fill_(5)
        mine.copy_weights_from_batchnorm(theirs)
        assert torch.equal(mine.running_mean, theirs.running_mean)
        assert int(mine.num_batches_tracked) == 5
        with pytest.raises(ValueError, match="Source must be a BatchNorm"):
            mine.copy_weights_from_batchnorm(norm)
    with pytest.raises(ValueError, match="Source must be a LayerNorm"):
        layer.copy_weights_from_layernorm(nn.Linear(8, 8))  # type: ignore[arg-type]  # the point
    with pytest.raises(ValueError, match="weight: source"):
        layer.copy_weights_from_layernorm(nn.LayerNorm(4))


def test_around_takes_its_own_kind_alone() -> None:
    assert KasminaLayerNormLayer.around(nn.LayerNorm((3, 8))).output_size == 8
    with pytest.raises(KasminaError, match="give a Conv2d"):
        KasminaConv2dLayer.around(nn.Linear(3, 8))


@pytest.mark.parametrize("case", CASES)
def test_no_step_reads_a_number_from_the_device(case: str) -> None:
    """On meta there is none to read: ``.item()``, which layer norms called four times, raises."""
    build, shape = CASES[case]
    layer = build()
    graft(layer, [0, 3], "mlp", 0.6)
    layer.to("meta").train()
    out = first(layer(torch.empty(shape, device="meta")))
    out.sum().backward()
    assert out.device.type == "meta"
    assert layer.total_kernel_executions == 2

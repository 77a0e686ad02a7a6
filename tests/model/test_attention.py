"""Attention, and torch's fused encoder layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from host_cases import by_reference, wrapped_twin
from torch import nn

from kasmina_fx import (
    SeedLifecycle,
    kasmina_layers,
    reference,
    unkasminify,
)
from kasmina_fx.testing import graft


def test_the_projection_of_attention_is_left_alone() -> None:
    model: Any = nn.ModuleDict({"attend": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    wrapped_twin(model)
    assert list(kasmina_layers(model)) == ["fc"]
    assert isinstance(model["attend"].out_proj, nn.Linear)


def test_attention_may_be_a_target_itself() -> None:
    model: Any = nn.ModuleDict({"attend": nn.MultiheadAttention(8, 2, batch_first=True)}).double()
    wrapped_twin(model, targets=[nn.MultiheadAttention, nn.Linear])
    layers = kasmina_layers(model)
    assert list(layers) == ["attend"]
    graft(layers["attend"], [0, 2], "mlp")
    for mode in (True, False):
        model.train(mode)
        x = torch.randn(3, 4, 8, dtype=torch.float64)
        out, weights = model["attend"](x, x, x)
        expected, expected_weights = reference.forward(layers["attend"], x, x, x)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(weights, expected_weights)


def _encoder_layer(**kwargs: Any) -> Any:
    return nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.1, batch_first=True, dtype=torch.float64, **kwargs
    )


@pytest.mark.parametrize("activation", ["relu", "gelu", nn.GELU(), nn.ReLU()])
@pytest.mark.parametrize("grad", [False, True])
def test_seeds_of_an_encoder_layer_take_effect_in_eval(activation: Any, grad: bool) -> None:
    model = _encoder_layer(activation=activation).eval()
    setting = model.activation_relu_or_gelu
    assert setting in (1, 2)
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    wrapped_twin(model)
    layers = kasmina_layers(model)
    assert list(layers) == ["linear1", "linear2"]
    with torch.set_grad_enabled(grad):
        dormant = model(x)
        graft(layers["linear1"], [0, 1, 2, 3], "mlp", 1.0)
        out = model(x)
        assert float((out - dormant).detach().abs().max()) > 1e-3
        torch.testing.assert_close(out, by_reference(model, x))
    layers["linear1"].advance(range(4), SeedLifecycle.CULLED)
    unkasminify(model)
    assert model.activation_relu_or_gelu == setting
    torch.testing.assert_close(model(x), dormant)


def test_unkasminify_leaves_an_encoder_layer_that_was_never_wrapped_as_it_was() -> None:
    model: Any = nn.ModuleDict({"encode": _encoder_layer(), "fc": nn.Linear(8, 8)})
    model["encode"].activation_relu_or_gelu = 0  # the owner's own choice
    wrapped_twin(model, filter_fn=lambda module, fqn: fqn == "fc")
    unkasminify(model)
    assert model["encode"].activation_relu_or_gelu == 0


@pytest.mark.parametrize(
    "chosen",
    [["layers.0.linear1"], ["layers.1.linear1"], ["layers.0.linear2", "layers.1.linear1"]],
)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # the plain model's
def test_an_encoder_of_which_some_layers_are_wrapped_runs_in_eval(
    chosen: list[str], padded: bool
) -> None:
    model: Any = nn.TransformerEncoder(_encoder_layer(), 2).eval()
    assert model.use_nested_tensor
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    if padded:
        mask[1, 3:] = mask[2, 2:] = True
    with torch.no_grad():
        plain = model(x, src_key_padding_mask=mask)
        wrapped_twin(model, filter_fn=lambda module, fqn: fqn in chosen)
        layers = kasmina_layers(model)
        assert list(layers) == chosen
        # Padded places are zero or not by torch's choice of kernel: compare the others.
        torch.testing.assert_close(
            model(x, src_key_padding_mask=mask)[~mask], plain[~mask], atol=1e-10, rtol=1e-10
        )
        for layer in layers.values():
            graft(layer, [0, 1, 2, 3], "mlp", 1.0)
        out = model(x, src_key_padding_mask=mask)
        expected = by_reference(model, x, None, mask)
        assert float((out - plain)[~mask].abs().max()) > 1e-3
        torch.testing.assert_close(out[~mask], expected[~mask])
    for layer in layers.values():
        layer.advance(range(4), SeedLifecycle.CULLED)
    unkasminify(model)
    assert model.use_nested_tensor
    assert [block.activation_relu_or_gelu for block in model.layers] == [1, 1]


def test_an_encoder_layer_whose_attention_is_wrapped_runs_in_eval() -> None:
    model = _encoder_layer().eval()
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    with torch.no_grad():
        plain = model(x)
        wrapped_twin(model, targets=[nn.MultiheadAttention])
        torch.testing.assert_close(model(x), plain)
        graft(kasmina_layers(model)["self_attn"], [0, 1], "mlp", 1.0)
        assert float((model(x) - plain).abs().max()) > 1e-3


def test_decoder_layers_may_be_wrapped() -> None:
    model = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True, dtype=torch.float64).eval()
    x, memory = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    plain = model(x, memory)
    wrapped_twin(model)
    torch.testing.assert_close(model(x, memory), plain)
    for layer in kasmina_layers(model).values():
        graft(layer, 0, "mlp")
    torch.testing.assert_close(model(x, memory), by_reference(model, x, memory))

"""Growth in children of torch's own modules, where shapes would be static, compiles once."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kasmina_fx import kasmina_layers, kasminify, reference
from kasmina_fx.physical.graph_inputs import SHOWN
from kasmina_fx.testing import RecordingBackend, assert_no_recompiles, graft

pytestmark = pytest.mark.untraced
WIDE = 8


class Attends(nn.Module):
    """A module of one's own that owns an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDE, 2, batch_first=True)
        self.norm = nn.LayerNorm(WIDE)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return out


class Decodes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(WIDE, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x, x)
        return out


def encoder() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDE, 2, 16, dropout=0.0, batch_first=True)


CASES: dict[str, tuple[Callable[[], nn.Module], type[nn.Module], str]] = {
    "encoder linear": (encoder, nn.Linear, "linear1"),
    "encoder norm": (encoder, nn.LayerNorm, "norm2"),
    "encoder attention": (encoder, nn.MultiheadAttention, "self_attn"),
    "encoder stack": (
        lambda: nn.TransformerEncoder(encoder(), 2, enable_nested_tensor=False),
        nn.Linear,
        "layers.1.linear2",
    ),
    "decoder linear": (Decodes, nn.Linear, "layer.linear1"),
    "decoder attention": (Decodes, nn.MultiheadAttention, "layer.multihead_attn"),
    "an owner of attention": (Attends, nn.MultiheadAttention, "attention"),
}


@pytest.mark.parametrize("case", CASES)
def test_ten_sizes_are_one_growing_graph(case: str) -> None:
    make, target, name = CASES[case]
    model = kasminify(make(), num_seeds=8, targets=[target], compile=False)
    layer, x = kasmina_layers(model)[name], torch.randn(2, 3, WIDE)
    backend = RecordingBackend("eager")
    run: Any = torch.compile(model, backend=backend, fullgraph=True)
    graft(layer, [0], "affine")
    run(x).sum().backward()
    assert backend.compiles == 1
    with assert_no_recompiles():
        for seed in range(1, 8):
            graft(layer, [seed], "affine", alpha=1.0)
            with torch.no_grad():
                for stack in layer.blueprint_parameters():
                    stack.add_(0.1)
            run(x).sum().backward()
        out = run(x)
    with reference.reference_mode(model):
        torch.testing.assert_close(out, model(x))


def test_layers_elsewhere_are_reached_through_their_model_and_share_code() -> None:
    before = len(SHOWN)
    backend = RecordingBackend("eager")

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(x)
            return out

    for _ in range(10):  # more than Dynamo compiles for one piece of code
        model = kasminify(Own(), num_seeds=3, compile=False)
        graft(kasmina_layers(model)["fc"], [0], "affine")
        torch.compile(model, backend=backend)(torch.randn(2, 4))
    assert backend.compiles == 1
    assert len(SHOWN) == before


def test_a_copy_has_a_key_of_its_own_and_keys_go_with_their_layers() -> None:
    before = set(SHOWN)
    model = kasminify(encoder(), num_seeds=4, compile=False)
    twin = copy.deepcopy(model)
    keys = [layer.kasmina.key for m in (model, twin) for layer in kasmina_layers(m).values()]
    assert len(set(keys)) == 4
    assert set(SHOWN) == before | set(keys)
    layer, other = (kasmina_layers(m)["linear1"] for m in (model, twin))
    graft(other, [0], "affine")
    assert len(SHOWN[str(other.kasmina.key)].params) == 2
    assert not SHOWN[str(layer.kasmina.key)].params
    del model, twin, layer, other
    gc.collect()
    assert set(SHOWN) == before

"""Sizes of a bank that are one number are one symbol of a graph."""

from __future__ import annotations

import pytest
import torch
from graph_cases import OneLayer, layer_of, wrapped

from kasmina_fx.testing import RecordingBackend, graft


def test_a_bank_brings_four_symbols() -> None:
    model, backend = wrapped(OneLayer(), seeds=6), RecordingBackend("eager")
    graft(layer_of(model), range(4), "mlp")
    torch.compile(model, backend=backend, fullgraph=True)(torch.randn(3, 8))
    nodes = backend.before[-1].graph.find_nodes(op="placeholder")
    sizes = [n for n in nodes if isinstance(n.meta.get("example_value"), torch.SymInt)]
    # Slots of tables, places in TRAINING, places that run, and slots of the four stacks.
    assert len(sizes) == 4


def test_stacks_of_two_sizes_are_refused() -> None:
    model = wrapped(OneLayer(), seeds=6)
    layer = layer_of(model)
    graft(layer, [0, 1], "mlp")
    asked = layer.kasmina.shown.blend_arguments(torch.randn(3, 12), layer.kasmina.layout_text, True)
    asked.share_sizes()
    torn = asked._replace(params=[asked.params[0][:1], *asked.params[1:]])
    with pytest.raises(RuntimeError):
        torn.share_sizes()

"""Every name that older code calls: there, with its arguments, their order and their defaults.

What the members do and refuse is in the other files of this folder; here is what no call of theirs
would notice, and the document that people move over by.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kasmina_fx import compat

EMPTY = inspect.Parameter.empty
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "migration.md"

#: Class: member: its arguments and their defaults. Constructors of the special layers are in
#: test_variants.py.
MEMBERS: dict[str, dict[str, dict[str, Any]]] = {
    "KasminaLayer": {
        "__init__": {
            "input_size": EMPTY,
            "output_size": EMPTY,
            "num_seeds": 4,
            "cache_size_mb": 128,
            "telemetry_enabled": True,
            "layer_name": "kasmina_layer",
            "oona_client": None,
        },
        "load_kernel": {"seed_idx": EMPTY, "artifact_id": EMPTY},
        "unload_kernel": {"seed_idx": EMPTY},
        "set_seed_alpha": {"seed_idx": EMPTY, "alpha": EMPTY},
        "get_layer_stats": {},
        "find_compatible_kernels": {"max_memory_mb": None},
        "_compute_health_score": {"output": EMPTY},
    },
    "KasminaStateLayout": {
        "get_active_seeds": {},
        "get_dormant_seeds": {},
        "transition_seed_state": {"seed_idx": EMPTY, "new_state": EMPTY, "kernel_id": None},
        "increment_error_count": {"seed_idx": EMPTY},
        "update_telemetry": {"seed_idx": EMPTY, "latency_us": EMPTY, "health_score": EMPTY},
        "get_stats": {},
        "reset_seed": {"seed_idx": EMPTY},
        "has_active_seeds": {},
        "get_active_count": {},
    },
    "KasminaConv2dLayer": {
        "forward": {"x": EMPTY},
        "copy_weights_from_conv2d": {"source_conv": EMPTY},
        "get_layer_stats": {},
    },
    "AsyncKasminaConv2dLayer": {
        "forward": {"x": EMPTY},
        "forward_async": {"x": EMPTY},
        "get_async_stats": {},
        "cleanup": {},
    },
    "KasminaAttentionLayer": {"copy_weights_from_attention": {"original_attention": EMPTY}},
    "KasminaLayerNormLayer": {
        "forward": {"x": EMPTY},
        "copy_weights_from_layernorm": {"layer_norm": EMPTY},
        "get_adaptation_stats": {},
        "extra_repr": {},
    },
    "KasminaBatchNorm1dLayer": {
        "forward": {"x": EMPTY},
        "copy_weights_from_batchnorm": {"batch_norm": EMPTY},
    },
    "KasminaBatchNorm2dLayer": {
        "forward": {"x": EMPTY},
        "copy_weights_from_batchnorm": {"batch_norm": EMPTY},
        "get_adaptation_stats": {},
        "extra_repr": {},
    },
    "MorphableModel": {
        "__init__": {"wrapped_model": EMPTY, "kasmina_layers": EMPTY, "original_model": None},
        "load_kernel": {"layer_name": EMPTY, "seed_idx": EMPTY, "artifact_id": EMPTY},
        "unload_kernel": {"layer_name": EMPTY, "seed_idx": EMPTY},
        "get_layer_names": {},
        "get_layer_stats": {"layer_name": None},
        "get_model_stats": {},
        "set_seed_alpha": {"layer_name": EMPTY, "seed_idx": EMPTY, "alpha": EMPTY},
        "enable_telemetry": {"enabled": True},
        "compare_with_original": {"x": EMPTY},
    },
}
COROUTINES = {"load_kernel", "unload_kernel", "forward_async"}
#: Arguments whose names the table of older calls does not give: they are given by place.
BY_PLACE = ("copy_weights_from_layernorm", "copy_weights_from_batchnorm")
#: What every special layer takes behind its own arguments.
SEEDS = {"num_seeds": 4, "cache_size_mb": 128, "telemetry_enabled": True}


@pytest.mark.parametrize(
    ("cls", "member"), [(cls, member) for cls, members in MEMBERS.items() for member in members]
)
def test_members_have_the_arguments_of_before(cls: str, member: str) -> None:
    method = getattr(getattr(compat, cls), member)
    found = inspect.signature(method).parameters.values()
    given = {p.name: p.default for p in found if p.name != "self"}
    wanted = MEMBERS[cls][member]
    if member in BY_PLACE:
        assert list(given.values()) == list(wanted.values())
    else:
        assert list(given.items()) == list(wanted.items())
    assert {p.kind for p in found} <= {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert inspect.iscoroutinefunction(method) == (member in COROUTINES)


LAYERS = sorted(name for name in compat.__all__ if re.fullmatch("(Async)?Kasmina.*Layer", name))


def test_special_layers_are_older_layers_and_end_in_the_same_arguments() -> None:
    assert len(LAYERS) == 7
    for name in LAYERS:
        cls = getattr(compat, name)
        assert issubclass(cls, compat.KasminaLayer)
        given = {n: p.default for n, p in inspect.signature(cls).parameters.items()}
        assert list(given)[-5:-1] == [*SEEDS, "layer_name"] or "layer_name" in list(given)[-2:]
        assert given.items() >= SEEDS.items()
        assert isinstance(given["layer_name"], str)


def test_the_stats_have_all_keys_of_before() -> None:
    stats = compat.KasminaLayer(8, 8).get_layer_stats()
    assert stats.keys() >= {
        "layer_name",
        "total_forward_calls",
        "total_kernel_executions",
        "kernel_execution_ratio",
        "state_stats",
        "cache_stats",
        "error_recovery_stats",
        "telemetry_enabled",
    }


def test_layers_take_their_input_by_the_name_of_before() -> None:
    x = torch.randn(5, 8)
    linear, model = compat.KasminaLayer(8, 12), compat.wrap(nn.Sequential(nn.Linear(8, 8)))
    assert torch.equal(linear(x=x), linear(x))
    assert torch.equal(model(x=x), model(x))
    own = compat.KasminaLayer.around(nn.Linear(8, 8))
    assert torch.equal(own(input=x), own(x))  # and by that of the module

    class Scaled(nn.Linear):
        def forward(self, input: Tensor, x: float = 1.0) -> Tensor:
            return super().forward(input) * x

    scaled = compat.KasminaLayer.around(Scaled(8, 8))
    assert torch.equal(scaled(input=x, x=2.0), 2.0 * scaled(x))


def test_no_client_is_made_and_telemetry_is_what_was_asked_for() -> None:
    for asked in (True, False):
        layer = compat.KasminaLayer(8, 8, telemetry_enabled=asked)
        assert (layer.oona_client, layer.telemetry_enabled) == (None, asked)


GONE = (
    "_execute_with_kernels",
    "_execute_with_kernels_sync",
    "_execute_kernel_real",
    "_execute_kernel_placeholder",
    "_blend_outputs",
    "_update_telemetry",
    "_handle_kernel_load_failure",
)


def test_private_members_that_are_gone_are_named_in_the_document() -> None:
    text = DOCUMENT.read_text()
    for name in GONE:
        assert not hasattr(compat.KasminaLayer, name)
        assert f"`{name}`" in text
    assert "`_publish_*`" in text
    assert not [name for name in dir(compat.KasminaLayer) if name.startswith("_publish")]


# The document.


def import_rows() -> list[tuple[str, str]]:
    """The statements of both columns of the table of imports."""
    _, _, section = DOCUMENT.read_text().partition("## Imports\n")
    rows = [line.split("|")[1:3] for line in section.partition("\n## ")[0].splitlines()]
    found = [
        (re.findall("`([^`]*)`", a), re.findall("`([^`]*)`", b)) for a, b in filter(None, rows)
    ]
    return [(before[0], now[0]) for before, now in found if before and now]


def bound(statement: str) -> set[str]:
    """The names that an import statement makes."""
    (node,) = ast.parse(statement).body
    assert isinstance(node, (ast.Import, ast.ImportFrom)), statement
    return {alias.asname or alias.name for alias in node.names}


def test_the_table_of_imports_holds() -> None:
    rows = import_rows()
    assert len(rows) >= 9
    for before, now in rows:
        assert bound(now) >= bound(before), before
        exec(now, {})
    assert {name for before, _ in rows for name in bound(before)} >= {*LAYERS, "esper"}


PROGRAM = """
import asyncio
import torch
import esper
from torch import nn
from esper.core.model_wrapper import wrap, unwrap, MorphableModel
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.state_layout import KasminaStateLayout, SeedLifecycleState

model = wrap(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)), seeds_per_layer=2)
assert isinstance(model, MorphableModel)
assert isinstance(esper.wrap(nn.Linear(2, 2)), esper.MorphableModel)
name = model.get_layer_names()[0]
layer = model.kasmina_layers[name]
assert isinstance(layer, KasminaLayer) and isinstance(layer.state_layout, KasminaStateLayout)

x, y = torch.randn(32, 6), torch.randn(32, 4)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
losses = []
for step in range(20):
    if step == 5:
        layer.state_layout.transition_seed_state(0, SeedLifecycleState.ACTIVE)
        model.set_seed_alpha(name, 0, 0.5)
    loss = nn.functional.mse_loss(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

loaded = asyncio.run(model.load_kernel(name, 1, "not-there"))
stats = model.get_model_stats()
try:
    asyncio.run(model.unload_kernel(name, 99))
except ValueError as error:
    refused = str(error)
asyncio.run(model.unload_kernel(name, 0))
plain = unwrap(model)
"""


def moved(program: str) -> str:
    """Change the import lines of a program by the table, and nothing else."""
    table = dict(import_rows())
    return "\n".join(table.get(line, line) for line in program.splitlines())


def test_a_program_runs_when_only_its_import_lines_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KASMINA_FX_STORE", str(tmp_path))
    program = moved(PROGRAM)
    assert not re.search(r"(from|import) esper", program)
    changed = [
        (a, b) for a, b in zip(PROGRAM.splitlines(), program.splitlines(), strict=True) if a != b
    ]
    assert len(changed) == 4
    assert all(a.startswith(("from ", "import ")) for a, _ in changed)
    names: dict[str, Any] = {}
    exec(program, names)
    assert names["losses"][-1] < names["losses"][0]
    assert names["loaded"] is False
    assert names["refused"].startswith("Invalid seed index: 99")
    assert names["stats"]["active_seeds"] == 1
    assert names["stats"]["total_forward_calls"] == 20
    assert type(names["plain"]) is nn.Sequential
    assert type(names["plain"][0]) is nn.Linear


def test_two_loads_at_once_in_one_loop(tmp_path: Path) -> None:
    store = compat.LocalStore(tmp_path)
    for name in ("a", "b"):
        store.save(name, "affine", 2, {"scale": torch.ones(2), "shift": torch.ones(2)})
    layer = compat.KasminaLayer(8, 8)
    layer.kernel_cache.store = store

    async def both() -> tuple[bool, bool]:
        return await asyncio.gather(layer.load_kernel(0, "a"), layer.load_kernel(1, "b"))

    assert all(asyncio.run(both()))
    assert layer.state_layout.get_active_seeds().tolist() == [True, True, False, False]

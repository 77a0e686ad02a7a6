"""Files made of a model run in a process that can't import the package."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from folded_cases import Root, fossils
from torch import Tensor, nn

from kasmina_fx import SeedLifecycle, finalize, kasmina_layers, kasminify
from kasmina_fx.blueprints import register
from kasmina_fx.testing import graft

S = SeedLifecycle
#: Other rows than a file was made with.
X: Final = torch.linspace(-2, 2, 42).view(7, 6)
ROWS: Final = ({0: torch.export.Dim("rows", min=2)},)

#: What a process runs: it reads the inputs, runs the file and compares.
RUN: Final = """
import sys
sys.modules["kasmina_fx"] = None
try:
    import kasmina_fx
except ImportError:
    pass
else:
    raise AssertionError("the package can be imported")
import torch
x, want = torch.load("case.pt")
{load}
torch.testing.assert_close(run(x), want, atol=1e-5, rtol=1e-5)
assert not [name for name in sys.modules if name.startswith("kasmina_fx.")]
print("as it should be")
"""
LOAD: Final = {
    "export": "run = torch.export.load('model').module()",
    "trace": "run = torch.jit.load('model')",
    "aot": "run = torch._inductor.aoti_load_package('model.pt2')",
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
run = lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
""",
}


def program_of(model: nn.Module) -> Any:
    program = torch.export.export(model, (X[:3],), dynamic_shapes=ROWS)
    assert "kasmina." not in str(program.graph_module.code)
    assert not program.graph_signature.buffers_to_mutate
    return program


def export(model: nn.Module, folder: Path) -> None:
    torch.export.save(program_of(model), folder / "model")


def trace(model: nn.Module, folder: Path) -> None:
    torch.jit.save(torch.jit.trace(model, X[:3]), folder / "model")


def onnx(model: nn.Module, folder: Path) -> None:
    made = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    torch.onnx.export(
        model, (X[:3],), folder / "model.onnx", dynamo=True, dynamic_shapes=ROWS, verbose=False
    )
    loaded = made.load(folder / "model.onnx")
    assert {node.domain for node in loaded.graph.node} <= {"", "ai.onnx"}


def aot(model: nn.Module, folder: Path) -> None:
    torch._inductor.aoti_compile_and_package(
        program_of(model), package_path=str(folder / "model.pt2")
    )


def grown(stage: SeedLifecycle) -> Any:
    """Several kinds, shared and private ones, and a module of a user's."""
    torch.manual_seed(0)
    kind = register(lambda size: nn.Sequential(nn.LayerNorm(size), nn.Linear(size, size)))
    model = kasminify(Root(nn.Linear(6, 12), nn.GELU()), num_seeds=4, compile=False)
    layer = kasmina_layers(model)["0"]
    fossils(layer, 2, "mlp", 1.0)
    graft(layer, [0, 1], layer.register_blueprint("bottleneck"), 0.6, stage)
    graft(layer, 3, kind, 0.7, stage)
    with torch.no_grad():
        for stack in layer.blueprint_parameters(False):
            stack.normal_(std=0.5)
    return model.eval()


def small(stage: SeedLifecycle) -> Any:
    """One layer with one kind: what AOTInductor compiles takes its time."""
    model = kasminify(Root(nn.Linear(6, 8), nn.Tanh()), num_seeds=4, compile=False)
    graft(kasmina_layers(model)["0"], [0, 2], "mlp", 0.6, stage)
    return model.eval()


def assert_runs_alone(
    make: Callable[[nn.Module, Path], None], model: nn.Module, folder: Path
) -> None:
    with torch.no_grad():
        want: Tensor = model(X)
    make(model, folder)
    torch.save((X, want), folder / "case.pt")
    code = RUN.replace("{load}", LOAD[make.__name__])
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "as it should be", done.stderr


quiet = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning",
    "ignore::FutureWarning:onnxscript",
    "ignore::DeprecationWarning:onnxscript",
    "ignore::DeprecationWarning:torch.onnx",
)
each_format = pytest.mark.parametrize("make", [export, trace, onnx], ids=lambda make: make.__name__)


@quiet
@each_format
def test_a_finalised_model_runs_where_the_package_is_not(
    make: Callable[[nn.Module, Path], None], tmp_path: Path
) -> None:
    assert_runs_alone(make, finalize(grown(S.FOSSILIZED)), tmp_path)


@pytest.mark.slow
@quiet
@each_format
def test_a_model_that_still_grows_runs_where_the_package_is_not(
    make: Callable[[nn.Module, Path], None], tmp_path: Path
) -> None:
    assert_runs_alone(make, grown(S.GRAFTING), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("final", [True, False], ids=["finalised", "still growing"])
def test_a_package_of_aotinductor_runs_where_the_package_is_not(
    final: bool, tmp_path: Path
) -> None:
    model = finalize(small(S.FOSSILIZED)) if final else small(S.GRAFTING)
    assert_runs_alone(aot, model, tmp_path)

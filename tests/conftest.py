"""What all tests share: a fixed seed, and registries that a test may add to."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from untraced import keep_compilers_from_coverage, untraced

# Before anything imports Triton, whose own functions become the interpreter's then.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# On a GPU Inductor keeps on disk how it tuned its own reductions, by what was quickest beside other
# workers; one that reads another's in between runs the same graph to other bits.
if torch.cuda.is_available() and "PYTEST_XDIST_WORKER" in os.environ:
    own = Path(tempfile.gettempdir()) / f"kasmina_fx_{os.environ['PYTEST_XDIST_WORKER']}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(own))

from kasmina_fx.blueprints import registry as blueprints
from kasmina_fx.grafting import registry as grafting

# Two slow cores: a deadline in milliseconds says nothing about the code.
settings.register_profile("kasmina_fx", deadline=None, max_examples=50)
settings.load_profile("kasmina_fx")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Take the tracer off; pytest-cov's own marker does nothing in workers (pytest-cov 7.1)."""
    if sys.gettrace() is not None:
        keep_compilers_from_coverage()
    with untraced() if item.get_closest_marker("untraced") else nullcontext():
        return (yield)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_compiled_code() -> None:
    """Models of one class share a frame and its limit of recompiles: start each test without."""
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _own_registries() -> Iterator[None]:
    """Blueprints and strategies that a test registers are gone after it: a name is taken once."""
    kinds, strategies = dict(blueprints._BY_KIND), list(grafting._STRATEGIES)
    yield
    blueprints._BY_KIND.clear()
    blueprints._BY_KIND.update(kinds)
    grafting._STRATEGIES[:] = strategies


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a test may write a file of its own."""
    return tmp_path / "net.pt"

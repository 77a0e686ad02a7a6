"""What all tests share: a fixed seed, and a blueprint registry that a test may add to."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator

import pytest
import torch
from hypothesis import settings

from kasmina_fx.blueprints import registry

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
    tracer = sys.gettrace()
    if item.get_closest_marker("untraced"):
        sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracer)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_compiled_code() -> None:
    """Models of one class share a frame and its limit of recompiles: start each test without."""
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _own_registry() -> Iterator[None]:
    """Blueprints that a test registers are gone after it: their names are taken once a process."""
    before = dict(registry._BY_KIND)
    yield
    registry._BY_KIND.clear()
    registry._BY_KIND.update(before)

"""A store of kernels for each test, and how they are loaded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kasmina_fx.compat import (
    KasminaLayer,
    LocalStore,
    use_store,
)

AFFINE = {"scale": torch.tensor([1.0, 2.0]), "shift": torch.tensor([0.5, -0.5])}


@pytest.fixture(autouse=True)
def store(tmp_path: Path) -> Iterator[LocalStore]:
    kept = LocalStore(tmp_path / "kernels")
    use_store(kept)
    yield kept
    use_store(None)


def load(layer: KasminaLayer, seed: int, artifact_id: str) -> bool:
    return asyncio.run(layer.load_kernel(seed, artifact_id))


def edit(path: Path, **changes: Any) -> None:
    whole = json.loads(path.read_text())
    whole.update(changes)
    path.write_text(json.dumps(whole))

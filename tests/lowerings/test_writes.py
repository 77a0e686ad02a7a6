"""What kernels declare to write is what they write: torch takes their word for it."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from kernel_cases import STAGES, Blend, dense, fused, interpreter
from torch import Tensor

from kasmina_fx._torch import triton
from kasmina_fx._torch.launches import written_arguments
from kasmina_fx.lowerings import Wanted, launches, lowering_named, rows, sample, tiles
from kasmina_fx.lowerings.plan import KERNELS

__all__ = ["interpreter"]
pytestmark = pytest.mark.usefixtures("interpreter")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], list[set[str]]]:
    """Of each kernel that is launched: what it declares, what it changed, and its tensors."""
    found: dict[tuple[str, str], list[set[str]]] = {}

    class Launch:
        def __init__(self, module: str, name: str, _warps: int | None = None) -> None:
            self.key, self.kernel = (module, name), triton.launching(module, name)

        def __getitem__(self, grid: Any) -> Any:
            def launch(*args: Any, **options: Any) -> None:
                function = self.kernel.fn
                given = dict(zip(inspect.signature(function).parameters, args, strict=True))
                tensors = {n: t for n, t in given.items() if isinstance(t, Tensor) and t.numel()}
                before = {name: t.clone() for name, t in tensors.items()}
                self.kernel[grid](*args, **options)
                changed = {n for n, t in tensors.items() if not same(t, before[n])}
                declared = set(written_arguments(function, given)) & set(tensors)
                found.setdefault(self.key, []).append(declared)
                # One that was given twice changes under both names.
                written = {given[n].data_ptr() for n in declared}
                assert {given[n].data_ptr() for n in changed} <= written
                found[self.key].append(changed)

            return launch

    for module in (launches, rows, sample, tiles):
        monkeypatch.setattr(module, "launching", Launch)
    return found


def same(a: Tensor, b: Tensor) -> bool:
    return bool(torch.equal(a.view(torch.uint8), b.view(torch.uint8))) if a.dim() else bool(a == b)


@pytest.mark.parametrize("kind", KERNELS)
def test_what_is_written_is_declared(
    kind: str, seen: dict[tuple[str, str], list[set[str]]]
) -> None:
    case = Blend([4] * 9, dict.fromkeys(STAGES, kind))
    case.run(fused, torch.float32)
    modules = [KERNELS[kind].module]
    if KERNELS[kind].rows:
        case.run(dense("gelu"), torch.float32)
        asked, _ = case.arguments()
        lowering_named("dense").blend(asked, Wanted(notes=False, then="relu", sample=(1, 16)))
        modules.append(f"rows_{modules[0]}")
    names = {(m, n) for m in modules for n in ("forward", "backward")}
    assert set(seen) == {*names, ("notes", "report"), ("finish", "finish")}
    for key, sets in seen.items():
        declared, changed = sets[0], sets[1]
        assert changed, key
        assert changed <= declared

"""How Triton lays a tile's loads over the lanes of a warp: compiled for a GPU, on any machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

#: Prints, for each access to a block of 16 rows, the order of its layout's dims: columns first is
#: ``[1, 0]``. In a process of its own: in this one kernels are functions of the interpreter.
PROGRAM = r"""
import json, re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kasmina_fx.lowerings.triton import affine, bottleneck, two_layer

POINTERS = {
    "*bf16": "out kept dy w1 b1 w2 b2 scale shift gains shifts",
    "*fp32": "said sums alpha _loss_scale loss_scale",
    "*i64": "order seeds roles modes _positions _modes",
}
TYPES = {name: kind for kind, names in POINTERS.items() for name in names.split()}
found = {}
for module in (two_layer, affine, bottleneck):
    for name in ("forward", "backward"):
        for c in (3, 9):
            kernel = getattr(module, name)
            names = kernel.arg_names
            known = dict(c=c, h=2 * c, PER=16 // c, TILE=16, HIDDEN=32, ROWS=16, ACT=1, BIAS=1)
            known |= dict(RESIDUAL=0, KEEP=1, NOTES=1, DOT=1, EVEN=1, ALONE=0)
            known |= dict(P={"two_layer": 4 * c * c + 3 * c, "affine": 2 * c}.get(
                module.__name__.split(".")[-1], 4 * c * c + 5 * c) + 2)
            types = {n: "constexpr" if n in known else TYPES.get(n, "i32") for n in names}
            constants = {(names.index(n),): v for n, v in known.items() if n in names}
            even = [n for n in names if n in TYPES or n == "features"]
            attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in even}
            source = ASTSource(kernel, types, constants, attributes)
            made = triton.compile(
                source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1}
            )
            text = made.asm["ttgir"]
            layouts = dict(re.findall(r"^(#\w+) = .*order = (\[.*?\])", text, re.M))
            blocks = re.findall(
                r"tt\.(?:load|store) .*tensor<16x16x!tt.ptr<bf16>, (#\w+)>", text
            )
            found[f"{kernel.__module__.split('.')[-1]} {name} {c}"] = [layouts[b] for b in blocks]
print(json.dumps(found))
"""


@pytest.mark.untraced
def test_lanes_lie_along_rows_where_no_vector_fits_a_chunk() -> None:
    """Triton 3.6 lays them down 16 rows, unless it is told of contiguous columns and keeps that."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found: dict[str, list[Any]] = json.loads(ran.stdout.splitlines()[-1])
    assert len(found) == 12
    for kernel, orders in found.items():
        assert len(orders) >= 3, kernel
        assert set(orders) == {"[1, 0]"}, kernel

"""What Triton makes of the kernels of active tiles for an H100, on a machine without one.

    python benchmarks/compiled.py [--chunks 3 4 9 12] [--dtype bfloat16|float32] [--json]

A line for each kernel of `mlp`, `affine` and `bottleneck`, and each chunk size, in tiles of 16
columns and a warp: registers of a thread, instructions of PTX, the layouts of its accesses to
blocks of 16 rows (whose lanes lie along rows: "rows", or down columns: "columns"; of how many
numbers each), and a digest of the PTX: the same before and after a change that should change
nothing. Which release of Triton it is says more than the machine: 3.6 comes with torch 2.11.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # or kernels are functions of the interpreter

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kasmina_fx.lowerings.triton import affine, bottleneck, two_layer

TARGET, TILE, HIDDEN, ROWS = GPUTarget("cuda", 90, 32), 16, 32, 16
DTYPES = {"bfloat16": ("*bf16", 1), "float32": ("*fp32", 0)}
FLOATS = ["out", "kept", "dy", "w1", "b1", "w2", "b2", "scale", "shift", "gains", "shifts"]
TYPES = {
    **dict.fromkeys(["said", "sums", "alpha", "_loss_scale", "loss_scale"], "*fp32"),
    **dict.fromkeys(["order", "seeds", "roles", "modes", "_positions", "_modes"], "*i64"),
}
#: Modules, and how many numbers a slot has for a chunk of so many features.
MODULES: dict[str, tuple[Any, Any]] = {
    "two_layer": (two_layer, lambda c: 4 * c * c + 3 * c),
    "affine": (affine, lambda c: 2 * c),
    "bottleneck": (bottleneck, lambda c: 4 * c * c + 5 * c),
}


def compiled(module: str, name: str, chunk: int, dtype: str) -> Any:
    """Compile a kernel as a launch for chunks of so many features would."""
    (owner, numbers), (pointer, dot) = MODULES[module], DTYPES[dtype]
    kernel = getattr(owner, name)
    names = kernel.arg_names
    even = next(n for n in (8, 4, 2, 1) if chunk % n == 0)
    known = {"c": chunk, "h": 2 * chunk, "PER": TILE // chunk, "TILE": TILE, "HIDDEN": HIDDEN}
    known |= {"ROWS": ROWS, "ACT": 1, "BIAS": 1, "RESIDUAL": 0, "KEEP": 1, "NOTES": 1, "DOT": dot}
    known |= {"EVEN": even, "ALONE": 0, "P": numbers(chunk) + 2}
    types = TYPES | dict.fromkeys(FLOATS, pointer)
    signature = {n: "constexpr" if n in known else types.get(n, "i32") for n in names}
    constants = {(names.index(n),): value for n, value in known.items() if n in names}
    aligned = [n for n in names if n in types or n == "features"]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGET, options={"num_warps": 1})


def layouts(text: str) -> Counter[str]:
    """Count the layouts of what loads and stores a block of rows, in Triton's GPU dialect."""
    known = re.findall(r"^(#\w+) = .*sizePerThread = \[1, (\d+)\].*order = \[(\d)", text, re.M)
    named = {name: f"{('columns', 'rows')[int(first)]} x{wide}" for name, wide, first in known}
    block = rf"tt\.(?:load|store) .*tensor<{ROWS}x{TILE}x!tt.ptr<\w+>, (#\w+)>"
    return Counter(named.get(found, "other") for found in re.findall(block, text))


def registers(cubin: bytes) -> int | None:
    """Return the registers of a thread, if NVIDIA's tool for that is here."""
    near = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    tool = str(near) if os.access(near, os.X_OK) else shutil.which("cuobjdump")
    if tool is None:
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        asked = [tool, "--dump-resource-usage", file.name]
        told = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    found = re.search(r"REG:(\d+)", told)
    return int(found[1]) if found else None


def instructions(ptx: str) -> list[str]:
    """Return what is computed, without comments and what debuggers read."""
    lines = [line.split("//")[0].strip() for line in ptx.split(".section")[0].splitlines()]
    return [line for line in lines if line and not line.startswith((".loc", ".file", "$L__"))]


def main() -> int:
    parser = argparse.ArgumentParser(description="What Triton compiles for an H100, without one.")
    parser.add_argument("--chunks", type=int, nargs="+", default=[3, 4, 9, 12], metavar="N")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--json", action="store_true", help="print a list instead of a table")
    args = parser.parse_args()
    found = []
    for module in MODULES:
        for name in ("forward", "backward"):
            for chunk in args.chunks:
                made = compiled(module, name, chunk, args.dtype)
                text = instructions(made.asm["ptx"])
                row = {"kernel": f"{module} {name}", "chunk": chunk}
                row |= {"registers": registers(made.asm["cubin"]), "instructions": len(text)}
                row["layouts"] = dict(layouts(made.asm["ttgir"]))
                row["digest"] = hashlib.sha256("\n".join(text).encode()).hexdigest()[:12]
                found.append(row)
    if args.json:
        print(json.dumps(found))
        return 0
    print(f"triton {triton.__version__}, {TARGET}, {args.dtype}\n")
    print(f"| {' | '.join(found[0])} |\n|---|{'---:|' * 3}---|---|")
    for row in found:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What Triton makes of the kernels of active tiles for an H100, on a machine without one.

    python benchmarks/compiled.py [--chunks 3 4 9 12] [--dtype bfloat16|float32] [--json]

A line for each kernel of `mlp`, `affine` and `bottleneck`, and each chunk size: registers of a
thread, instructions of PTX, how often Triton was told, and took, that columns are contiguous, the
layouts of accesses to blocks of 16 rows (whose lanes lie along rows: "rows", or down columns:
"columns"; of how many numbers each), and a digest of the PTX: the same before and after a change
that should change nothing. The release of Triton matters: 3.6 comes with torch 2.11.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # or kernels are functions of the interpreter

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kasmina_fx.lowerings.launches import DOTS, even
from kasmina_fx.lowerings.plan import KERNELS, Plan
from kasmina_fx.lowerings.triton import affine, bottleneck, two_layer

TARGET = GPUTarget("cuda", 90, 32)
MODULES = {module.__name__.rpartition(".")[2]: module for module in (two_layer, affine, bottleneck)}
#: Their blueprints here, and the shapes of a slot in its stacks, for chunks of c and h features.
BLUEPRINTS: dict[str, Callable[[int, int], list[int]]] = {
    "mlp": lambda c, h: [h * c, h, c * h, c],
    "affine": lambda c, h: [c, c],
    "bottleneck": lambda c, h: [c, c, h * c, h, c * h, c],
}
ROWS, WARPS = 16, 1  # of a block, and of a program: as in tiles.py, of tiles that are not wide
DTYPES = {"bfloat16": "*bf16", "float32": "*fp32"}
FLOATS = ["out", "kept", "dy", "w1", "b1", "w2", "b2", "scale", "shift", "gains", "shifts"]
TYPES = {
    **dict.fromkeys(["said", "sums", "alpha", "_loss_scale", "loss_scale"], "*fp32"),
    **dict.fromkeys(["order", "seeds", "roles", "modes", "_positions", "_modes"], "*i64"),
}


def plan_of(kind: str, chunk: int, dtype: str) -> Plan:
    """Return the plan of a bank with chunks of so many features."""
    plan = Plan(kind, chunk, 0 if KERNELS[kind].first is None else 2 * chunk, 0, 0, 1, dtype)
    if plan.wide:
        raise SystemExit(f"--chunks {chunk}: tiles of such chunks are wide, which this does not do")
    return plan


def compiled(plan: Plan, name: str) -> Any:
    """Compile a kernel as a launch would."""
    chunk, hidden, tiling, kernels = plan.size, plan.hidden, plan.tiling, KERNELS[plan.kind]
    kernel = getattr(MODULES[kernels.module], name)
    names, alone = kernel.arg_names, tiling.seeds if tiling.seeds > 1 else 0
    known = {"c": chunk, "h": hidden, "PER": tiling.seeds, "TILE": tiling.columns}
    known |= {"HIDDEN": tiling.hidden, "ROWS": ROWS, "KEEP": 1, "NOTES": 1, "ALONE": alone}
    known |= dict(zip(("ACT", "BIAS", "RESIDUAL"), kernels.switches, strict=False))
    known |= {"DOT": DOTS[plan.dot], "EVEN": even(plan, chunk, 1 << 20)}
    known |= {"P": sum(BLUEPRINTS[plan.kind](chunk, hidden)) + 2}
    types = TYPES | dict.fromkeys(FLOATS, DTYPES[plan.dot])
    signature = {n: "constexpr" if n in known else types.get(n, "i32") for n in names}
    constants = {(names.index(n),): value for n, value in known.items() if n in names}
    aligned = [n for n in names if n in types or n == "features"]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGET, options={"num_warps": WARPS})


def layouts(text: str, columns: int) -> Counter[str]:
    """Count the layouts of what loads and stores a block of rows, in Triton's GPU dialect."""
    known = re.findall(r"^(#\w+) = .*sizePerThread = \[1, (\d+)\].*order = \[(\d)", text, re.M)
    named = {name: f"{('columns', 'rows')[int(first)]} x{wide}" for name, wide, first in known}
    block = rf"tt\.(?:load|store) .*tensor<{ROWS}x{columns}x!tt.ptr<\w+>, (#\w+)>"
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
    for kind in BLUEPRINTS:
        for name in ("forward", "backward"):
            for chunk in args.chunks:
                plan = plan_of(kind, chunk, args.dtype)
                made = compiled(plan, name)
                text = instructions(made.asm["ptx"])
                row = {"kernel": f"{kind} {name}", "chunk": chunk}
                row |= {"registers": registers(made.asm["cubin"]), "instructions": len(text)}
                row["hints"] = made.asm["ttir"].count("tt.contiguity")
                row["layouts"] = dict(layouts(made.asm["ttgir"], plan.tiling.columns))
                row["digest"] = hashlib.sha256("\n".join(text).encode()).hexdigest()[:12]
                found.append(row)
    if args.json:
        print(json.dumps(found))
        return 0
    print(f"triton {triton.__version__}, {TARGET}, {args.dtype}\n")
    print(f"| {' | '.join(found[0])} |\n|---|{'---:|' * 4}---|---|")
    for row in found:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

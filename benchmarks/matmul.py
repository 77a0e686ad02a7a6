"""What the matmul lowering brings a graph, and what it takes on one thread of a CPU.

    python benchmarks/matmul.py [nodes] [steps] [products] [--blueprint NAME]

- nodes: of a layer with a bank, with telemetry: those that the lowering inserts (captured), and
  what AOTAutograd hands Inductor for the blend and its notes, beside the same layer without seeds;
  the same where chunks have two sizes (two banks)
- steps: Linear 1,024 -> 4,096 and GELU, 512 rows, float32, as in `overhead.py`: processor time of a
  forward and of a training step, to the plain compiled host's, medians over rounds of both
- products: batched products of that layer with all seeds active, as the lowering writes them, and
  of chunks packed block-diagonally into tiles of 16 features

One thread, and processor time: where others use the machine, two threads wait for each other.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _timing import machine
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from kasmina_fx import capture, kasmina_layers, kasminify
from kasmina_fx.blueprints import names
from kasmina_fx.passes import passes_for, run_passes
from kasmina_fx.passes.lower_blend import LowerBlend
from kasmina_fx.physical.operators import DECOMPOSITIONS
from kasmina_fx.testing import graft

ROWS, INPUTS, FEATURES, SEEDS = 512, 1024, 4096, 1024
SIZES = (2, 4, 8, 16, 64)
LANES, ROUNDS = 16, 15


def host(inputs: int, features: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, features), nn.GELU())


def grown(blueprint: str, seeds: int, every: int, *shape: int, **options: Any) -> nn.Module:
    model = kasminify(host(*shape), num_seeds=seeds, **options)
    graft(kasmina_layers(model)["0"], range(0, seeds, every), blueprint)
    return model


def calls(gm: torch.fx.GraphModule) -> int:
    return sum(node.op == "call_function" for node in gm.graph.nodes)


def handed_on(model: nn.Module, x: Tensor) -> list[int]:
    """How many operators Inductor gets, forward and backward."""
    counts: list[int] = []

    def count(gm: torch.fx.GraphModule, _: Any) -> Any:
        counts.append(calls(gm))
        return gm.forward

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        run_passes(gm, passes_for("matmul"))
        return aot_autograd(
            fw_compiler=count,
            bw_compiler=count,
            decompositions=select_decomp_table() | DECOMPOSITIONS,
            partition_fn=min_cut_rematerialization_partition,
        )(gm, inputs)

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(x).sum().backward()
    return counts


def nodes() -> None:
    print(
        "| blueprint | inserted | forward | backward | two sizes: inserted | forward | backward |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    x = torch.randn(32, 64)
    for blueprint in names():
        cells = []
        for seeds in (64, 60):
            model = grown(blueprint, seeds, 2, 64, 256, compile=False)
            gm = capture(model, x)
            before = calls(gm)
            LowerBlend()(gm)
            # Its marker and the marker's two outputs are gone.
            inserted = calls(gm) - before + 3
            beside = handed_on(kasminify(host(64, 256), num_seeds=seeds, compile=False), x)
            mine = handed_on(model, x)
            cells += [inserted, *(a - b for a, b in zip(mine, beside, strict=True))]
        print(f"| {blueprint} | {' | '.join(map(str, cells))} |", flush=True)


def steps(blueprint: str) -> None:
    x, gradient = torch.randn(ROWS, INPUTS), torch.randn(ROWS, FEATURES)

    def forward(model: nn.Module) -> None:
        with torch.no_grad():
            model(x)

    def training(model: nn.Module) -> None:
        model(x).backward(gradient)
        for parameter in model.parameters():
            parameter.grad = None

    print("| seeds | mode | host ms | 6 % | 6 %, telemetry | all | all, telemetry |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    for size in SIZES:
        torch._dynamo.reset()
        seeds = FEATURES // size
        models = [torch.compile(host(INPUTS, FEATURES))]
        models += [
            grown(
                blueprint, seeds, every, INPUTS, FEATURES,
                telemetry=telemetry, options={"lowering": "matmul"},
            )
            for every in (16, 1)
            for telemetry in (False, True)
        ]  # fmt: skip
        for mode in (forward, training):
            taken: list[list[float]] = [[] for _ in models]
            for model in (*models, *models):  # compiled, and warm
                mode(model)
            for _ in range(ROUNDS):
                for model, times in zip(models, taken, strict=True):
                    times.append(clocked(lambda m=model, f=mode: f(m)))
            plain = taken[0]
            ratios = [
                statistics.median(a / b for a, b in zip(t, plain, strict=True)) for t in taken[1:]
            ]
            cells = " | ".join(f"{ratio:.2f}" for ratio in ratios)
            base = f"{1e3 * statistics.median(plain):.1f}"
            print(f"| {seeds:,} | {mode.__name__} | {base} | {cells} |", flush=True)


def clocked(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def products() -> None:
    print("| chunk | product | as written | contiguous weights | rows through strides | packed |")
    print("|---:|---|---:|---:|---:|---:|")
    for size in SIZES[:-1]:
        count, pack = FEATURES // size, LANES // size
        for name, inner, outer in (("up", size, 2 * size), ("down", 2 * size, size)):
            rows, weight = torch.randn(count, ROWS, inner), torch.randn(count, outer, inner)
            spread = torch.randn(ROWS, count, inner).transpose(0, 1)
            packed = torch.randn(count // pack, ROWS, inner * pack)
            block = torch.randn(count // pack, inner * pack, outer * pack)
            columns, out = weight.mT.contiguous(), torch.empty(count, ROWS, outer)
            wide = torch.empty(count // pack, ROWS, outer * pack)
            pairs = [(rows, weight.mT, out), (rows, columns, out), (spread, columns, out)]
            taken: list[list[float]] = [[] for _ in range(4)]
            for _ in range(ROUNDS):
                for (a, b, c), times in zip([*pairs, (packed, block, wide)], taken, strict=True):
                    times.append(clocked(lambda a=a, b=b, c=c: torch.bmm(a, b, out=c)))
            cells = " | ".join(f"{1e3 * min(times):.2f}" for times in taken)
            print(f"| {size} | {name} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="What the matmul lowering brings and takes.")
    parts = ("nodes", "steps", "products")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)}; all")
    parser.add_argument("--blueprint", default="mlp", choices=names())
    args = parser.parse_args()
    if unknown := set(args.parts) - set(parts):
        parser.error(f"no part is named {sorted(unknown)}: there are {', '.join(parts)}")
    torch.set_num_threads(1)
    print(", ".join(f"{key} {value}" for key, value in machine("cpu").items()) + ", 1 thread used")
    for part in args.parts or parts:
        print(f"\n{part}\n", flush=True)
        {"nodes": nodes, "steps": lambda: steps(args.blueprint), "products": products}[part]()


if __name__ == "__main__":
    main()

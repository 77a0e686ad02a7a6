"""What seeds cost in a whole GPT-2: the first call, a training step, evaluation and memory.

    python benchmarks/gpt.py [--blocks N ...] [--cases NAME ...] [--mode MODE] [--json FILE]

A GPT-2 whose head is tied to its embedding; every linear of its blocks (qkv, out, up, down) has
seeds. On CUDA it is the small GPT-2 in bfloat16, elsewhere a tiny one in float32. Each number
stands beside its ratio to `plain`, the compiled model without seeds. The other cases:

- dormant: no seed grows, no statistics; dormant+telemetry: with them
- one seed: with statistics, and one seed of the first block grafting; all other layers are idle
- active 5%, active 50%: with statistics, and one seed in 20, or in 2, grafting with alpha 0.5
- lora: an adapter of rank 8 on each of those linears instead of seeds; the host trains, too

Each case has a process of its own and an empty Inductor cache; the compiler's imports don't count.
Training and evaluation both return the loss. The columns:

- first call: the first training step, which compiles forward and backward
- step: forward, backward and AdamW (fused on CUDA) on the device, steps queued in a row
- host: on CUDA until a step is queued, with none before it; on a CPU all threads' processor time
- in one thread: step and host with ``torch.autograd.set_multithreading_enabled(False)``: backward
  in the thread that asks for it
- kernels: on CUDA the sum of the times of a step's kernels, by torch's profiler
- eval: a warm forward in evaluation, without gradients
- peak: what CUDA's allocator gave out at most in warm training steps
- graphs: compiled in training + in evaluation
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from _timing import clocked_ms, device_ms, kernel_microseconds, machine
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.nn import functional as F

from kasmina_fx import compiles, kasmina_layers, kasminify, transaction
from kasmina_fx.testing import graft

PLAIN, LORA, ONE = "plain", "lora", "one seed"
#: Telemetry, and of how many seeds one grows (0: none does).
SEEDED = {
    "dormant": (False, 0),
    "dormant+telemetry": (True, 0),
    ONE: (True, sys.maxsize),
    "active 5%": (True, 20),
    "active 50%": (True, 2),
}
CASES = (PLAIN, *SEEDED, LORA)
ALPHA, RANK = 0.5, 8
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
#: Titles of columns with a ratio, their keys and formats.
COLUMNS = {
    "first call s": ("first_s", ".1f"),
    "step ms": ("step_ms", ".2f"),
    "host ms": ("host_ms", ".2f"),
    "step in one thread ms": ("step_in_one_ms", ".2f"),
    "host in one thread ms": ("host_in_one_ms", ".2f"),
    "kernels ms": ("kernels_ms", ".2f"),
    "eval ms": ("eval_ms", ".2f"),
    "peak MiB": ("peak_mib", ",.0f"),
}


@dataclass(frozen=True)
class Shape:
    """The size of the model, of its batch and of its seeds."""

    blocks: int
    width: int
    heads: int
    vocabulary: int
    tokens: int
    batch: int
    num_seeds: int


SHAPES = {
    "cpu": Shape(2, 64, 4, 512, 64, 4, 16),
    "cuda": Shape(12, 768, 12, 50304, 1024, 16, 256),
}


class Block(nn.Module):
    """A block of GPT-2: attention, then an MLP, each behind a norm and beside a residual."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, self.heads = shape.width, shape.heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))
        return out


class GPT(nn.Module):
    """GPT-2 without dropout; returns the loss."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.tokens, shape.width)
        self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.blocks)))
        self.norm = nn.LayerNorm(shape.width)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.norm(self.blocks(self.tokens(tokens) + self.positions(places)))
        logits = F.linear(x, self.tokens.weight)
        loss: Tensor = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        return loss


class Lora(nn.Module):
    """A linear beside which a product of two narrow ones learns."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


def build(case: str, shape: Shape, args: Any) -> nn.Module:
    """Make the compiled model of a case; the hosts' weights are the same in all of them."""
    model = GPT(shape)
    if case == LORA:
        for block in model.blocks:
            for name, linear in list(block.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(block, name, Lora(linear))
    model = model.to(args.device, DTYPES[args.device])
    if case not in SEEDED:
        model.compile(mode=args.mode)
        return model
    telemetry, one_in = SEEDED[case]
    own = {"reserve": args.reserve, "options": {"lowering": args.lowering}}
    kasminify(model, num_seeds=shape.num_seeds, telemetry=telemetry, mode=args.mode, **own)
    if one_in:
        with transaction(model):
            for layer in list(kasmina_layers(model).values())[: 1 if case == ONE else None]:
                graft(layer, range(0, layer.num_seeds, one_in), args.blueprint, ALPHA)
    return model


def load_compiler(device: str) -> None:
    """Compile something small: a first call shall not count the imports and workers of Inductor."""
    small = nn.Sequential(nn.Linear(8, 8), nn.GELU()).to(device)
    torch.compile(small)(torch.ones(4, 8, device=device)).sum().backward()
    torch.compiler.reset()


def training(model: nn.Module, batch: Sequence[Tensor], args: Any) -> dict[str, Any]:
    """Measure the first training step and warm ones."""
    cuda = args.device == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=cuda or None)

    def step() -> Tensor:
        loss: Tensor = model(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    before, begin = compiles(), time.perf_counter()
    losses = [float(step())]
    found: dict[str, Any] = {"first_s": time.perf_counter() - begin}
    for _ in range(args.warmup):
        step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    found["step_ms"] = device_ms(step, args.steps)
    clock = time.perf_counter if cuda else time.process_time
    found["host_ms"] = clocked_ms(step, args.steps, clock)
    with torch.autograd.set_multithreading_enabled(False):
        found["step_in_one_ms"] = device_ms(step, args.steps)
        found["host_in_one_ms"] = clocked_ms(step, args.steps, clock)
    found["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20 if cuda else None
    found["kernels_ms"] = sum(kernel_microseconds(step, 5).values()) / 1e3 if cuda else None
    losses.append(float(step()))
    if not all(map(math.isfinite, losses)):
        raise FloatingPointError(f"first and last loss: {losses}")
    return found | {"losses": losses, "training_graphs": compiles() - before}


def evaluation(model: nn.Module, batch: Sequence[Tensor], args: Any) -> dict[str, Any]:
    """Measure a warm forward without gradients."""
    before = compiles()
    model.eval()
    with torch.no_grad():
        for _ in range(args.warmup + 1):
            model(*batch)
        taken = device_ms(lambda: model(*batch), args.steps)
    return {"eval_ms": taken, "eval_graphs": compiles() - before}


def measure(case: str, shape: Shape, args: Any) -> dict[str, Any]:
    """Return all numbers of a case, or its error; called in a process of its own."""
    # A case that fell back to eager would be a wrong number: fail instead.
    limits = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, suppress_errors=False)
    with limits, fresh_cache():
        try:
            load_compiler(args.device)
            torch.manual_seed(args.seed)
            text = torch.randint(shape.vocabulary, (shape.batch, shape.tokens + 1))
            batch = [part.contiguous().to(args.device) for part in (text[:, :-1], text[:, 1:])]
            model = build(case, shape, args)
            return training(model, batch, args) | evaluation(model, batch, args)
        except Exception as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            return {"error": why, "traceback": traceback.format_exc()}


def measure_apart(case: str, shape: Shape, args: Any) -> dict[str, Any]:
    """Return what :func:`measure` does; a crash, or a broken CUDA context, ends with the case."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            found = pool.submit(measure, case, shape, args).result()
        except BrokenProcessPool as error:
            found = {"error": f"the process died: {error}"}
    return {"blocks": shape.blocks, "case": case} | found


def row(result: dict[str, Any], results: Sequence[dict[str, Any]]) -> str:
    """Return a line of the table."""
    start = f"| {result['blocks']} | {result['case']} | "
    if "error" in result:
        return f"{start}failed: {result['error'].replace('|', '/')} |"
    beside = [r for r in results if r["blocks"] == result["blocks"] and r["case"] == PLAIN]

    def cell(key: str, form: str) -> str:
        value, base = result[key], beside[0].get(key) if beside else None
        text = "-" if value is None else f"{value:{form}}"
        return f"{text} ({value / base:.2f})" if base else text

    cells = " | ".join(cell(key, form) for key, form in COLUMNS.values())
    return f"{start}{cells} | {result['training_graphs']}+{result['eval_graphs']} |"


def arguments() -> tuple[Shape, Any]:
    """Read the command line; the shape's defaults are those of the device."""
    parser = argparse.ArgumentParser(description="What seeds cost in a whole GPT-2.")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=tuple(SHAPES), default=default)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, metavar="NAME")
    parser.add_argument("--blocks", type=int, nargs="+", metavar="N", help="one model for each")
    for field in fields(Shape)[1:]:
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, metavar="N")
    parser.add_argument("--blueprint", default="mlp", help="of active seeds")
    parser.add_argument("--lowering", default="auto", help="option of the backend")
    parser.add_argument("--mode", help="of torch.compile, such as reduce-overhead: CUDA graphs")
    parser.add_argument("--reserve", type=int, default=0, help="slots a layer to allocate ahead")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="to take medians of")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    args = parser.parse_args()
    given = {f.name: getattr(args, f.name) for f in fields(Shape)[1:] if getattr(args, f.name)}
    shape = replace(SHAPES[args.device], **given)
    args.blocks = args.blocks or [shape.blocks]
    return shape, args


def main() -> int:
    shape, args = arguments()
    about, results = machine(args.device), []
    about |= asdict(shape) | {"blocks": args.blocks, "dtype": str(DTYPES[args.device])}
    about |= {
        k: getattr(args, k) for k in ("blueprint", "lowering", "mode", "reserve", "warmup", "steps")
    }
    for blocks in args.blocks:
        for case in sorted(args.cases, key=CASES.index):
            results.append(measure_apart(case, replace(shape, blocks=blocks), args))
            print(row(results[-1], results), flush=True)
    print("\n" + ", ".join(f"{key} {value}" for key, value in about.items()) + "\n")
    print(f"| blocks | case | {' | '.join(COLUMNS)} | graphs |")
    print(f"|---|---|{'---:|' * (len(COLUMNS) + 1)}")
    print("\n".join(row(result, results) for result in results))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": about, "cases": results}, indent=1) + "\n")
    return int(any("error" in result for result in results))


if __name__ == "__main__":
    sys.exit(main())

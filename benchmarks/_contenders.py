"""What `overhead.py` compares: one function of the same parameters, written in several ways.

Every contender of a group has the same host weights and the same blueprints (`mlp`, a private copy
a seed, alpha 0.5), rejects a blueprint that yields NaN or Inf, and is checked against the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from kasmina_fx import kasminify
from kasmina_fx.banks.bank import Bank
from kasmina_fx.reference import reference_mode
from kasmina_fx.testing import graft

ALPHA = 0.5
HOST, HOST_AGAIN = "host", "host again"
REFERENCE, LOOP, LOOP_COMPILED, VMAP = "reference", "loop eager", "loop compiled", "vmap eager"
KASMINA, KASMINA_TELEMETRY = "kasmina", "kasmina + telemetry"
LORA, RANK = "LoRA (peft)", 8
CONTENDERS = (HOST_AGAIN, REFERENCE, LOOP, LOOP_COMPILED, VMAP, LORA, KASMINA, KASMINA_TELEMETRY)


@dataclass(frozen=True)
class Shape:
    """A host: `rows x inputs -> features`, Linear and GELU."""

    rows: int
    inputs: int
    features: int
    dtype: torch.dtype
    device: str

    def host(self) -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(self.inputs, self.features), nn.GELU())
        return model.to(self.device, self.dtype)

    def random(self, *size: int) -> Tensor:
        return torch.randn(*size, device=self.device).to(self.dtype)


@dataclass
class Contender:
    """A callable, the module that owns its parameters, and the host's weight among them."""

    call: Callable[[Tensor], Tensor]
    module: nn.Module
    weight: Tensor
    compiled: bool


def host(shape: Shape) -> Contender:
    model = shape.host()
    linear: Any = model[0]
    return Contender(torch.compile(model), model, linear.weight, True)


def grown(shape: Shape, seeds: int, active: range, **options: Any) -> nn.Sequential:
    """A kasminified host; the same blueprints whenever the arguments are the same."""
    model: nn.Sequential = kasminify(shape.host(), num_seeds=seeds, **options)
    layer: Any = model[0]
    torch.manual_seed(1)
    if active:
        graft(layer, active, "mlp", alpha=ALPHA)
    return model


def kasmina(shape: Shape, seeds: int, active: range, telemetry: bool, lowering: str) -> Contender:
    options = {"lowering": lowering}
    model = grown(shape, seeds, active, telemetry=telemetry, options=options)
    layer: Any = model[0]
    return Contender(model, model, layer.weight, True)


def reference(source: nn.Sequential) -> Contender:
    """`kasmina_fx.reference`: written to be right, it makes every seed's module in every call."""

    def call(x: Tensor) -> Tensor:
        with reference_mode(source):
            out: Tensor = source(x)
        return out

    layer: Any = source[0]
    return Contender(call, source, layer.weight, False)


class Loop(nn.Module):
    """The loop that a person writes who cares for speed: parameters ready, no `if` on data.

    The reference's `if` on a tensor can't be compiled whole, so that this is the one to compile.
    The guard is the largest magnitude: with `isfinite().all()` Inductor's code for a CPU takes
    three times as long.
    """

    def __init__(self, shape: Shape, source: nn.Sequential) -> None:
        super().__init__()
        layer: Any = source[0]
        self.base: Any = shape.host()[0]
        self.sizes = list(layer.chunks.sizes)
        self.blueprints = nn.ParameterList()
        self.first: list[int] = [-1] * len(self.sizes)
        for bank, local, stacks in occupied(layer):
            for place, seed in enumerate(local.tolist()):
                self.first[bank.run.first_seed + seed] = len(self.blueprints)
                for stack in stacks.values():
                    self.blueprints.append(nn.Parameter(stack[place].clone()))
        self.held = list(self.blueprints)  # a ParameterList finds an item by formatting its name

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for first, chunk in zip(self.first, self.base(x).split(self.sizes, -1), strict=True):
            if first < 0:
                out.append(chunk)
                continue
            up, up_bias, down, down_bias = self.held[first : first + 4]
            made = F.linear(F.relu(F.linear(chunk, up, up_bias)), down, down_bias)
            grown = chunk + ALPHA * (made - chunk)
            out.append(torch.where(made.abs().amax().isfinite(), grown, chunk))
        return F.gelu(torch.cat(out, -1))


class Vmapped(nn.Module):
    """functorch as its tutorial on model ensembling has it: active chunks of one size at a time."""

    def __init__(self, shape: Shape, source: nn.Sequential) -> None:
        super().__init__()
        layer: Any = source[0]
        self.base: Any = shape.host()[0]
        self.runs = list(layer.chunks.layout.runs)
        self.stacks = nn.ModuleDict()
        self.templates: dict[str, tuple[nn.Module, list[str]]] = {}  # not part of the model
        for bank, local, stacks in occupied(layer):
            key = str(layer.chunks.layout.runs.index(bank.run))
            on_host = {name: stack.cpu() for name, stack in stacks.items()}
            modules = [bank.blueprint.module(bank.run.size) for _ in local]
            for place, module in enumerate(modules):
                module.load_state_dict({name: stack[place] for name, stack in on_host.items()})
            params, _ = stack_module_state([m.to(shape.device, shape.dtype) for m in modules])
            held = nn.ParameterList(nn.Parameter(p.detach()) for p in params.values())
            self.stacks[key] = held
            self.templates[key] = (modules[0].to("meta"), list(params))
            self.register_buffer(f"active{key}", local.to(shape.device))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        parts = []
        for index, run in enumerate(self.runs):
            part = y.narrow(-1, run.offset, run.width)
            if str(index) in self.templates:
                chunks = part.unflatten(-1, (run.count, run.size))
                part = self.blend(str(index), chunks).flatten(-2)
            parts.append(part)
        return F.gelu(torch.cat(parts, -1) if len(parts) > 1 else parts[0])

    def blend(self, key: str, chunks: Tensor) -> Tensor:
        template, names = self.templates[key]
        stacks: Any = self.stacks[key]
        active = self.get_buffer(f"active{key}")

        def one(params: dict[str, Tensor], chunk: Tensor) -> Tensor:
            out: Tensor = functional_call(template, params, chunk)
            return out

        taken = chunks.index_select(1, active)
        params = dict(zip(names, stacks, strict=True))
        made = vmap(one, in_dims=(0, 1), out_dims=1)(params, taken)
        finite = made.abs().amax((0, 2), keepdim=True).isfinite()
        grown = torch.where(finite, taken + ALPHA * (made - taken), taken)
        return chunks.index_copy(1, active, grown)


def loop(shape: Shape, source: nn.Sequential, compiled: bool) -> Contender:
    model = Loop(shape, source)
    return Contender(
        torch.compile(model) if compiled else model, model, model.base.weight, compiled
    )


def vmapped(shape: Shape, source: nn.Sequential) -> Contender:
    model = Vmapped(shape, source)
    return Contender(model, model, model.base.weight, False)


def lora(shape: Shape) -> Contender | None:
    """One adapter beside the whole layer, of which the host learns, too; None without `peft`."""
    try:
        import peft
    except ImportError:
        return None
    adapted = peft.LoraConfig(r=RANK, target_modules=["0"], lora_dropout=0.0)
    model: Any = peft.get_peft_model(shape.host(), adapted)
    weight: Tensor = model.base_model.model[0].base_layer.weight
    for parameter in model.parameters():
        parameter.requires_grad_()
    return Contender(torch.compile(model), model, weight, True)


def occupied(layer: Any) -> Iterator[tuple[Bank, Tensor, dict[str, Tensor]]]:
    """Of each bank in use: its active seeds, counted from its run's first, and their parameters."""
    for bank in layer.kasmina.banks.values():
        local = bank.seeds.flatten().cpu()
        slots = (local >= 0).nonzero().flatten()
        if len(slots):
            specs = zip(bank.tensor_specs, bank.tensors(), strict=True)
            taken = {spec.name: stack.detach()[slots.to(stack.device)] for spec, stack in specs}
            yield bank, local[slots], taken

"""A program without Triton's interpreter: what Inductor's passes leave of launches, as JSON.

It stops where a device would have to run them. Printed: of the package's rewriting and of torch's,
all targets of the graph, the kernels that it launches, and the source of one.
"""

from __future__ import annotations

import copy
import json
from typing import Any
from unittest import mock

import torch
from kernel_cases import STAGES, Blend
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._higher_order_ops import triton_kernel_wrap
from torch._inductor import compile_fx
from torch._inductor.codegen import wrapper
from torch._inductor.fx_passes import post_grad
from torch._inductor.virtualized import V

from kasmina_fx._torch import launches as quick
from kasmina_fx.lowerings import launches, tiles
from kasmina_fx.lowerings.fused import plan_of, tables_of
from kasmina_fx.lowerings.triton.notes import report
from kasmina_fx.physical.graph_inputs import LayerTables
from kasmina_fx.physical.layout import ChunkLayout

DECOMPOSE = "decompose_triton_kernel_wrapper_functional"
SOURCE = "user_defined_triton_kernel_transitive_closure_source_code"


class Seen(Exception):
    """Ends a compile."""


def own(replaced: Any) -> Any:
    """Return torch's function that a function of the package stands for."""
    cells = [cell.cell_contents for cell in replaced.__closure__]
    return next(cell for cell in cells if getattr(cell, "__module__", "").startswith("torch."))


def graphs() -> list[fx.Graph]:
    """Return a forward and a backward as Inductor's passes leave them: ours, and torch's."""
    found: list[fx.Graph] = []
    ours: Any = getattr(post_grad, DECOMPOSE)

    def look(gm: fx.GraphModule, inputs: Any, **_: Any) -> Any:
        for rewrite in (ours, own(ours)):
            twin = copy.deepcopy(gm)
            instead = mock.patch.object(post_grad, DECOMPOSE, rewrite)
            with instead, V.set_fake_mode(detect_fake_mode(inputs)):
                compile_fx._recursive_post_grad_passes(twin, is_inference=True)
            found.append(twin.graph)
        raise Seen

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        return compile_fx.compile_fx(gm, inputs, inner_compile=look)

    asked, _ = Blend([4] * 9, dict.fromkeys(STAGES, "mlp")).arguments()
    run, bank = ChunkLayout.parse(asked.chunks).runs[0], asked.bank_inputs()[0]
    tables = [t.detach() for t in tables_of(bank, LayerTables(*asked.layer), run)]
    params, plan = [p.detach() for p in bank.params], str(plan_of(asked.y, bank, run))

    def both(x: Tensor, *inputs: Tensor) -> list[Tensor]:
        given, stacks = list(inputs[: len(tables)]), list(inputs[len(tables) :])
        out, kept, notes = tiles.fused_tiles(
            x @ x.T @ x, given, stacks, None, plan, True, True, False
        )
        grads = tiles.fused_tiles_backward(out.sin(), kept, given, stacks, plan, False)
        # Of what is returned too: this launch has to copy.
        again = tiles.fused_tiles(out, given, stacks, None, plan, False, False, False)[0]
        return [out, notes, again, *grads]

    try:
        torch.compile(both, backend=backend, dynamic=True)(asked.y, *tables, *params)
    except Exception as error:
        if "Seen" not in str(error):
            raise
    return found


def main() -> None:
    for module in (launches, tiles):
        setattr(module, "natively", lambda _: False)  # noqa: B010
    quick.quicken_tracing()
    quick.quicken_inductor()
    launch = triton_kernel_wrap.triton_kernel_wrapper_mutation
    source: Any = getattr(wrapper, SOURCE)
    said: dict[str, Any] = {"source": [source(report), own(source)(report)]}
    said["targets"], said["kernels"] = [], []
    for graph in graphs():
        calls = [node for node in graph.nodes if node.op == "call_function"]
        said["targets"].append([str(node.target) for node in calls])
        said["kernels"].append([n.kwargs["kernel_idx"] for n in calls if n.target is launch])
    print(json.dumps(said))


if __name__ == "__main__":
    main()

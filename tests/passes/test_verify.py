"""What the pipeline promises is checked on the graph."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_cases import (
    GOLDEN,
    NEAR_MISSES,
    PLAIN,
    assert_leaves_alone,
    each_near_miss,
    growing_graph,
    near_miss,
    plain_graph,
    spelled_as_torch_2_13,
)
from torch.fx import GraphModule, Node

from kasmina_fx import rewrite
from kasmina_fx.errors import RewriteError
from kasmina_fx.passes import passes_for, run_passes
from kasmina_fx.passes.infra.metadata import origin_of, value_of
from kasmina_fx.passes.verify import Verify
from kasmina_fx.testing import assert_golden


def rewritten() -> Any:
    return rewrite(growing_graph(), passes=PLAIN).graph_module


def call(gm: Any, target: Any, args: tuple[Node, ...], name: str) -> Node:
    """A new node with a name that messages repeat, whatever else is in the graph."""
    node: Node = gm.graph.create_node("call_function", target, args, name=name)
    return node


def host_reads_statistics() -> Any:
    gm = rewritten()
    stack = [n for n in gm.graph.nodes if n.target is torch.ops.aten.stack.default][-1]
    out = gm.graph.output_node()
    with gm.graph.inserting_before(out):
        leak = call(gm, torch.add, (out.args[0][0], stack), "leak")
    out.args = ((leak,),)
    return gm


def statistics_reach_the_output() -> Any:
    gm = rewritten()
    stack = [n for n in gm.graph.nodes if n.target is torch.ops.aten.stack.default][-1]
    out = gm.graph.output_node()
    out.args = ((stack,),)
    return gm


def _with_a_write(by: str) -> Any:
    gm = rewritten()
    inserted = [n for n in gm.graph.nodes if (o := origin_of(n)) and o.by == by]
    host = next(n for n in gm.graph.nodes if n.target is torch._C._nn.linear)
    with gm.graph.inserting_after(inserted[0]):
        write = call(gm, torch.ops.aten.copy_.default, (host, host), "write")
    write.meta.update(inserted[0].meta)
    return gm


def blend_writes() -> Any:
    return _with_a_write("lower_blend")


def telemetry_writes_to_the_host() -> Any:
    return _with_a_write("place_telemetry")


def host_reads_inside_a_blend() -> Any:
    gm = rewritten()
    inner = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.bmm.default)
    out = gm.graph.output_node()
    with gm.graph.inserting_before(out):
        leak = call(gm, torch.sum, (inner,), "leak")
    out.args = ((*out.args[0], leak),)
    return gm


def blend_leaks() -> Any:
    gm = rewritten()
    inner = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.bmm.default)
    out = gm.graph.output_node()
    out.args = ((*out.args[0], inner),)
    return gm


def blend_spies() -> Any:
    gm = rewritten()
    inner = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.bmm.default)
    x = next(n for n in gm.graph.find_nodes(op="placeholder") if value_of(n).shape == (3, 8))
    inner.args = (x, inner.args[1])
    return gm


def value_is_missing() -> Any:
    gm = rewritten()
    node = next(n for n in gm.graph.nodes if origin_of(n) is not None)
    assert value_of(node) is not None
    for key in ("val", "example_value"):
        node.meta.pop(key, None)
    return gm


BROKEN: dict[Callable[[], GraphModule], str] = {
    host_reads_statistics: "statistics must not reach",
    statistics_reach_the_output: "statistics must not reach",
    blend_writes: "of a blend writes to",
    telemetry_writes_to_the_host: "telemetry's .* writes to out, not a buffer",
    host_reads_inside_a_blend: "not isolated: the host reads",
    blend_leaks: "not isolated: the host reads",
    blend_spies: "not isolated: it reads of the host",
    value_is_missing: "carries no value",
}


@pytest.mark.parametrize("make", BROKEN, ids=lambda make: make.__name__)
def test_verify_refuses_a_broken_graph(make: Callable[[], GraphModule]) -> None:
    gm = make()
    with pytest.raises(RewriteError, match=BROKEN[make]):
        Verify()(gm)


@pytest.mark.parametrize("make", BROKEN, ids=lambda make: make.__name__)
def test_a_refusal_leaves_the_graph_as_it_was_and_comes_again(
    make: Callable[[], GraphModule],
) -> None:
    gm = make()
    nodes = list(gm.graph.nodes)
    messages = set()
    for _ in range(2):
        with pytest.raises(RewriteError) as caught:
            Verify()(gm)
        messages.add(str(caught.value))
    assert len(messages) == 1
    assert list(gm.graph.nodes) == nodes


def test_verify_checks_a_whole_pipelines_graph_and_changes_nothing() -> None:
    gm = rewritten()
    assert_leaves_alone(Verify(strict=True), gm)
    assert_leaves_alone(Verify(strict=True), gm)


@pytest.mark.parametrize("strict", [False, True])
def test_a_graph_without_markers_is_the_same_object(strict: bool) -> None:
    assert_leaves_alone(Verify(strict=strict), plain_graph())


def test_a_leftover_is_no_refusal_unless_strict() -> None:
    gm = growing_graph()
    assert not Verify()(gm).modified
    assert not Verify()(gm).modified


@each_near_miss
def test_strict_says_why_a_near_miss_was_left(near: str) -> None:
    gm = near_miss(near)
    assert not run_passes(gm, passes_for()).modified
    why = re.escape(f"1 markers were not rewritten; the first is of fc: {NEAR_MISSES[near][1]}")
    with pytest.raises(RewriteError, match=why):
        Verify(strict=True)(gm)


def test_a_near_miss_a_host_that_reads_one_tensor_twice_is_isolated() -> None:
    gm = rewrite(growing_graph()).graph_module
    out = gm.graph.output_node()
    out.args = ((out.args[0][0], out.args[0][0]),)
    Verify(strict=True)(gm)


def test_a_near_miss_a_write_of_the_hosts_own_is_the_hosts_business() -> None:
    gm = rewritten()
    host = next(n for n in gm.graph.nodes if n.target is torch._C._nn.linear)
    with gm.graph.inserting_after(host):
        call(gm, torch.ops.aten.copy_.default, (host, host), "write")
    Verify(strict=True)(gm)


def leftover() -> GraphModule:
    return growing_graph()


def leftover_with_a_reason() -> GraphModule:
    return near_miss("narrow")


def refusals(*makes: Callable[[], GraphModule]) -> str:
    lines = []
    for make in makes:
        with pytest.raises(RewriteError) as caught:
            Verify(strict=True)(make())
        lines.append(f"{make.__name__}: {caught.value}")
    return "\n".join(lines) + "\n"


@spelled_as_torch_2_13
def test_golden() -> None:
    text = refusals(leftover, statistics_reach_the_output, blend_leaks)
    assert_golden(text, "verify/refusals", golden_dir=GOLDEN)


@spelled_as_torch_2_13
def test_golden_of_every_kind_of_refusal() -> None:
    text = refusals(leftover, leftover_with_a_reason, *BROKEN)
    assert_golden(text, "verify/every_kind", golden_dir=GOLDEN)

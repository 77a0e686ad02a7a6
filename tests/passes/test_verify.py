"""What the pipeline promises is checked on the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_cases import GOLDEN, growing_graph, spelled_as_torch_2_13

from kasmina_fx import rewrite
from kasmina_fx.errors import RewriteError
from kasmina_fx.passes.infra.metadata import origin_of, value_of
from kasmina_fx.passes.verify import Verify
from kasmina_fx.testing import assert_golden


def test_verify_refuses_a_host_that_reads_statistics() -> None:
    gm = rewrite(growing_graph()).graph_module
    stack = [n for n in gm.graph.nodes if n.target is torch.ops.aten.stack.default][-1]
    out = gm.graph.output_node()
    with gm.graph.inserting_before(out):
        leak = gm.graph.call_function(torch.add, (out.args[0][0], stack))
    out.args = ((leak,),)
    with pytest.raises(RewriteError, match="statistics must not reach"):
        Verify()(gm)


def test_verify_refuses_a_write_in_a_blend_and_to_the_host() -> None:
    for by in ("lower_blend", "place_telemetry"):
        gm = rewrite(growing_graph()).graph_module
        inserted = [n for n in gm.graph.nodes if (o := origin_of(n)) and o.by == by]
        host = next(n for n in gm.graph.nodes if n.target is torch._C._nn.linear)
        with gm.graph.inserting_after(inserted[0]):
            write = gm.graph.call_function(torch.ops.aten.copy_.default, (host, host))
        write.meta.update(inserted[0].meta)
        with pytest.raises(RewriteError, match="writes to"):
            Verify()(gm)


def test_verify_refuses_a_blend_that_leaks_and_one_that_spies() -> None:
    gm = rewrite(growing_graph()).graph_module
    inner = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.bmm.default)
    out = gm.graph.output_node()
    with gm.graph.inserting_before(out):
        leak = gm.graph.call_function(torch.sum, (inner,))
    out.args = ((*out.args[0], leak),)
    with pytest.raises(RewriteError, match="not isolated: the host reads"):
        Verify()(gm)
    gm = rewrite(growing_graph()).graph_module
    inner = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.bmm.default)
    x = next(n for n in gm.graph.find_nodes(op="placeholder") if value_of(n).shape == (3, 8))
    inner.args = (x, inner.args[1])
    with pytest.raises(RewriteError, match="not isolated: it reads of the host"):
        Verify()(gm)


def test_verify_refuses_an_inserted_node_without_a_value() -> None:
    gm = rewrite(growing_graph()).graph_module
    node = next(n for n in gm.graph.nodes if origin_of(n) is not None)
    assert value_of(node) is not None
    for key in ("val", "example_value"):
        node.meta.pop(key, None)
    with pytest.raises(RewriteError, match="carries no value"):
        Verify()(gm)


def _leftover() -> Any:
    return growing_graph()


def _statistics_reach_the_output() -> Any:
    gm = rewrite(growing_graph()).graph_module
    stack = [n for n in gm.graph.nodes if n.target is torch.ops.aten.stack.default][-1]
    out = gm.graph.output_node()
    out.args = ((stack,),)
    return gm


def _blend_leaks() -> Any:
    gm = rewrite(growing_graph()).graph_module
    inner = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.bmm.default)
    out = gm.graph.output_node()
    out.args = ((*out.args[0], inner),)
    return gm


@spelled_as_torch_2_13
def test_golden() -> None:
    lines = []
    for make in (_leftover, _statistics_reach_the_output, _blend_leaks):
        with pytest.raises(RewriteError) as caught:
            Verify(strict=True)(make())
        lines.append(f"{make.__name__.strip('_')}: {caught.value}")
    assert_golden("\n".join(lines) + "\n", "verify/refusals", golden_dir=GOLDEN)


def test_a_leftover_is_no_refusal_unless_strict() -> None:
    gm = growing_graph()
    assert not Verify()(gm).modified
    assert not Verify()(gm).modified


def test_a_near_miss_a_host_that_reads_one_tensor_twice_is_isolated() -> None:
    gm = rewrite(growing_graph()).graph_module
    out = gm.graph.output_node()
    out.args = ((out.args[0][0], out.args[0][0]),)
    Verify(strict=True)(gm)

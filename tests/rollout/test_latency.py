"""Calls are counted and timed; on a GPU nothing waits for it."""

from __future__ import annotations

import copy
import pickle
import time

import pytest
import torch

from kasmina_fx.rollout import Latency

CPU = torch.device("cpu")


def test_calls_are_counted_and_timed_by_implementation() -> None:
    latency = Latency(("legacy", "chunked"))
    assert latency.average_ms("legacy") == 0.0
    for _ in range(2):
        with latency.call(CPU) as ran:
            time.sleep(0.01)
            ran.append("legacy")
    assert latency.calls == {"legacy": 2, "chunked": 0}
    assert latency.average_ms("legacy") >= 10.0
    assert latency.average_ms("chunked") == 0.0


def test_a_call_that_raises_is_none() -> None:
    latency = Latency(("legacy",))
    with pytest.raises(RuntimeError, match="no"), latency.call(CPU):
        raise RuntimeError("no")
    assert latency.calls == {"legacy": 0}


def test_a_call_that_compiles_is_counted_and_not_timed() -> None:
    latency = Latency(("chunked",))
    double = torch.compile(lambda x: x * 2, backend="eager")
    for _ in range(2):
        with latency.call(CPU) as ran:
            double(torch.ones(2))
            ran.append("chunked")
    assert latency.calls == {"chunked": 2}
    assert latency.timed == {"chunked": 1}


def test_copies_keep_the_counts() -> None:
    latency = Latency(("chunked",))
    with latency.call(CPU) as ran:
        ran.append("chunked")
    for copied in (copy.deepcopy(latency), pickle.loads(pickle.dumps(latency))):
        assert copied.calls == {"chunked": 1}


@pytest.mark.gpu
def test_events_are_read_later_and_nothing_waits() -> None:
    latency, x = Latency(("chunked",)), torch.randn(2048, 2048, device="cuda")
    torch.mm(x, x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(400):  # more than are kept
            with latency.call(x.device) as ran:
                torch.mm(x, x)
                ran.append("chunked")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert latency.calls == {"chunked": 400}
    torch.cuda.synchronize()
    assert 0.0 < latency.average_ms("chunked") < 100.0
    assert latency.timed["chunked"] >= 256
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), latency.call(x.device) as ran:
        torch.mm(x, x)
        ran.append("chunked")
    assert latency.calls == {"chunked": 401}

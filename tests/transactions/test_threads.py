"""The gate between forwards and changes: who waits for whom; and that nothing waits for good."""

from __future__ import annotations

import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec

import pytest
import torch
from torch import nn

from kasmina_fx import KasminaError, KasminaLayer, SeedLifecycle, kasminify
from kasmina_fx.errors import InsideForward
from kasmina_fx.testing import graft
from kasmina_fx.transactions.threads import _INSIDE, Forwards

LONG, SHORT = 20.0, 0.1  # seconds: for what must happen, and for what must not
P = ParamSpec("P")


class Visit:
    """A thread that enters the gate, says so, and leaves when told to."""

    def __init__(self, enter: Callable[[], Any]) -> None:
        self._enter = enter
        self.inside, self._leave = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        with self._enter():
            self.inside.set()
            self._leave.wait(LONG)

    def leave(self) -> None:
        self._leave.set()
        self.thread.join(LONG)
        assert not self.thread.is_alive()

    @property
    def waits(self) -> bool:
        return not self.inside.wait(SHORT)

    @property
    def entered(self) -> bool:
        return self.inside.wait(LONG)


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end, "it never happens"
        time.sleep(0.001)


def in_time(test: Callable[P, None]) -> Callable[P, None]:
    """A test that would wait for good, were the gate broken, fails instead."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        failures: list[BaseException | None] = []

        def body() -> None:
            try:
                test(*args, **kwargs)
            except BaseException as failure:
                failures.append(failure)
            else:
                failures.append(None)

        thread = threading.Thread(target=body, daemon=True)
        thread.start()
        thread.join(LONG)
        assert failures, "it hangs"
        if failures[0] is not None:
            raise failures[0]

    return run


@pytest.fixture(autouse=True)
def _gate_is_left_empty() -> Iterator[None]:
    yield
    assert not _INSIDE


def test_forwards_are_concurrent() -> None:
    gate = Forwards()
    visits = [Visit(gate.forward) for _ in range(4)]
    assert all(visit.entered for visit in visits)
    for visit in visits:
        visit.leave()


def test_a_publication_waits_until_the_last_forward_is_out() -> None:
    gate = Forwards()
    first, second = Visit(gate.forward), Visit(gate.forward)
    assert first.entered
    assert second.entered
    publication = Visit(gate.publication)
    assert publication.waits
    first.leave()
    assert publication.waits
    second.leave()
    assert publication.entered
    publication.leave()


def test_a_forward_waits_until_a_publication_is_over() -> None:
    gate = Forwards()
    publication = Visit(gate.publication)
    assert publication.entered
    forward = Visit(gate.forward)
    assert forward.waits
    publication.leave()
    assert forward.entered
    forward.leave()


def test_one_publication_at_a_time() -> None:
    gate = Forwards()
    first = Visit(gate.publication)
    assert first.entered
    second = Visit(gate.publication)
    assert second.waits
    first.leave()
    assert second.entered
    second.leave()


def test_a_publication_that_waits_goes_before_new_forwards() -> None:
    gate = Forwards()
    early = Visit(gate.forward)
    assert early.entered
    publication = Visit(gate.publication)
    _until(lambda: gate._waiting == 1)
    late = Visit(gate.forward)
    assert late.waits
    early.leave()
    assert publication.entered
    assert late.waits
    publication.leave()
    assert late.entered
    late.leave()


@in_time
def test_a_forward_inside_a_forward_does_not_wait_for_a_publication() -> None:
    gate = Forwards()
    with gate.forward():
        publication = Visit(gate.publication)
        _until(lambda: gate._waiting == 1)
        with gate.forward():  # would wait for the publication, which waits for this thread
            assert publication.waits
        assert publication.waits
    assert publication.entered
    publication.leave()


@in_time
def test_a_publication_inside_a_publication_and_a_forward_inside_that() -> None:
    gate = Forwards()
    with gate.publication():
        with gate.publication():
            pass
        other = Visit(gate.forward)
        assert other.waits  # the outer one goes on
        with gate.forward():
            pass
        assert other.waits
    assert other.entered
    other.leave()


@pytest.mark.parametrize("way", ["forward", "publication"])
def test_an_exception_opens_the_gate(way: str) -> None:
    gate = Forwards()
    with pytest.raises(KeyError), getattr(gate, way)():
        raise KeyError
    for kind in (gate.publication, gate.forward):
        visit = Visit(kind)
        assert visit.entered
        visit.leave()


def test_a_crowd_gets_through_and_none_sees_half_a_change() -> None:
    gate, pair, torn = Forwards(), [0, 0], list[list[int]]()

    def read() -> None:
        for _ in range(100):
            with gate.forward():
                first = pair[0]
                time.sleep(0)
                if pair[1] != first:
                    torn.append(list(pair))

    def write() -> None:
        for _ in range(30):
            with gate.publication():
                pair[0] += 1
                time.sleep(0.0005)
                pair[1] += 1

    threads = [threading.Thread(target=f, daemon=True) for f in (read, read, read, write, write)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
        assert not thread.is_alive()
    assert torn == []
    assert pair == [60, 60]


def test_an_interrupted_publication_lets_later_forwards_in() -> None:
    gate = Forwards()
    early = Visit(gate.forward)
    assert early.entered
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        _until(lambda: gate._waiting == 1)
        time.sleep(SHORT)
        signal.pthread_kill(main, signal.SIGINT)  # Ctrl-C

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt), gate.publication():
            pass
    finally:
        signal.signal(signal.SIGINT, before)
    early.leave()
    late = Visit(gate.forward)
    assert late.entered
    late.leave()


# What changes seeds asks the gate.


def _layer() -> KasminaLayer:
    layer = KasminaLayer(nn.Linear(4, 6), 3, layer_id="fc")
    graft(layer, 0, "affine", 0.5)
    return layer


CHANGES: dict[str, Callable[[KasminaLayer], Any]] = {
    "request_germination": lambda layer: layer.request_germination(1, "mlp"),
    "cancel_germination": lambda layer: layer.cancel_germination(0),
    "advance": lambda layer: layer.advance(0, SeedLifecycle.STABILIZATION),
    "reset": lambda layer: layer.reset(0),
    "set_alpha": lambda layer: layer.set_alpha(0, 1.0),
    "step_epoch": lambda layer: layer.step_epoch(),
    "transaction": lambda layer: layer.transaction().__enter__(),
    "a ramp": lambda layer: layer.state.set_device_alpha(torch.ones(3)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@in_time
def test_seeds_do_not_change_inside_the_threads_own_forward(
    change: Callable[[KasminaLayer], Any],
) -> None:
    layer = _layer()
    rows, alpha = layer.state.rows, layer.state.alpha
    with layer.siblings.threads.forwards.forward():
        with pytest.raises(InsideForward, match="inside a model's forward") as caught:
            change(layer)
        assert layer.state.stages.tolist() == [3, 0, 0]  # reading is fine
    assert isinstance(caught.value, KasminaError)
    assert isinstance(caught.value, RuntimeError)
    assert layer.state.rows is rows
    assert layer.state.alpha is alpha
    layer.advance(0, SeedLifecycle.STABILIZATION)  # not stuck


def test_a_change_is_staged_at_once_and_published_when_no_forward_is_inside() -> None:
    layer = _layer()
    forwards = layer.siblings.threads.forwards
    forward = Visit(forwards.forward)
    assert forward.entered
    old = layer.state.alpha
    change = threading.Thread(target=lambda: layer.set_alpha(0, 1.0), daemon=True)
    change.start()
    _until(lambda: forwards._waiting == 1)
    assert layer.state.alpha is old
    assert layer.kasmina.shown.layer[0] is old
    assert layer.state.alphas.tolist() == [0.5, 0, 0]
    forward.leave()
    change.join(LONG)
    assert layer.state.alpha.tolist() == [1, 0, 0]
    assert layer.kasmina.shown.layer[0] is layer.state.alpha


def test_a_ramp_waits_for_forwards_too() -> None:
    layer = _layer()
    forwards = layer.siblings.threads.forwards
    forward = Visit(forwards.forward)
    assert forward.entered
    ramp = threading.Thread(target=layer.step_epoch, daemon=True)
    ramp.start()
    _until(lambda: forwards._waiting == 1)
    assert layer.state.alpha.tolist() == [0.5, 0, 0]
    forward.leave()
    ramp.join(LONG)
    assert layer.state.alpha[0] > 0.5


@in_time
def test_a_compiled_model_passes_the_gate_and_is_refused_changes_inside() -> None:
    model = kasminify(nn.Sequential(nn.Linear(4, 6)), num_seeds=3)
    layer: Any = model[0]
    inside: list[bool] = []

    def meddle(*_: Any) -> None:
        inside.append(threading.get_ident() in layer.siblings.threads.forwards._inside)
        layer.set_alpha(0, 1.0)

    # Before anything is computed: there is nothing for Inductor to compile.
    model.register_forward_pre_hook(torch._dynamo.disable(meddle))
    with pytest.raises(InsideForward):
        model(torch.randn(2, 4))
    assert inside == [True]
    assert layer.state.alphas.tolist() == [0, 0, 0]

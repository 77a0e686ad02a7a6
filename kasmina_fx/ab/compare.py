"""Train two copies of a model side by side, one seed by seed, the other chunked."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from kasmina_fx._torch.dynamo import uncompiled
from kasmina_fx.ab.differences import Bounds, Difference
from kasmina_fx.ab.intervals import Interval, interval_of
from kasmina_fx.ab.memory import peak_bytes
from kasmina_fx.arguments import check_count, check_instance, check_number
from kasmina_fx.backend import kasmina
from kasmina_fx.bases.outputs import watched
from kasmina_fx.errors import InvalidArgument, shown
from kasmina_fx.hybrid_layer import HybridKasminaLayer
from kasmina_fx.model import layers_of
from kasmina_fx.reference import reference_mode
from kasmina_fx.rollout.switch import CHUNKED, IMPLEMENTATIONS, LEGACY

#: One batch: a tensor, positional arguments, or keyword arguments.
Batch: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]
#: Steps whose peak memory is measured, after those that are timed.
_MEASURED: Final = 3


@dataclass(frozen=True)
class ABReport:
    """What :func:`compare` found.

    Attributes:
        outputs, gradients, loss: Differences over all steps.
        losses: Loss of each step, by implementation.
        latency_ms: Of a step, forward and backward, by implementation; the first step, which may
            compile, is left out.
        latency_ratio: Chunked to legacy, of the same steps.
        peak_bytes: Of a step, beyond weights, by implementation.
        reasons: Why there is no parity; empty if there is.
    """

    outputs: Difference
    gradients: Difference
    loss: Difference
    losses: dict[str, list[float]]
    latency_ms: dict[str, Interval]
    latency_ratio: Interval
    peak_bytes: dict[str, Interval]
    reasons: tuple[str, ...]

    @property
    def parity(self) -> bool:
        """Whether all differences are within their bounds."""
        return not self.reasons

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, for JSON."""
        compared = {name: getattr(self, name).to_dict() for name in _COMPARED}
        return {
            **compared,
            "losses": self.losses,
            "latency_ms": {name: asdict(each) for name, each in self.latency_ms.items()},
            "latency_ratio": asdict(self.latency_ratio),
            "peak_bytes": {name: asdict(each) for name, each in self.peak_bytes.items()},
            "parity": self.parity,
            "reasons": list(self.reasons),
        }

    def __str__(self) -> str:
        """A line a figure."""
        lines = [f"{name:10} {_described(getattr(self, name))}" for name in _COMPARED]
        lines += [f"{name:10} {ms} ms a step" for name, ms in self.latency_ms.items()]
        lines += [f"{name:10} {held} bytes at the peak" for name, held in self.peak_bytes.items()]
        lines.append(f"{'ratio':10} {self.latency_ratio} chunked to legacy")
        lines.append("parity" if self.parity else "no parity: " + "; ".join(self.reasons))
        return "\n".join(lines)


_COMPARED: Final = ("outputs", "gradients", "loss")


def _described(found: Difference) -> str:
    return f"max {found.largest:.3g}, mean {found.mean:.3g}, allowed {found.allowed:.3g}"


def compare(
    model: nn.Module,
    inputs: Batch | Sequence[Batch],
    *,
    steps: int = 10,
    loss_fn: Callable[[Any, Batch], Tensor] | None = None,
    learning_rate: float = 1e-2,
    bounds: Bounds | None = None,
    compile: bool = False,
    confidence: float = 0.95,
) -> ABReport:
    """Train two copies of a model on the same batches with SGD, and compare every step.

    Both start from the model's weights, seeds and mode, and see the same random numbers; the model
    itself is not touched. One runs :func:`kasmina_fx.reference.forward` in every layer with seeds,
    the other what such layers run else. Nothing falls back: what raises is raised.

    Args:
        model: With KasminaLayers, hybrid or not, on one device.
        inputs: A batch (a tensor; a tuple of positional arguments; a dict of keyword arguments), or
            a list of batches, used one after the other and again from the start.
        steps: Training steps of each.
        loss_fn: ``(output, batch) -> loss``; the mean square of the output unless given.
        learning_rate: Of SGD.
        bounds: What counts as parity.
        compile: Run the chunked copy under ``torch.compile(backend="kasmina")``.
        confidence: Of the intervals of times and memory.

    Raises:
        NoTargets: No KasminaLayer in the model.
        InvalidArgument, InvalidType: Before anything ran.
    """
    layers_of(model)
    batches = _batches(inputs)
    check_count("steps", steps, least=1)
    check_number("learning_rate", learning_rate, 0.0)
    check_number("confidence", confidence, 0.0)
    if not 0.0 < confidence < 1.0:
        raise InvalidArgument(f"confidence={confidence}: give a number between 0 and 1")
    limits = Bounds() if bounds is None else bounds
    check_instance("bounds", limits, Bounds)
    both = {name: _Copy(model, name, compile, loss_fn, learning_rate) for name in IMPLEMENTATIONS}
    outputs, gradients = Difference(limits.outputs), Difference(limits.gradients)
    loss = Difference(limits.loss)
    for step in range(steps):
        batch = batches[step % len(batches)]
        # Taking turns, so that a machine that slows down slows both.
        for name in IMPLEMENTATIONS if step % 2 == 0 else reversed(IMPLEMENTATIONS):
            both[name].step(batch, step)
        old, new = both[LEGACY], both[CHUNKED]
        outputs.add(old.output, new.output)
        gradients.add_all(zip(old.gradients(), new.gradients(), strict=True))
        loss.add(old.loss, new.loss)
        for each in both.values():
            each.learn()
    found = dict(zip(_COMPARED, (outputs, gradients, loss), strict=True))
    times = {name: each.seconds[1:] for name, each in both.items()}
    ratios = [new / old for old, new in zip(times[LEGACY], times[CHUNKED], strict=True)]
    held = {name: each.peaks(batches[0]) for name, each in both.items()}
    return ABReport(
        outputs,
        gradients,
        loss,
        {name: each.losses[:steps] for name, each in both.items()},
        {name: interval_of([1e3 * s for s in each], confidence) for name, each in times.items()},
        interval_of(ratios, confidence),
        {name: interval_of(each, confidence) for name, each in held.items()},
        tuple(f"{name}: {_described(each)}" for name, each in found.items() if not each.holds),
    )


class _Copy:
    """A copy of a model that runs one implementation."""

    output: Tensor
    loss: Tensor

    def __init__(
        self,
        model: nn.Module,
        name: str,
        compile: bool,
        loss_fn: Callable[[Any, Batch], Tensor] | None,
        learning_rate: float,
    ) -> None:
        self.model = copy.deepcopy(uncompiled(model))
        self.name, self.loss_fn, self.learning_rate = name, loss_fn, learning_rate
        self.device = next(iter(layers_of(self.model).values())).state.alpha.device
        for layer in layers_of(self.model).values():
            if isinstance(layer, HybridKasminaLayer):
                layer.switch.falls_back = False
                layer.force_implementation = name
        compiled = compile and name == CHUNKED
        self.call = torch.compile(self.model, backend=kasmina) if compiled else self.model
        self.losses: list[float] = []
        self.seconds: list[float] = []

    @contextmanager
    def _mode(self) -> Iterator[None]:
        if self.name == CHUNKED:
            yield
        else:
            with reference_mode(self.model):
                yield

    def step(self, batch: Batch, number: int) -> None:
        """Forward and backward, timed."""
        self.model.zero_grad()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self._mode():
            torch.manual_seed(number)
            self._wait()
            start = time.perf_counter()
            out = self._called(batch)
            self.output = watched(out)
            loss = self.output.square().mean() if self.loss_fn is None else self.loss_fn(out, batch)
            loss.backward()
            self._wait()
        self.seconds.append(time.perf_counter() - start)
        self.loss = loss.detach()
        self.losses.append(float(self.loss))

    def peaks(self, batch: Batch) -> list[int]:
        """Peak memory of further steps."""
        steps = range(_MEASURED)
        return [peak_bytes(lambda: self.step(batch, 0), self.device) for _ in steps]

    def gradients(self) -> list[Tensor]:
        """Of every parameter that learns; zeros where nothing reached it."""
        learns = (p for p in self.model.parameters() if p.requires_grad)
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in learns]

    def learn(self) -> None:
        """A step of SGD."""
        with torch.no_grad():
            for p in self.model.parameters():
                if p.grad is not None:
                    p -= self.learning_rate * p.grad

    def _called(self, batch: Batch) -> Any:
        if isinstance(batch, Mapping):
            return self.call(**batch)
        return self.call(*batch) if isinstance(batch, tuple) else self.call(batch)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _batches(inputs: Any) -> list[Batch]:
    found = list(inputs) if isinstance(inputs, list) else [inputs]
    if not found or not all(isinstance(each, (Tensor, tuple, Mapping)) for each in found):
        raise InvalidArgument(
            f"inputs={shown(inputs)}: give a tensor, a tuple or a dict of arguments, or a list of "
            "at least one of these"
        )
    return found

"""Calls for all layers of a model at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kasmina_fx._dynamo_compat import uncompiled
from kasmina_fx.errors import InvalidType, NoTargets
from kasmina_fx.gate import GATE
from kasmina_fx.health import reports, to_json_values
from kasmina_fx.kasminify import kasmina_layers
from kasmina_fx.layer import KasminaLayer
from kasmina_fx.staging import LOCK


@contextmanager
def transaction(model: nn.Module) -> Iterator[None]:
    """Changes of many layers become visible together, at the end; an exception undoes them all.

    No forward of a kasminified model runs between the publication of the first layer and the last.

    Raises:
        NoTargets: The model has no KasminaLayer.
        InsideForward: Called from inside a forward, or :func:`hold_seeds`.
    """
    layers = _layers(model)
    GATE.refuse_inside_forward()
    with LOCK:
        with ExitStack() as staged:
            for layer in layers.values():
                staged.enter_context(layer.transaction())
            yield
            publications = staged.pop_all()
        with GATE.publication():
            publications.close()


@contextmanager
def hold_seeds(model: nn.Module) -> Iterator[None]:
    """No seed changes inside: other threads' changes wait for the end of the block to show.

    A call of a kasminified model does so by itself. Needed, beside controller threads, only where
    more than such a call must see one state: several calls, parts of the model called one by one, a
    larger model compiled around it, activation checkpointing with its backward. Put the
    optimizer's step behind the block.

    Raises:
        NoTargets: The model has no KasminaLayer.
        InsideForward: By changes that this thread makes inside.
    """
    colonies = {id(layer.colony): layer.colony for layer in _layers(model).values()}
    with ExitStack() as held:
        for colony in colonies.values():
            colony.enter()
            held.callback(colony.leave, compiled=True)  # maybe
        yield


def step_epoch(model: nn.Module) -> None:
    """:meth:`KasminaLayer.step_epoch` of every layer.

    Raises:
        NoTargets: The model has no KasminaLayer.
    """
    for layer in _layers(model).values():
        layer.step_epoch()


def follow_scaler(model: nn.Module, scaler: torch.amp.GradScaler | None) -> None:
    """Tell a model which GradScaler scales its loss; None: no one does.

    Reconstruction losses, which no training loop sees, are then scaled alike. Only needed where
    several scalers are alive, or one that is another model's: the only one is found when a seed
    enters TRAINING, and let go of at an optimizer step that is not its.

    Raises:
        NoTargets: The model has no KasminaLayer.
        InvalidType: No GradScaler.
    """
    given: Any = scaler  # from callers without a type checker, anything
    if not isinstance(given, torch.amp.GradScaler | None):
        raise InvalidType(f"follow_scaler(model, {scaler!r}): give a GradScaler, or None")
    for layer in _layers(model).values():
        layer.colony.follow_scaler(scaler)
        layer.publish()


def host_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The plain model's parameters, without those of blueprints.

    For what must not couple the two: ``clip_grad_norm_(host_parameters(model), 1.0)``.

    Raises:
        NoTargets: The model has no KasminaLayer.
    """
    layers = _layers(model).values()
    blueprints = {id(p) for layer in layers for p in layer.blueprint_parameters(False)}
    return (p for p in uncompiled(model).parameters() if id(p) not in blueprints)


class HealthReport(Mapping[str, dict[str, Any]]):
    """Every layer's report by its fully qualified name, see :mod:`kasmina_fx.health`."""

    def __init__(self, layers: dict[str, dict[str, Any]]) -> None:
        self._layers = layers

    def __getitem__(self, fqn: str) -> dict[str, Any]:
        """One layer's report."""
        return self._layers[fqn]

    def __iter__(self) -> Iterator[str]:
        """The layers' names."""
        return iter(self._layers)

    def __len__(self) -> int:
        """Number of layers."""
        return len(self._layers)

    def to_json(self, path: str | Path | None = None) -> str:
        """As JSON text, written to ``path`` if given; None stands for NaN and infinities."""
        text = json.dumps({fqn: to_json_values(report) for fqn, report in self.items()}, indent=1)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame``, a row a seed; needs pandas."""
        import pandas  # an extra

        return pandas.DataFrame(self._columns())

    def to_arrow(self) -> Any:
        """A ``pyarrow.Table``, a row a seed; needs pyarrow."""
        import pyarrow  # an extra

        return pyarrow.table(self._columns())

    def _columns(self) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {"layer": [], "seed": []}
        for fqn, report in self.items():
            count = report["num_seeds"]
            columns["layer"] += [fqn] * count
            columns["seed"] += range(count)
            for name, values in report.items():
                if isinstance(values, torch.Tensor):
                    columns.setdefault(name, []).extend(values.tolist())
        return columns


def health_report(model: nn.Module) -> HealthReport:
    """Every layer's figures; one device-to-host copy for the whole model.

    Seeds over their error limit are culled. Figures: see :func:`kasmina_fx.health.per_seed`.

    Raises:
        NoTargets: The model has no KasminaLayer.
    """
    layers = _layers(model)
    found = reports([layer.kasmina for layer in layers.values()])
    return HealthReport(dict(zip(layers, found, strict=True)))


def _layers(model: nn.Module) -> dict[str, KasminaLayer]:
    layers = kasmina_layers(model)
    if not layers:
        raise NoTargets(f"{type(model).__name__} has no KasminaLayer: call kasminify(model) first")
    return layers

"""The health of all layers of a model, for people and controllers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kasmina_fx.lifecycle import SeedLifecycle
from kasmina_fx.model import layers_of
from kasmina_fx.seeds.health import reports


class HealthReport(Mapping[str, dict[str, Any]]):
    """Every layer's report by its fully qualified name, see :mod:`kasmina_fx.seeds.health`."""

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

    def __str__(self) -> str:
        """A table: a line a layer, with its seeds by stage."""
        lines = []
        for fqn, report in self.items():
            health = report["health"]
            known = health[~health.isnan()]
            mean = f"{float(known.mean()):.3f}" if len(known) else "unknown"
            stages = report["stage"].bincount(minlength=len(SeedLifecycle)).tolist()
            counts = ", ".join(
                f"{n} {s.name}" for s, n in zip(SeedLifecycle, stages, strict=True) if n
            )
            errors = int(report["errors"].sum())
            lines.append(f"{fqn or '(model)'}: health {mean}, {errors} errors; {counts}")
        return "\n".join(lines)

    __repr__ = __str__

    def to_json(self, path: str | Path | None = None) -> str:
        """Return JSON text, written to ``path`` if given; None stands for NaN and infinities."""
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
                    named = (
                        map(_stage_name, values.tolist()) if name == "stage" else values.tolist()
                    )
                    columns.setdefault(name, []).extend(named)
        return columns


def _stage_name(number: int) -> str:
    return SeedLifecycle(number).name


def health_report(model: nn.Module) -> HealthReport:
    """Every layer's figures; one device-to-host copy for the whole model.

    Seeds over their error limit are culled. Figures: see :func:`kasmina_fx.seeds.health.per_seed`,
    and :func:`kasmina_fx.seeds.health.gradient_rms`.

    Raises:
        NoTargets: The model has no KasminaLayer.
    """
    layers = layers_of(model)
    found = reports([layer.kasmina for layer in layers.values()])
    return HealthReport(dict(zip(layers, found, strict=True)))


def to_json_values(report: dict[str, Any]) -> dict[str, Any]:
    """A report with lists for tensors, and None for NaN and infinities, which JSON lacks."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return plain(value.tolist())
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, dict):
            return {str(key): plain(v) for key, v in value.items()}
        return value

    return {key: plain(value) for key, value in report.items()}

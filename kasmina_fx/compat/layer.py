"""The layer that older code builds: its constructor, calls and attributes, around real seeds."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from kasmina_fx.arguments import check_count, check_instance
from kasmina_fx.bases.features import find_features
from kasmina_fx.compat.kernel_layer import KernelLayer
from kasmina_fx.compat.kernels import ErrorRecovery, KernelCache, KernelExecutor
from kasmina_fx.compat.old_state_dicts import load_old_entries
from kasmina_fx.compat.state_layout import Notes
from kasmina_fx.errors import InvalidArgument

if TYPE_CHECKING:
    from typing_extensions import Self

_LOG: Final = logging.getLogger(__name__)


class KasminaLayer(KernelLayer):
    """A Linear with seeds, by the older constructor; a :class:`kasmina_fx.KasminaLayer`.

    Args:
        input_size: Features in.
        output_size: Features out.
        num_seeds: Seeds; no more than the features out are made.
        cache_size_mb: Of kernels that are kept when read, MiB.
        telemetry_enabled: Keep statistics, and tell the message bus of kernels.
        layer_name: Name in messages and reports.
        oona_client: A message bus: what has ``publish(dict)``, a coroutine function or not.

    Attributes:
        total_forward_calls: Calls that Python made: a compiled model's are not counted.
        total_kernel_executions: Of these, times the seeds in effect.

    >>> layer = KasminaLayer(8, 10, num_seeds=2, telemetry_enabled=False)
    >>> layer(torch.zeros(3, 8)).shape, layer.get_layer_stats()["total_forward_calls"]
    (torch.Size([3, 10]), 1)
    """

    kind: type[nn.Module] = nn.Module  # what :meth:`around` takes

    def __init__(
        self,
        input_size: int,
        output_size: int,
        num_seeds: int = 4,
        cache_size_mb: int = 128,
        telemetry_enabled: bool = True,
        layer_name: str = "kasmina_layer",
        oona_client: Any = None,
    ) -> None:
        base = nn.Linear(input_size, output_size)
        self._build(base, num_seeds, cache_size_mb, telemetry_enabled, layer_name, oona_client)

    @classmethod
    def around(
        cls,
        base: nn.Module,
        num_seeds: int = 4,
        cache_size_mb: int = 128,
        telemetry_enabled: bool = True,
        layer_name: str = "kasmina_layer",
        oona_client: Any = None,
    ) -> Self:
        """Make a layer around a module that is there: it is used, not copied.

        Raises:
            InvalidType: Not of the kind that this class is for.
        """
        check_instance("base", base, cls.kind)
        layer = cls.__new__(cls)
        layer._build(base, num_seeds, cache_size_mb, telemetry_enabled, layer_name, oona_client)
        return layer

    def _build(
        self,
        base: nn.Module,
        num_seeds: int,
        cache_size_mb: int,
        telemetry_enabled: bool,
        layer_name: str,
        oona_client: Any,
    ) -> None:
        check_count("num_seeds", num_seeds, least=1)
        check_count("cache_size_mb", cache_size_mb)
        features = find_features(base, None, None).count
        seeds = min(num_seeds, features)
        super().__init__(base, seeds, layer_id=layer_name, telemetry=telemetry_enabled)
        if seeds < num_seeds:
            text = "%s: %d features have %d seeds, not %d: a seed has one at least"
            _LOG.warning(text, layer_name, features, seeds, num_seeds)
        sizes = (getattr(base, name, None) for name in ("in_features", "in_channels"))
        self.input_size: int = next((n for n in sizes if isinstance(n, int)), features)
        self.output_size: int = features
        self.oona_client = oona_client
        self.kernel_cache = KernelCache(cache_size_mb, max_entries=min(4 * seeds, 64))
        self.kernel_executor = KernelExecutor(max_kernel_cache_size=min(2 * seeds, 32))
        self.error_recovery = ErrorRecovery()
        self.total_forward_calls = 0
        self.total_kernel_executions = 0
        self._notes = Notes.of(seeds)
        self._tickets = Counter()
        module: nn.Module = self
        module.register_load_state_dict_pre_hook(load_old_entries)

    @property
    def default_transform(self) -> Any:
        """The module that is watched."""
        return self.base

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute.

        Raises:
            InvalidArgument: The module that seeds watch can't be replaced.
        """
        if name == "default_transform":
            raise InvalidArgument(
                "default_transform can't be replaced, its seeds watch it: make the layer with "
                f"{type(self).__name__}.around(module), or copy weights into it"
            )
        super().__setattr__(name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output with the contributions of the seeds in effect.

        One input may come as ``x``, the name that older code gives it.
        """
        if not args and kwargs.keys() == {"x"}:
            args, kwargs = (kwargs["x"],), {}
        out = super().forward(*args, **kwargs)
        self._count_call()
        return out

    def _count_call(self) -> None:
        # In a graph a counter on the module would be a constant, and cost a compile a call.
        if torch.compiler.is_compiling():
            return
        counts = self.__dict__
        counts["total_forward_calls"] += 1
        if len(self.kasmina.banks):
            counts["total_kernel_executions"] += int(self.state.blended.sum())

    def get_layer_stats(self) -> dict[str, Any]:
        """What older code reads, and all of :meth:`kasmina_fx.KasminaLayer.get_layer_stats`."""
        calls = self.total_forward_calls
        return super().get_layer_stats() | {
            "layer_name": self.layer_name,
            "total_forward_calls": calls,
            "total_kernel_executions": self.total_kernel_executions,
            "kernel_execution_ratio": self.total_kernel_executions / max(calls, 1),
            "state_stats": self.state_layout.get_stats(),
            "cache_stats": self.kernel_cache.get_cache_stats(),
            "error_recovery_stats": self.error_recovery.get_recovery_stats(),
        }

    @staticmethod
    def _compute_health_score(output: Tensor) -> float:
        """``1 / (1 + norm)``, as older code has it; one device copy."""
        return 1.0 / (1.0 + float(torch.linalg.vector_norm(output.detach().float())))

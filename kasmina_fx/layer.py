"""The logical layer: a base module, its chunks, and the seeds that watch them.

Forward computes the base and calls the two markers of :mod:`kasmina_fx.ops`. All else here is the
host's side: checked changes of seed state, which forward sees as whole tables of tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kasmina_fx import host_state, ops
from kasmina_fx._dynamo_compat import is_exporting
from kasmina_fx.allocation import allocate
from kasmina_fx.blueprints.registry import DEFAULT
from kasmina_fx.chunk_manager import ChunkManager, as_sizes
from kasmina_fx.config import SeedConfig, TelemetryPolicy
from kasmina_fx.errors import InvalidArgument, InvalidType
from kasmina_fx.features import find_features
from kasmina_fx.health import reports
from kasmina_fx.host import Host
from kasmina_fx.logical_seed import LogicalSeed, SeedSequence
from kasmina_fx.published import Published
from kasmina_fx.seating import SMALLEST
from kasmina_fx.seed_control import SeedCommands
from kasmina_fx.seed_store import SeedStore

_NUMBERS = itertools.count()


class KasminaLayer(SeedCommands, nn.Module):
    """A module whose output features are cut into chunks, each watched by a seed.

    Args:
        base: Any module whose output (or, of a tuple, first output) has a feature dimension.
        num_seeds: Seeds, 1 up to the number of features.
        chunk_sizes: Features of each chunk; by default as equal as can be.
        feature_dim: Dimension of the features; found from the type of base unless given.
        layer_id: Name in messages and reports.
        telemetry: Keep statistics of every chunk; a :class:`TelemetryPolicy` says of how much.
        reserve: Slots for the default blueprint to allocate ahead; above 0 the layer starts in its
            growing graph.
        config: Ramps, embargo and error limit.

    Raises:
        InvalidArgument: Seeds, sizes or a base that don't fit; the message says which.

    Calls that change seeds take effect on a compiled model and recompile nothing, growth included,
    but for the first germination of a blueprint class in a model that reserved none.

    >>> from kasmina_fx import SeedLifecycle
    >>> layer = KasminaLayer(nn.Linear(8, 10), num_seeds=4)
    >>> layer.request_germination([0, 2])
    True
    >>> layer.advance([0, 2], SeedLifecycle.TRAINING)
    >>> layer.advance([0, 2], SeedLifecycle.GRAFTING)
    >>> layer.set_alpha([0, 2], 0.5)
    >>> layer(torch.zeros(3, 8)).shape
    torch.Size([3, 10])
    >>> layer.state.get_state_distribution()
    {'DORMANT': 2, 'GRAFTING': 2}
    """

    _published: Published

    def __init__(
        self,
        base: nn.Module,
        num_seeds: int,
        *,
        chunk_sizes: Sequence[int] | None = None,
        feature_dim: int | None = None,
        layer_id: str | None = None,
        telemetry: bool | TelemetryPolicy = True,
        reserve: int = 0,
        config: SeedConfig | None = None,
    ) -> None:
        super().__init__()
        total = None if chunk_sizes is None else sum(as_sizes(chunk_sizes))
        features = find_features(base, feature_dim, total)
        chunks = ChunkManager(
            features.count, num_seeds, chunk_sizes=chunk_sizes, feature_dim=features.dim
        )
        given: Any = reserve  # from callers without a type checker, anything
        if isinstance(given, bool) or not isinstance(given, int) or given < 0:
            raise InvalidArgument(f"reserve={reserve!r}: give a number of slots, 0 or more")
        self._layout = str(chunks.layout)
        if not isinstance(config, SeedConfig | None):
            raise InvalidType(f"config={config!r}: give a SeedConfig")
        self.base = base
        name = layer_id or f"kasmina_{next(_NUMBERS)}"
        self.kasmina = SeedStore(chunks, Host(base, features), name, config or SeedConfig())
        self.set_telemetry(telemetry)
        self.training = base.training
        host_state.attach(self)
        if reserve:
            allocate(self.kasmina, DEFAULT, capacity=max(SMALLEST, reserve))
        self._connect()

    # Forward.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's output with the blended seeds' contributions."""
        # _modules, because __getattr__ below is ours and Dynamo would trace into it.
        out = self._modules["base"](*args, **kwargs)  # type: ignore[misc]  # never None
        y = out[0] if isinstance(out, tuple) else out
        seen = self._tables()
        banks = seen.banks if self.training else seen.banks_in_eval
        y, notes = ops.BLEND(
            y,
            seen.layer,
            seen.seeds,
            seen.positions,
            seen.modes,
            seen.trainees,
            seen.params,
            self._layout,
            banks,
        )
        if self.telemetry_enabled:
            store: Any = self._modules["kasmina"]
            ops.OBSERVE(y, notes, store.telemetry.accumulated, self._layout, self._one_in)
        return (y, *out[1:]) if isinstance(out, tuple) else y

    def _tables(self) -> Published:
        if is_exporting():
            # Export must see registered tensors.
            store = self.kasmina
            return store.read_by_graph(store.telemetry.faults, store.loss_scale)
        if torch.compiler.is_dynamo_compiling():
            return self._published
        self.colony.training.seen()
        # Eagerly, parameters are read where functional_call and parametrizations replace them.
        return self._published.with_params(self.kasmina.stacks())

    # Views.

    @property
    def seeds(self) -> Sequence[LogicalSeed]:
        """The seeds one by one, made when asked for."""
        return SeedSequence(self)

    def blueprint_parameters(self, trainable_only: bool = True) -> Iterator[nn.Parameter]:
        """The stacked parameters, for optimizers.

        They are the same objects until a bank outgrows its capacity.
        """
        for parameter in self.kasmina.banks.parameters():
            if parameter.requires_grad or not trainable_only:
                yield parameter

    # Reports.

    def set_telemetry(self, policy: bool | TelemetryPolicy) -> None:
        """Statistics of every step (True), none (False: another graph), or as a policy says."""
        if not isinstance(policy, (bool, TelemetryPolicy)):
            raise InvalidArgument(f"telemetry={policy!r}: give a bool or a TelemetryPolicy")
        chosen = policy if isinstance(policy, TelemetryPolicy) else TelemetryPolicy()
        self.telemetry_enabled = policy is not False
        self._one_in = chosen.one_in
        self.kasmina.telemetry.observe_every(chosen.every)

    def get_health_report(self) -> dict[str, Any]:
        """Statistics of every seed as CPU tensors ``(S,)``; one device-to-host copy.

        Seeds over their error limit are culled. Figures: see :func:`kasmina_fx.health.per_seed`.
        """
        (report,) = reports([self.kasmina])
        return report

    def get_layer_stats(self) -> dict[str, Any]:
        """Counts for the layer as a whole, from the host's tables: no device copy."""
        banks = {
            name: {"slots": bank.capacity, "used": int((bank.held > 0).sum())}
            for name, bank in zip(self.kasmina.banks, self.kasmina.bank_list(), strict=True)
        }
        return {
            "layer_id": self.layer_id,
            "num_seeds": self.num_seeds,
            "features": self.chunks.layer_dim,
            "layout": self._layout,
            "stages": self.state.get_state_distribution(),
            "blended": int(self.state.blended.sum()),
            "banks": banks,
            "telemetry_enabled": self.telemetry_enabled,
        }

    def extra_repr(self) -> str:
        """Name and layout."""
        return f"{self.layer_id!r}, seeds={self.num_seeds}, {self._layout}"

    # Keeping what forward reads in step with what is registered.

    def _connect(self) -> None:
        self.kasmina.on_publish = self._show
        self.kasmina.publish()

    def _show(self, published: Published) -> None:
        self._published = published

    def publish(self) -> None:
        """Make the state that is on the host now what every later forward reads."""
        self.kasmina.publish()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KasminaLayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's, unannotated
        self.kasmina.publish()  # .to() replaced tensors
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without the published tables, which are derived."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]  # torch's, unannotated
        state.pop("_published", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's, unannotated
        self._connect()

    # The base's attributes: code that reads layer.weight goes on working.

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base")
            if base is None or name.startswith("__"):
                raise
            return getattr(base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        base = self.__dict__.get("_modules", {}).get("base")
        if base is not None and (name in base._parameters or name in base._buffers):
            setattr(base, name, value)  # layer.weight = tied.weight
        else:
            super().__setattr__(name, value)

"""Layers with seeds: a module's forward, then the two markers on what it returned.

:class:`SeededModule` is what all of them can do. :class:`KasminaLayer` does it around a base, for
code that builds layers by hand; :mod:`kasmina_fx.class_swap` does it to a module that is there.
Both hold one :class:`~kasmina_fx.seeds.store.SeedStore` under the name ``kasmina``.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from kasmina_fx._torch.dynamo import being_recorded
from kasmina_fx.arguments import check_count, check_instance
from kasmina_fx.banks.placement import SMALLEST
from kasmina_fx.bases.features import find_features
from kasmina_fx.bases.host import Host
from kasmina_fx.bases.outputs import replaced, watched
from kasmina_fx.blueprints.registry import DEFAULT
from kasmina_fx.chunk_manager import ChunkManager, as_sizes
from kasmina_fx.config import SeedConfig, TelemetryPolicy
from kasmina_fx.errors import InvalidArgument
from kasmina_fx.logical_seed import LogicalSeed, SeedSequence
from kasmina_fx.physical import markers
from kasmina_fx.physical.blend import blend
from kasmina_fx.physical.graph_inputs import SHOWN, GraphInputs
from kasmina_fx.physical.programs import plain_operators
from kasmina_fx.physical.sense import SENSE
from kasmina_fx.seeds import outside, state_dict
from kasmina_fx.seeds.allocation import allocate
from kasmina_fx.seeds.commands import SeedCommands
from kasmina_fx.seeds.finished import in_evaluation
from kasmina_fx.seeds.health import reports
from kasmina_fx.seeds.state_dict_checks import check
from kasmina_fx.seeds.store import SeedStore
from kasmina_fx.transactions.threads import inside_forward

_NUMBERS = itertools.count()


def seeds_for(
    base: nn.Module,
    num_seeds: int,
    *,
    chunk_sizes: Sequence[int] | None = None,
    feature_dim: int | None = None,
    layer_id: str | None = None,
    telemetry: bool | TelemetryPolicy = True,
    reserve: int = 0,
    config: SeedConfig | None = None,
    without: str | None = None,
) -> SeedStore:
    """The seeds that watch a module, held by nothing yet; the module does not change.

    Arguments are those of :class:`KasminaLayer`, and ``without`` that of
    :class:`~kasmina_fx.bases.host.Host`.

    Raises:
        InvalidArgument, InvalidType: Seeds, sizes or a base that don't fit; says which.
    """
    check_instance("base", base, nn.Module)
    if layer_id is not None:
        check_instance("layer_id", layer_id, str)
    own = base if without is not None else None  # the layer itself, made in place
    seeded = (n for n, m in base.named_modules() if isinstance(m, SeededModule) and m is not own)
    inside = next(seeded, None)
    if inside is not None:
        raise InvalidArgument(
            f"{inside or 'the base'} has seeds already, and a layer around it would mix up their "
            "entries in state dicts: call unkasminify on it first"
        )
    total = None if chunk_sizes is None else sum(as_sizes(chunk_sizes))
    features = find_features(base, feature_dim, total)
    chunks = ChunkManager(
        features.count, num_seeds, chunk_sizes=chunk_sizes, feature_dim=features.dim
    )
    check_count("reserve", reserve)
    if config is not None:
        check_instance("config", config, SeedConfig)
    name = layer_id or f"kasmina_{next(_NUMBERS)}"
    store = SeedStore(chunks, Host(base, features, without), name, config or SeedConfig())
    store.observe(telemetry)
    store.training = base.training
    state_dict.attach(store)
    if reserve:
        allocate(store, DEFAULT, capacity=max(SMALLEST, reserve))
        store.takes_part = True
    store.publish()
    return store


class SeededModule(SeedCommands, nn.Module):
    """Any layer with seeds: views, reports, commands, and what forward does with an output."""

    kasmina: SeedStore

    @property
    @abstractmethod
    def base(self) -> nn.Module:
        """The module that the seeds watch: what it returns is what they are given."""

    def seeds_on(self, out: Any) -> Any:
        """What blended seeds make of the base's output; the statistics see it."""
        store: SeedStore = self._modules["kasmina"]  # type: ignore[assignment]  # not by __getattr__
        y = watched(out)
        if store.packs.mixed is not None:
            return replaced(out, store.packs.mixed.blend(y, store.layout_text, self.training))
        inputs = self._read(store)
        asked = inputs.blend_arguments(y, store.layout_text, self.training)
        if plain_operators():
            # vmap knows no operator of ours, and a program is run by others; neither keeps
            # statistics.
            return replaced(out, blend(asked)[0]) if asked.banks else out
        y, notes = markers.BLEND(*asked)
        if store.observed and (self.training or store.in_eval) and not being_recorded():
            accumulated: Any = store._modules["telemetry"]._buffers["accumulated"]  # type: ignore[union-attr]  # never None
            how = (store.layout_text, store.one_in, store.rows_seen)
            if inputs.gradients and torch.is_grad_enabled():
                y = SENSE(y, *inputs.gradients, *how)
            markers.OBSERVE(y, notes, accumulated, *how)
        return replaced(out, y)

    def _read(self, store: SeedStore) -> GraphInputs:
        if being_recorded():
            # Export must see registered tensors, and a trace no leaf that requires a gradient.
            return store.registered_inputs()
        if torch.compiler.is_dynamo_compiling():
            return store.shown if store.key is None else SHOWN[store.key]
        store.siblings.training.seen()
        store.__dict__["called"] = True
        if store.registered.written and not inside_forward():  # a layer called by itself
            outside.take_over(store)
        # Eagerly, parameters are read where functional_call and parametrizations replace them.
        return outside.inputs_now(store)

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

    def get_health_report(self) -> dict[str, Any]:
        """Statistics of every seed as CPU tensors ``(S,)``; one device-to-host copy.

        Seeds over their error limit are culled. Figures: see
        :func:`kasmina_fx.seeds.health.per_seed`, and ``gradient_rms`` there.
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
            "layout": self.kasmina.layout_text,
            "stages": self.state.get_state_distribution(),
            "blended": int(self.state.blended.sum()),
            "banks": banks,
            "folding": in_evaluation(self.kasmina),
            "telemetry_enabled": self.telemetry_enabled,
        }

    def publish(self) -> None:
        """Make the state that is on the host now what every later forward reads."""
        outside.restore(self.kasmina)

    def _described(self) -> str:
        return f"{self.layer_id!r}, seeds={self.num_seeds}, {self.kasmina.layout_text}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        check(self.kasmina, state_dict, prefix)  # before the base takes anything
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's, unannotated
        self._connect()

    def _connect(self) -> None:
        """The seeds of a copy watch the copied module."""
        self.kasmina.host.connect(self.base)


class KasminaLayer(SeededModule):
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
        store = seeds_for(
            base,
            num_seeds,
            chunk_sizes=chunk_sizes,
            feature_dim=feature_dim,
            layer_id=layer_id,
            telemetry=telemetry,
            reserve=reserve,
            config=config,
        )
        self._modules["base"] = base
        self.kasmina = store
        self.training = base.training
        state_dict.attach_names(self)

    @property
    def base(self) -> nn.Module:
        """The module that is watched, a child of this one."""
        return self._modules["base"]  # type: ignore[return-value]  # never None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's output with the blended seeds' contributions."""
        # _modules, because __getattr__ below is ours and Dynamo would trace into it.
        return self.seeds_on(self._modules["base"](*args, **kwargs))  # type: ignore[misc]  # never None

    def extra_repr(self) -> str:
        """Name and layout."""
        return self._described()

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

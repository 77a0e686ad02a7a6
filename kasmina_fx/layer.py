"""The logical layer: a base module, its chunks, and the seeds that watch them.

Forward computes the base and calls the two markers of :mod:`kasmina_fx.ops`. All else here is the
host's side: checked changes of seed state, which forward sees as whole tables of tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kasmina_fx import host_state, ops
from kasmina_fx._torch_compat import is_exporting
from kasmina_fx.bank import SMALLEST, Bank
from kasmina_fx.blueprints.registry import DEFAULT, lookup
from kasmina_fx.chunk_manager import ChunkManager
from kasmina_fx.colony import Colony
from kasmina_fx.errors import InvalidArgument
from kasmina_fx.features import find_features
from kasmina_fx.layout import BankSpec, format_banks
from kasmina_fx.lifecycle import holds_blueprint
from kasmina_fx.logical_seed import LogicalSeed, SeedSequence
from kasmina_fx.seed_control import SeedControl
from kasmina_fx.seed_store import SeedStore
from kasmina_fx.telemetry import summary

_NUMBERS = itertools.count()


class Published:
    """What a forward reads, as one object: replaced whole, so that none sees half a change.

    A plain object, because Dynamo (torch 2.11 to 2.13) forces the shapes of whatever it reaches as
    a module's parameter or buffer to be static.
    """

    def __init__(self, banks: Sequence[Bank]) -> None:
        specs = [bank.spec for bank in banks]
        self.banks = format_banks(specs)
        # The same text where no blueprint cares: then nothing is compiled anew.
        self.banks_in_eval = format_banks([spec_in_eval(spec) for spec in specs])
        self.seeds = [bank.seeds for bank in banks]
        self.positions = [bank.positions for bank in banks]
        self.alphas = [bank.alphas for bank in banks]
        self.params = [stack for bank in banks for stack in bank.tensors()]


def spec_in_eval(spec: BankSpec) -> BankSpec:
    """What a bank is in evaluation: another one if its blueprint behaves differently there."""
    blueprint = lookup(spec.kind)
    return spec if blueprint.in_mode(False) is blueprint else replace(spec, training=False)


class KasminaLayer(SeedControl):
    """A module whose output features are cut into chunks, each watched by a seed.

    Args:
        base: Any module whose output (or, of a tuple, first output) has a feature dimension.
        num_seeds: Seeds, 1 up to the number of features.
        chunk_sizes: Features of each chunk; by default as equal as can be.
        feature_dim: Dimension of the features; found from the type of base unless given.
        layer_id: Name in messages and reports.
        telemetry: Keep statistics of every chunk.
        reserve: Slots for the default blueprint to allocate ahead; above 0 the layer starts in its
            growing graph.

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
        telemetry: bool = True,
        reserve: int = 0,
    ) -> None:
        super().__init__()
        total = None if chunk_sizes is None else sum(chunk_sizes)
        self._features = find_features(base, feature_dim, total)
        self.layer_id = layer_id or f"kasmina_{next(_NUMBERS)}"
        self._chunks = ChunkManager(
            self._features.count,
            num_seeds,
            chunk_sizes=chunk_sizes,
            feature_dim=self._features.dim,
        )
        given: Any = reserve  # from callers without a type checker, anything
        if isinstance(given, bool) or not isinstance(given, int) or given < 0:
            raise InvalidArgument(f"reserve={reserve!r}: give a number of slots, 0 or more")
        self._layout = str(self._chunks.layout)
        self.telemetry_enabled = telemetry
        self.base = base
        like = host_state.floating_tensor(base)
        device = torch.device("cpu") if like is None else like.device
        self.kasmina = SeedStore(self._chunks, device, self.layer_id)
        self.training = base.training
        self.colony = Colony()
        host_state.attach(self)
        if reserve:
            self.allocate(DEFAULT, capacity=max(SMALLEST, reserve))
        self.publish()

    # Forward.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's output with the blended seeds' contributions."""
        # _modules, because __getattr__ below is ours and Dynamo would trace into it.
        out = self._modules["base"](*args, **kwargs)  # type: ignore[misc]  # never None
        y = out[0] if isinstance(out, tuple) else out
        seen = self._tables()
        banks = seen.banks if self.training else seen.banks_in_eval
        y, rejected = ops.BLEND(
            y, seen.seeds, seen.positions, seen.alphas, seen.params, self._layout, banks
        )
        if self.telemetry_enabled:
            store: Any = self._modules["kasmina"]
            ops.OBSERVE(y, rejected, store.telemetry.accumulated, self._layout)
        return (y, *out[1:]) if isinstance(out, tuple) else y

    def _tables(self) -> Published:
        if is_exporting():
            return Published(self._banks())  # export must see registered tensors
        if torch.compiler.is_dynamo_compiling():
            return self._published
        # Eagerly, parameters are read where functional_call and parametrizations replace them.
        seen = Published.__new__(Published)
        seen.__dict__.update(self._published.__dict__)
        seen.params = [stack for bank in self._banks() for stack in bank.tensors()]
        return seen

    # Views.

    @property
    def chunks(self) -> ChunkManager:
        """The layer's chunks."""
        return self._chunks

    @property
    def seeds(self) -> Sequence[LogicalSeed]:
        """The seeds one by one, made when asked for."""
        return SeedSequence(self)

    def bank_of(self, seed_id: int) -> tuple[Bank, int] | None:
        """The bank and slot that hold a seed's blueprint, or None."""
        blueprint_id = self.state.blueprint_ids[seed_id : seed_id + 1]
        if not bool(holds_blueprint(self.state.stages[seed_id : seed_id + 1])):
            return None
        for bank in self._banks():
            run = bank.run
            if run.first_seed <= seed_id < run.first_seed + run.count:
                slot = int(bank.slot_of(blueprint_id))
                if slot >= 0:
                    return bank, slot
        return None

    def blueprint_parameters(self, trainable_only: bool = True) -> Iterator[nn.Parameter]:
        """The stacked parameters, for optimizers.

        They are the same objects until a bank outgrows its capacity.
        """
        for parameter in self.kasmina.banks.parameters():
            if parameter.requires_grad or not trainable_only:
                yield parameter

    # Reports.

    def get_health_report(self) -> dict[str, Any]:
        """Statistics of every seed as CPU tensors ``(S,)``; one device-to-host copy."""
        report: dict[str, Any] = {"layer_id": self.layer_id, "num_seeds": self.num_seeds}
        report |= summary(self.kasmina.telemetry.accumulated)
        report |= {"stage": self.state.stages.clone(), "alpha": self.state.alphas.clone()}
        return report

    def get_layer_stats(self) -> dict[str, Any]:
        """Counts for the layer as a whole, from the host's tables: no device copy."""
        banks = {
            name: {"slots": bank.capacity, "used": int((bank.held > 0).sum())}
            for name, bank in zip(self.kasmina.banks, self._banks(), strict=True)
        }
        return {
            "layer_id": self.layer_id,
            "num_seeds": self.num_seeds,
            "features": self._chunks.layer_dim,
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

    def publish(self) -> None:
        """Make the state that is on the host now what every later forward reads."""
        self.state.on_publish = self.publish
        self.colony.add(self)
        self.kasmina.publish()
        self._published = Published(self._banks())

    def reload(self) -> None:
        """Take the host's tables from the registered tensors: after these were loaded."""
        self.state.refresh_mirror()
        for bank in self._banks():
            bank.held = bank.slots.detach().cpu().clone()
        self.publish()

    def _like(self) -> Tensor | None:
        return host_state.floating_tensor(self.base)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KasminaLayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's, unannotated
        self.publish()  # .to() replaced tensors
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without the published tables, which are derived."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]  # torch's, unannotated
        state.pop("_published", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's, unannotated
        self.publish()

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

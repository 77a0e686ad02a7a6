"""Named sets of seeds, blueprints and alphas over all layers of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from kasmina_fx._torch.dynamo import uncompiled
from kasmina_fx.arguments import check_instance
from kasmina_fx.errors import InvalidArgument, InvalidType, LayoutMismatch, shown
from kasmina_fx.layer import KasminaLayer
from kasmina_fx.model import layers_of, threads_of, transaction
from kasmina_fx.seeds.mixed import MixedPacks, mixed
from kasmina_fx.seeds.model_call import runs_compiled
from kasmina_fx.seeds.packs import KeptPack
from kasmina_fx.seeds.switching import keep, put_in
from kasmina_fx.transactions.threads import ModelThreads, refuse_inside_forward


class ModelPacks:
    """The packs of a model; made by :func:`packs`, and the same whoever asks: layers hold them.

    One pack is *in use*, or none: its seeds are those of the model, which commands, training and
    forwards go on changing. All others are put away, as they were when they were last in use.
    """

    def __init__(self, model: nn.Module) -> None:
        layers_of(model)
        self._model = model

    def __repr__(self) -> str:
        """Names, and which is in use."""
        return f"packs({self.names()}, active={self.active!r})"

    def names(self) -> list[str]:
        """All packs, in the order in which they were captured."""
        with ModelThreads.command(*threads_of(self._model)):
            return list(self._first().kasmina.packs.kept)

    @property
    def active(self) -> str | None:
        """The pack in use; None: the seeds that the model has, if any, are no pack's."""
        return self._first().kasmina.packs.active

    def nbytes(self, name: str) -> int:
        """Bytes of the parameters of a pack that is put away; 0 for the one in use.

        Raises:
            InvalidArgument: No such pack.
        """
        self._require(name)
        away = (layer.kasmina.packs.away().get(name) for layer in self._layers().values())
        return sum(pack.nbytes for pack in away if pack is not None)

    def capture(self, name: str) -> None:
        """Make a pack of the seeds in use; from now on it is the one in use.

        If another pack was, it is put away as it is now: the new one starts as its copy.

        Args:
            name: Of no other pack.

        Raises:
            InvalidArgument, InvalidType: No name, or one that is taken; or called inside a
                transaction.
            InsideForward: Called from inside a forward.
        """
        check_instance("name", name, str)
        with self._changing():
            if not name or name in self.names():
                raise InvalidArgument(
                    f"name={shown(name)}: give a name that no pack has; there are {self.names()}"
                )
            before = self.active
            kept = {s: None if before is None else keep(s.kasmina) for s in self._layers().values()}
            for layer, pack in kept.items():
                if before is not None:
                    layer.kasmina.packs.kept[before] = pack
                layer.kasmina.packs.kept[name] = None
                layer.kasmina.packs.active = name

    def activate(
        self,
        name: str | None = None,
        *,
        per_sample: Sequence[str | None] | None = None,
        discard: bool = False,
    ) -> None:
        """Use another pack, in all layers at once; or, with None, no seeds: the plain host.

        The pack that was in use is put away as it is: blueprints, stages, alphas, epochs, and what
        optimizers know of its parameters. Coming back it goes on to the bit. Parameters are written
        into the stacks in place, between two forwards of any thread, and nothing is compiled anew.
        Only where a layer never had as many slots as the pack needs its stacks grow, once, as for a
        germination.

        Args:
            name: Of a pack, or None: every seed is DORMANT.
            per_sample: Instead of a name: that of each sample of the batches to come, up to the
                next ``activate``; None is the host alone. For evaluation: packs take part as they
                are now and learn nothing, and no statistics are kept. A compiled model compiles
                once for the packs that there are, whoever names them. Every sample is computed in
                each pack, and in the host once. The pack in use stays in use.
            discard: Let go of seeds in use that no pack holds.

        Raises:
            InvalidArgument, InvalidType: No such pack; seeds in use that would be lost; or called
                inside a transaction. Nothing has changed.
            InsideForward: Called from inside a forward, or :func:`kasmina_fx.hold_seeds`.
        """
        check_instance("discard", discard, bool)
        if per_sample is not None:
            self._mix(name, per_sample)
            return
        with self._changing():
            if name is not None:
                self._require(name)
            if self.active is None and not discard:
                self._refuse_to_lose(name)
            if name is None or name != self.active:
                self._switch(name)
            self._run_mixed({})

    def delete(self, name: str) -> None:
        """Let go of a pack that is put away.

        Raises:
            InvalidArgument: No such pack, or it is in use: activate another one, or None, first.
        """
        with self._changing():
            self._require(name)
            if name == self.active:
                raise InvalidArgument(
                    f"the pack {name!r} is in use: activate another one, or None, before"
                )
            for layer in self._layers().values():
                del layer.kasmina.packs.kept[name]

    def _mix(self, name: str | None, given: Sequence[str | None]) -> None:
        if not isinstance(given, Sequence):
            raise InvalidType(f"per_sample={shown(given)}: give a list, a name or None for each")
        names = list(given)
        if name is not None:
            raise InvalidArgument("give the name of a pack or per_sample, not both")
        with self._changing():
            for own in {own for own in names if own is not None}:
                self._require(own)
            if any(layer.kasmina.off for layer in self._layers().values()):
                raise InvalidArgument("samples can't go through packs while seeds are off")
            # Which packs there are is compiled in; which sample names which of them is not.
            plain = uncompiled(self._model)
            every = plain is not self._model or runs_compiled(plain)
            found = {}
            for layer in self._layers().values():
                store = layer.kasmina
                kept = {
                    own: keep(store) if pack is None else pack
                    for own, pack in store.packs.kept.items()
                    if every or own in names
                }
                found[layer] = mixed(store, kept, names)
            self._run_mixed(found)

    def _run_mixed(self, found: Mapping[KasminaLayer, MixedPacks]) -> None:
        """Let layers run these instead of what is in use; nothing: what is in use."""
        layers = self._layers().values()
        if not found and all(layer.kasmina.packs.mixed is None for layer in layers):
            return
        with ModelThreads.publication(*threads_of(self._model)):
            for layer in layers:
                layer.kasmina.packs.mixed = found.get(layer)
                layer.siblings.mixed = bool(found)
                layer.siblings.folding.forget()

    def _switch(self, name: str | None) -> None:
        layers, before = self._layers().values(), self.active
        kept = {layer: keep(layer.kasmina) for layer in layers if before is not None}
        with transaction(self._model):
            for layer in layers:
                pack = _nothing() if name is None else layer.kasmina.packs.kept[name]
                assert pack is not None  # not in use
                put_in(layer.kasmina, pack)
        for layer in layers:
            packs = layer.kasmina.packs
            if before is not None:
                packs.kept[before] = kept[layer]
            if name is not None:
                packs.kept[name] = None
            packs.active = name

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """One change of packs at a time, and none inside a forward or a transaction."""
        refuse_inside_forward()
        layers = self._layers()
        if any(layer.state.staging for layer in layers.values()):
            raise InvalidArgument(
                "packs can't change inside a transaction: they are one by themselves"
            )
        with ModelThreads.command(*threads_of(self._model)):
            first = self._first().kasmina.packs
            for key, layer in layers.items():
                own = layer.kasmina.packs
                if (list(own.kept), own.active) != (list(first.kept), first.active):
                    raise LayoutMismatch(
                        f"{key} has the packs {list(own.kept)}, {own.active!r} in use; other "
                        f"layers have {list(first.kept)}, {first.active!r} in use: parts of two "
                        "checkpoints were loaded. Load one whole"
                    )
            yield

    def _refuse_to_lose(self, name: str | None) -> None:
        for key, layer in self._layers().items():
            seeds = layer.state.holding.nonzero().flatten().tolist()
            if seeds:
                raise InvalidArgument(
                    f"{key}: the seeds {seeds[:8]} are in no pack, and activate({name!r}) would "
                    "lose them: capture(name) first, or pass discard=True"
                )

    def _require(self, name: str) -> None:
        if not isinstance(name, str):
            raise InvalidType(f"name={shown(name)}: give the name of a pack")
        if name not in self.names():
            raise InvalidArgument(f"no pack {shown(name)}; there are {self.names()}")

    def _layers(self) -> dict[str, KasminaLayer]:
        return layers_of(self._model)

    def _first(self) -> KasminaLayer:
        return next(iter(self._layers().values()))


def _nothing() -> KeptPack:
    none = torch.zeros(0, dtype=torch.int64, device="cpu")
    rows, alpha = none.new_zeros((0, 4), dtype=torch.int32), none.to(torch.float32)
    return KeptPack(none, rows, alpha, {})


def packs(model: nn.Module) -> ModelPacks:
    """The packs of a model: named sets of seeds, blueprints and alphas, one of them in use.

    Args:
        model: With KasminaLayers, compiled or not.

    Raises:
        NoTargets: The model has no KasminaLayer.

    >>> from kasmina_fx.layer import KasminaLayer
    >>> model = nn.Sequential(KasminaLayer(nn.Linear(8, 8), 2), nn.Linear(8, 1))
    >>> model[0].request_germination([0])
    True
    >>> mine = packs(model)
    >>> mine.capture("rotated")
    >>> mine.activate(None)  # the plain host
    >>> mine.names(), mine.active, model[0].state.get_state_distribution()
    (['rotated'], None, {'DORMANT': 2})
    >>> mine.activate("rotated")
    >>> model[0].state.get_state_distribution()
    {'DORMANT': 1, 'GERMINATED': 1}
    """
    return ModelPacks(model)

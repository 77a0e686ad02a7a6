"""All seeds of a model, or some, off for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from kasmina_fx.counterfactuals.groups import SeedGroup, masks_of
from kasmina_fx.errors import InvalidArgument
from kasmina_fx.model import layers_of, threads_of
from kasmina_fx.seeds.store import SeedStore
from kasmina_fx.transactions.threads import ModelThreads, refuse_inside_forward


@contextmanager
def seeds_off(model: nn.Module, seeds: SeedGroup | None = None) -> Iterator[None]:
    """Seeds do nothing inside: forwards see them DORMANT, and each chunk is the host's to the bit.

    Stages, alphas, parameters, optimizer state and statistics of what is off stay as they are;
    behind the block, also after an exception, forwards see them again. It is tables that change: a
    compiled model compiles nothing anew, all layers change together, between two forwards of any
    thread, and threads that call the model meanwhile see the seeds off as well. Blocks may be
    nested. A seed that germinates inside shows behind the block if it is named, and at once if not.

    While seeds are off a finished model runs its blends, and not what it had folded.

    Args:
        model: With KasminaLayers, compiled or not.
        seeds: The name of a layer, several names, or seed ids by the layer's name (None for all of
            it); not given: all seeds.

    Raises:
        NoTargets: The model has no KasminaLayer.
        InvalidArgument, InvalidType, SeedIndexError: No such layer, or no such seeds; or called
            inside a transaction, or while each sample goes through a pack of its own.
        InsideForward: Called from inside a forward, or :func:`kasmina_fx.hold_seeds`.

    >>> from kasmina_fx.layer import KasminaLayer
    >>> import torch
    >>> layer = KasminaLayer(nn.Linear(8, 8), num_seeds=2)
    >>> layer.request_germination([0])
    True
    >>> with seeds_off(layer):
    ...     layer(torch.zeros(1, 8)).equal(layer.base(torch.zeros(1, 8)))
    True
    """
    refuse_inside_forward()
    stores = {layer.kasmina: mask for layer, mask in masks_of(model, seeds).items()}
    threads = threads_of(model)
    if any(layer.state.staging for layer in layers_of(model).values()):
        raise InvalidArgument("seeds can't be off inside a transaction: put it inside seeds_off()")
    if any(store.packs.mixed is not None for store in stores):
        raise InvalidArgument("each sample goes through its own pack: activate one by its name")
    with ModelThreads.command(*threads):
        for store, mask in stores.items():
            store.off.add(mask)
        _publish(stores, threads)
    try:
        yield
    finally:
        with ModelThreads.command(*threads):
            for store, mask in stores.items():
                store.off.remove(mask)
            _publish(stores, threads)


def _publish(stores: Iterable[SeedStore], threads: tuple[ModelThreads, ...]) -> None:
    """Let forwards see them as they are now, all between the same two."""
    with ModelThreads.publication(*threads), torch.inference_mode(False):
        for store in stores:
            store.publish()

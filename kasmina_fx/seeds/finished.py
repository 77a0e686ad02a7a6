"""A finished model runs folded: in evaluation it costs what it did before seeds grew.

A model is finished once no seed of it runs but FOSSILIZED ones. Its calls in evaluation, without
gradients, then run hosts whose weight has the seeds in it (:mod:`kasmina_fx.seeds.folding`), and no
blend. Copies of weights are made when such a call comes, and made again where what they were made
of has changed: that is asked of version counters and addresses before each call, on the host. They
are freed when the model is next called after a seed changed, or to train.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from kasmina_fx._torch.dynamo import being_recorded, not_traced
from kasmina_fx._torch.tracing import in_a_mode, in_functorch
from kasmina_fx.bases.host import Host
from kasmina_fx.lifecycle import SeedLifecycle, runs
from kasmina_fx.seeds.folded import MOST_WAYS, Folded, Made, Source, all_same, source
from kasmina_fx.seeds.folding import (
    blended_by,
    folded_tensors,
    no_bias,
    why_no_chunks,
    why_no_host,
    why_no_weight,
)
from kasmina_fx.seeds.registered import Place
from kasmina_fx.seeds.siblings import Siblings
from kasmina_fx.seeds.store import SeedStore

#: A model's own numbers do not leave their range, where a blend would leave an element alone.
_WIDE: Final = (torch.float32, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Plan:
    """Says of a model's layers whether they fold, as far as seeds say; held by what layers hold.

    Attributes:
        why_none: Why no layer does, or None.
        left: Layers that have FOSSILIZED seeds and go on with a blend, and why.
        fold: Layers that have some and fold.
        idle: Layers in which no seed runs.
    """

    why_none: str | None
    left: Mapping[weakref.ref[SeedStore], str]
    fold: tuple[weakref.ref[SeedStore], ...] = ()
    idle: tuple[weakref.ref[SeedStore], ...] = ()

    def stores(self) -> Iterator[SeedStore]:
        """Iterate over the layers that run no blend."""
        for ref in (*self.fold, *self.idle):
            store = ref()
            if store is not None:
                yield store


def plan_of(siblings: Siblings[SeedStore]) -> Plan:
    """Return what the seeds that forwards see say of folding."""
    stores = list(siblings)
    moving = [store.name for store in stores if bool((runs(store.stages) & ~_fossils(store)).any())]
    if moving:
        names = ", ".join(moving[:4]) + ", ..." * (len(moving) > 4)
        return Plan(f"seeds that are not FOSSILIZED run in {names}", {})
    if any(store.off for store in stores):
        return Plan("seeds are off for a while", {})
    if siblings.mixed:
        return Plan("each sample goes through a pack of its own", {})
    grown = {store: _why_left(store) for store in stores if bool(_fossils(store).any())}
    fold = tuple(weakref.ref(store) for store, why in grown.items() if why is None)
    return Plan(
        None if fold else "no layer has FOSSILIZED seeds that fold",
        {weakref.ref(store): why for store, why in grown.items() if why is not None},
        fold,
        tuple(weakref.ref(store) for store in stores if store not in grown),
    )


def _fossils(store: SeedStore) -> Tensor:
    return store.stages == SeedLifecycle.FOSSILIZED


def _why_left(store: SeedStore) -> str | None:
    why = why_no_host(store)
    if not store.host.in_place:
        why = "it was made by hand: what kasminify makes folds"
    for bank, seeds, _ in blended_by(store, _fossils(store)):
        why = why or why_no_chunks(bank, store.host, seeds)
    return why


@not_traced
def begin(siblings: Siblings[SeedStore], training: bool) -> bool:
    """Say whether a call of a model that begins runs folded; :func:`end` ends it then.

    ``training`` is the model's own: its layers ask for theirs themselves.
    """
    folding = siblings.folding
    wanted = not (training or torch.is_grad_enabled())
    if wanted and folding.plan is None:
        folding.plan = plan_of(siblings)
    if not wanted or folding.plan.why_none is not None:
        if folding.holds:
            _release(siblings)
        return False
    if not _is_usual():
        return False
    with folding.lock:
        if not folding.is_right():
            folding.ended()
            if folding.waits(partial(_would_be_made_of, folding.plan)):
                _free(siblings)
                return False
            _prepare(siblings, folding.plan)
        elif folding.asks:
            _prepare(siblings, folding.plan)
        if folding.runs:
            folding.inside, folding.active = folding.inside + 1, True
            folding.served += 1
            _wait_for_copies(folding.made)
        return folding.runs


@not_traced
def end(siblings: Siblings[SeedStore]) -> None:
    """A call that ran folded is over."""
    folding = siblings.folding
    with folding.lock:
        folding.inside -= 1
        folding.active = folding.inside > 0


def _release(siblings: Siblings[SeedStore]) -> None:
    folding = siblings.folding
    with folding.lock:
        folding.ended()
        _free(siblings)


def _free(siblings: Siblings[SeedStore]) -> None:
    """Free what layers hold, unless a call in another thread runs it."""
    if not siblings.folding.inside:
        for store in siblings:
            store.folded = None


def _is_usual() -> bool:
    """Say whether what is called is neither traced nor transformed nor captured."""
    if being_recorded() or in_functorch() or in_a_mode():
        return False
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def _prepare(siblings: Siblings[SeedStore], plan: Plan) -> None:
    """Let layers hold what they run in the place of a blend."""
    folding, stores = siblings.folding, list(plan.stores())
    for store in stores:
        held, hooks = store.folded, store.host.base._forward_pre_hooks
        if held is None or hooks or folding.stepped or not all_same(held.sources):
            store.folded = _made(store)
    found = {store: store.folded for store in stores if store.folded is not None}
    folding.sources = [each for folded in found.values() for each in folded.sources]
    folding.hooks = [s.host.base._forward_pre_hooks for s, f in found.items() if f.of is not None]
    folding.made = _made_on_streams(found.values())
    folding.holds, folding.stepped, folding.asks = True, False, len(found) < len(stores)
    folding.runs = any(folded.nbytes for folded in found.values())
    way = tuple(0 if store.folded is None else store.folded.way for store in siblings)
    if folding.runs and not folding.may_run(way):
        folding.runs = folding.holds = False
        folding.plan = replace(plan, why_none=f"the model has run in {MOST_WAYS} other ways before")
        _free(siblings)


def _made_on_streams(found: Iterable[Folded]) -> list[Made]:
    """Say for each GPU where copies on it were made."""
    copies = [t for folded in found if folded.nbytes for t in (folded.weight, folded.bias)]
    on_gpus = [t for t in copies if t is not None and t.is_cuda]
    return [
        Made(stream, stream.record_event(), [t for t in on_gpus if t.device == device])
        for device in {t.device for t in on_gpus}
        for stream in [torch.cuda.current_stream(device)]
    ]


def _wait_for_copies(made: list[Made]) -> None:
    """Let this thread's stream, if it is another, wait for copies, and their memory for it."""
    for stream, event, copies in made:
        now = torch.cuda.current_stream(stream.device)
        if now != stream:
            now.wait_event(event)
            for copy in copies:
                copy.record_stream(now)


@torch.inference_mode(False)
def _made(store: SeedStore) -> Folded | None:
    """Return what a layer runs in the place of a blend; None: nothing can take its place."""
    fossils = _fossils(store)
    if why_no_host(store) is not None or why_not_now(store.host) is not None:
        return None if bool(fossils.any()) else Folded()
    own, stacks = _places(store)
    made = Folded(own, stacks)
    # All layers have the bank at once, so that a bias comes to all that have none at once.
    shifts = any(bank.spec.kind == "affine" for bank in store.bank_list())
    if stacks:
        made.run_copies(*folded_tensors(store, fossils, always_bias=shifts))
    elif made.bias is None and shifts:
        made.run_copies(None, no_bias(store.host))
    return made


def _places(store: SeedStore) -> tuple[list[Place], list[Place]]:
    """Where a host's weight and bias are registered, and the stacks that go into them."""
    own = store.host.base._parameters
    banks = [bank for bank, *_ in blended_by(store, _fossils(store))]
    stacks: list[Place] = [(bank._parameters, name) for bank in banks for name in bank._parameters]
    return [(own, "weight"), (own, "bias")], stacks


def _would_be_made_of(plan: Plan) -> list[Source]:
    return [
        source(*place)
        for store in plan.stores()
        if why_no_host(store) is None and why_not_now(store.host) is None
        for places in _places(store)
        for place in places
    ]


def why_not_now(host: Host) -> str | None:
    """Say why nothing folds into what a host holds now, for a while; None: something may."""
    why = why_no_weight(host)
    for name in ("weight", "bias"):
        tensor = host.base._parameters.get(name)
        if why is not None or tensor is None:
            continue
        if type(tensor) is not nn.Parameter or tensor.layout != torch.strided:
            why = f"its base's {name} is a {type(tensor).__name__}, not a plain Parameter"
        elif tensor.dtype not in _WIDE:
            why = f"{tensor.dtype} ends where a model's own numbers may lie"
        elif tensor.is_meta or tensor.is_inference() or not tensor.numel():
            why = f"its base's {name} has no numbers that count what is written to them"
    if why is None and host.base._forward_pre_hooks:
        why = "a hook comes before its base, and may change the weight"
    return why


def in_evaluation(store: SeedStore) -> str:
    """Say what becomes of a layer's FOSSILIZED seeds in evaluation; "" if it has none."""
    if not bool(_fossils(store).any()):
        return ""
    why = _why_not_folded(store)
    if why is not None:
        return f"not folded in evaluation: {why}"
    held = store.folded
    copies = "" if held is None else f", in a copy of {held.nbytes:,} bytes"
    return f"folded into its weight in evaluation without gradients{copies}"


def _why_not_folded(store: SeedStore) -> str | None:
    folding, own = store.siblings.folding, weakref.ref(store)
    plan = folding.plan or plan_of(store.siblings)
    if own in plan.left:
        return str(plan.left[own])
    if plan.why_none is not None:
        return str(plan.why_none)
    if store.observed and store.in_eval:
        return "statistics are kept there, of what blueprints do too"
    return why_not_now(store.host)

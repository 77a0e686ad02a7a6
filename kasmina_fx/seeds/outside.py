"""What others do to a layer's registered state is taken over before a forward, or refused."""

from __future__ import annotations

from torch import Tensor

from kasmina_fx._torch.tracing import as_plain, outside_of_transforms
from kasmina_fx.errors import LayoutMismatch
from kasmina_fx.lifecycle import roles
from kasmina_fx.physical.graph_inputs import BankTables, GraphInputs, LayerTables
from kasmina_fx.seeds.registered import is_average_of, seal
from kasmina_fx.seeds.store import SeedStore
from kasmina_fx.transactions.buffers import to_device


def take_over(store: SeedStore) -> None:
    """Take what somebody wrote to the registered state.

    An average of models whose seeds are all in the same state is that state.

    Raises:
        LayoutMismatch: It is the state of no layer; forwards raise until it is written again, or
            published.
    """
    with store.siblings.threads.commands:
        rows, slots, found = _registered(store)
        if found == seal(rows, slots):
            store.state.check_values(rows, store.state.alpha)
            with store.siblings.threads.forwards.publication():
                store.reload()
        elif store.registered.all_written and is_average_of(found, store.own_seal()):
            restore(store)
        else:
            raise LayoutMismatch(
                f"{store.name}: somebody wrote to the state of its seeds, and it is no state that "
                "a layer was in (an average of two, perhaps). Average parameters alone and copy "
                "buffers, as AveragedModel(model) does, or copy the whole state_dict(); change "
                "seeds by commands. layer.publish() brings back what was there"
            )


def restore(store: SeedStore) -> None:
    """Put back, and show, what the host knows of a layer's seeds."""
    with store.siblings.threads.commands, store.siblings.threads.forwards.publication():
        if store.registered.written:
            store.state.restore()
        store.publish()


def inputs_now(store: SeedStore) -> GraphInputs:
    """Return what a forward reads, where ``functional_call`` may have put tensors in place.

    Raises:
        LayoutMismatch: They are the state of no layer.
    """
    shown = store.shown.with_params(store.shown_stacks())
    if not store.registered.state_replaced:
        return shown
    with outside_of_transforms():
        rows, slots, found = _registered(store)
        right, own = found == seal(rows, slots), found == store.own_seal()
    if right and own:
        return shown.with_alpha(store.state.alpha)
    if not right:
        raise LayoutMismatch(
            f"{store.name}: the buffers that stand in for its seeds' state are not those of one "
            "layer in one state; give functional_call all of them, or none"
        )
    device, banks = store.state.alpha.device, store.bank_list()
    all_stages = store.off.shown(rows[:, 0])
    tables = [
        bank.placement(rows[seeds, 1], all_stages[seeds], slots[bank.key], store.pads).tables
        for bank in banks
        for seeds in [bank.run.seeds]
    ]
    layer = LayerTables(
        store.state.alpha,
        to_device(roles(all_stages), device),
        store.telemetry.probe(),
        store.scale(),
    )
    on_device = [BankTables(*(to_device(t, device) for t in table)) for table in tables]
    specs = [bank.spec for bank in banks]
    return GraphInputs(layer, specs, on_device, store.stacks(), store.telemetry.sensing())


def _registered(store: SeedStore) -> tuple[Tensor, dict[str, Tensor], int]:
    """State and slots as they are registered at the moment, on the CPU, and their seal."""
    rows = as_plain(store.state.state_tensor).cpu()
    slots = {bank.key: as_plain(bank.slots).cpu() for bank in store.bank_list()}
    return rows, slots, int(as_plain(store.seal))

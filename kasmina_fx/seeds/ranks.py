"""Processes that train one model together must hold the same seeds; a forward finds out.

Each rank gives its own commands. A germination, a controller that decided otherwise, a transaction
that one rank alone committed: nothing in ``torch.distributed`` would notice, and the ranks would
train different models. So where the seeds have changed since the forward before, ranks tell each
other what they hold.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from kasmina_fx._torch.distributed import exchange, in_group, ranks, unreduced
from kasmina_fx._torch.dynamo import not_traced
from kasmina_fx.banks.stack import StackedParameter
from kasmina_fx.errors import RanksDiffer

if TYPE_CHECKING:
    from kasmina_fx.seeds.siblings import Siblings

#: Seconds that a rank waits for the others to get to the forward in which it compares.
WAITS: Final = 300.0


@not_traced
def check(siblings: Siblings[Any]) -> None:
    """Compare the seeds of a model with those of other ranks, if they have changed.

    Raises:
        RanksDiffer: Names the ranks and the layers; or the model is inside a
            ``DistributedDataParallel`` that does not know its blueprints.
    """
    if in_group() and not all(store.takes_part for store in siblings):
        with siblings.threads.commands, siblings.threads.forwards.publication():
            siblings.let_all_grow()
    if not siblings.compares_ranks or ranks()[1] == 1:
        return
    _refuse_unreduced(siblings)
    seals = {store.name: store.sealed for store in siblings}
    if seals == siblings.told:
        return
    siblings.told, siblings.tellings = seals, siblings.tellings + 1
    key = f"kasmina_fx/{siblings.number}/{siblings.tellings}"
    try:
        told = exchange(key, json.dumps(seals), WAITS)
    except TimeoutError as error:
        raise RanksDiffer(
            f"the seeds of this rank's model have changed, and {error} did not get to a forward "
            "with other seeds than before: give the same commands on every rank"
        ) from error
    mine = ranks()[0]
    for rank, text in enumerate(told):
        theirs = json.loads(text)
        different = [n for n in {**seals, **theirs} if seals.get(n) != theirs.get(n)]
        if different:
            raise RanksDiffer(
                f"ranks {mine} and {rank} hold different seeds in {different[:4]}: give the same "
                "commands on every rank (decide on one, and broadcast the decision)"
            )


def _refuse_unreduced(siblings: Siblings[Any]) -> None:
    if siblings.reduced == StackedParameter.made:
        return
    for store in siblings:
        strangers = unreduced(store.stacks())
        if strangers:
            raise RanksDiffer(
                f"{store.name}: {strangers} stacks of blueprints are not known to the "
                "DistributedDataParallel around the model, which would not reduce their "
                "gradients: wrap the model again, or make room before it is wrapped (reserve=, "
                "layer.reserve(), a first germination of each blueprint)"
            )
    siblings.reduced = StackedParameter.made

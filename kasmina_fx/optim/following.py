"""The call ``follow``: an optimizer takes the stacks of a model as they come, for life.

And one warning for those who call neither that nor ``sync``: blueprints that no optimizer holds
never learn, and nothing else would say so.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import nn
from torch.optim import Optimizer

from kasmina_fx._torch.dynamo import uncompiled
from kasmina_fx.banks.stack import StackedParameter
from kasmina_fx.errors import InvalidType, shown
from kasmina_fx.optim.sync import SyncReport, sync
from kasmina_fx.seeds.store import GROWING

_LOG: Final = logging.getLogger(__name__)

#: Says which of an optimizer's groups a stack joins: ``(name in the model, stack) -> index``.
Group = Callable[[str, nn.Parameter], int]

_FOLLOWED: Final[weakref.WeakKeyDictionary[Optimizer, list[_Following]]] = (
    weakref.WeakKeyDictionary()
)
_WARNED: Final[weakref.WeakSet[Optimizer]] = weakref.WeakSet()
#: Stacks made until an optimizer's last step, and its steps since then, up to two.
_SEEN: Final[weakref.WeakKeyDictionary[Optimizer, tuple[int, int]]] = weakref.WeakKeyDictionary()


class _Following:
    """One optimizer follows one model, which it holds weakly."""

    def __init__(self, model: nn.Module, group: Group | None) -> None:
        self.model, self.group = weakref.ref(model), group
        self._made = 0

    def update(self, optimizer: Optimizer) -> SyncReport:
        """Add what is new."""
        model, self._made = self.model(), StackedParameter.made
        if model is None:
            return SyncReport((), ())
        return sync(optimizer, model, group=self.group)

    def is_behind(self) -> bool:
        """Say whether any stack was made since the last update: cheap, before every step."""
        return self._made != StackedParameter.made


def follow(optimizer: Optimizer, model: nn.Module, group: Group | None = None) -> SyncReport:
    """Let an optimizer take every stack of a model, those of now and those to come.

    One call for the life of both, instead of :func:`sync` after each blueprint's first germination:
    before each of its steps the optimizer takes what the model has grown.

    Args:
        optimizer: As of :func:`sync`.
        model: Compiled or not; held weakly.
        group: ``(name, stack) -> index`` of the parameter group that a new stack joins, where
            names are those of ``model.named_parameters()``: biases may stay out of a group with
            weight decay. None: a stack of one dim a slot (a bias, a scale) joins a group without
            weight decay if there is one, and otherwise the groups are those of :func:`sync`.

    Returns:
        What changed at once.

    Raises:
        InvalidType, NoTargets: As of :func:`sync`.
        InvalidArgument: ``group`` gives an index that the optimizer has no group for.
    """
    if group is not None and not callable(group):
        raise InvalidType(
            f"group={shown(group)}: give a function (name, stack) -> index of a group"
        )
    following = _Following(uncompiled(model), group or _by_weight_decay(optimizer))
    report = following.update(optimizer)
    others = _FOLLOWED.setdefault(optimizer, [])
    others[:] = [f for f in others if f.model() not in (None, uncompiled(model))]
    others.append(following)
    return report


def _by_weight_decay(optimizer: Optimizer) -> Group | None:
    """The default of :func:`follow`, for an optimizer with a group that does not decay."""
    groups: list[Mapping[str, Any]] = getattr(optimizer, "param_groups", [])
    decays = [bool(group.get("weight_decay")) for group in groups]
    if all(decays) or not any(decays):
        return None
    held, fallen = decays.index(True), decays.index(False)

    def group_of(name: str, stack: nn.Parameter) -> int:
        return fallen if stack.dim() <= 2 else held

    return group_of


def catch_up(optimizer: Optimizer) -> None:
    """Take what followed models have grown since the last step."""
    for following in _FOLLOWED.get(optimizer, ()):
        if following.is_behind():
            report = following.update(optimizer)
            if report.added:
                _LOG.info("%s", report)


def warn_once(optimizer: Optimizer) -> None:
    """Warn of blueprints that no optimizer steps, one of which steps their host.

    At the second step since the newest stack was made: another optimizer, which holds it, has made
    its first by then.
    """
    made = StackedParameter.made
    seen, times = _SEEN.get(optimizer, (0, 0))
    if seen == made and times == 2:
        return
    times = times + 1 if seen == made else 1
    _SEEN[optimizer] = (made, times)
    if times == 1 or optimizer in _WARNED:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for store in list(GROWING):
        lost = [s for s in store.stacks() if s.requires_grad and not s.followers]
        if lost and any(id(p) in held for p in store.host.parameters()):
            _WARNED.add(optimizer)
            _LOG.warning(
                "%s: the %s steps the host, and no optimizer holds %d stacks of its blueprints: "
                "they never learn. Call kasmina_fx.optim.follow(optimizer, model) once",
                store.name,
                type(optimizer).__name__,
                len(lost),
            )
            return

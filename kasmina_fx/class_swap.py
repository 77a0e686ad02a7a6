"""A module becomes a layer with seeds: its class becomes a subclass of its class.

As ``torch.distributed.fsdp.fully_shard`` does. The object stays, so that its names, parameters,
buffers, hooks, attributes and whatever else asks "is this a Linear?" are simply its own; tied and
shared modules stay one object. :func:`swap_in` and :func:`swap_out` are inverse.

    >>> layer = swap_in(nn.Linear(4, 6), 3)
    >>> type(layer).__name__, isinstance(layer, nn.Linear), isinstance(layer, KasminaLayer)
    ('KasminaLinear', True, True)
    >>> type(swap_out(layer)).__name__
    'Linear'
"""

from __future__ import annotations

import copy
import types
from typing import Any, ClassVar, Final

import torch
from torch import nn

from kasmina_fx._torch.dynamo import being_recorded
from kasmina_fx._torch.modules import run_with
from kasmina_fx.bases.features import COUNTS, find_features
from kasmina_fx.config import SeedConfig, TelemetryPolicy
from kasmina_fx.errors import InvalidArgument, shown
from kasmina_fx.layer import KasminaLayer, SeededModule, seeds_for
from kasmina_fx.lifecycle import SeedLifecycle
from kasmina_fx.seeds import model_call
from kasmina_fx.seeds.commands import SeedCommands
from kasmina_fx.seeds.folded import Folded
from kasmina_fx.seeds.store import SeedStore

_SEEDS: Final = "kasmina"
_CLASSES: Final[dict[type[nn.Module], type[SwappedLayer]]] = {}
#: Attributes by which a call of this one module takes another way than its class says.
_CALLS: Final = ("forward", "_compiled_call_impl", model_call.KEPT)
_CONTAINERS: Final = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class SwappedLayer(KasminaLayer):
    """The part of every swapped class that is the same for all; comes before the module's own."""

    plain: ClassVar[type[nn.Module]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, with the blended seeds' contributions."""
        folded = self._folded()
        if folded is not None and folded.weight is not None:
            return run_with(self, folded.weight, folded.bias, *args, **kwargs)
        # What comes behind our classes in the order of bases: the module's own class.
        out = super(SeedCommands, self).forward(*args, **kwargs)
        return self.seeds_on(out) if folded is None else out

    def _folded(self) -> Folded | None:
        """What is run in the place of the module and its seeds, if anything."""
        store: SeedStore = self._modules["kasmina"]  # type: ignore[assignment]  # not by __getattr__
        if self.training or torch.is_grad_enabled() or not store.siblings.folding.active:
            return None
        if (store.observed and store.in_eval) or being_recorded():
            return None
        folded = store.folded
        if folded is None or folded.weight is None:
            return folded
        device = folded.weight.device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            return None  # its range is what the guard of a blend is for
        # Nobody but functional_call, inside of a model, has put another one there since it began.
        return folded if self._parameters["weight"] is folded.of else None

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the module; one that counts features counts those of the seeds too.

        Raises:
            InvalidArgument: Seeds have grown into the features of before; nothing has changed.
        """
        plain = super(SeedCommands, self)
        if name in COUNTS and self.__dict__.get(name, value) != value:
            before = self.__dict__[name]
            if bool((self.state.stages != SeedLifecycle.DORMANT).any()):
                raise InvalidArgument(
                    f"{self.layer_id}: {name} can't become {shown(value)}, seeds have grown into "
                    f"the {self.chunks.layer_dim} features of before: reset them, or resize the "
                    "plain model and kasminify it then"
                )
            plain.__setattr__(name, value)
            try:
                _renew(self)
            except InvalidArgument:
                plain.__setattr__(name, before)
                raise
        else:
            plain.__setattr__(name, value)

    @property
    def base(self) -> nn.Module:
        """The module without its seeds: a view of its own class, made when asked for.

        It has the same parameters, buffers and hooks; attributes that one sets on it are its own.
        """
        cls = plain_class(type(self))
        view = cls.__new__(cls)
        children = {name: m for name, m in self._modules.items() if name != _SEEDS}
        view.__dict__.update(self.__dict__, _modules=children)
        for name in _CALLS:
            view.__dict__.pop(name, None)
        return view

    def extra_repr(self) -> str:
        """What the module says of itself, and the seeds."""
        own: str = super(SeedCommands, self).extra_repr()
        return ", ".join(part for part in (own, self._described()) if part)

    def _connect(self) -> None:
        self.kasmina.host.connect(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Rebuilt from the module's own class: no import finds this one."""
        return _rebuild, (plain_class(type(self)),), self.__getstate__()  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> SwappedLayer:
        """A copy that is connected; parametrizations bring a __deepcopy__ that would not."""
        cls = type(self)
        copied = memo[id(self)] = cls.__new__(cls)
        # Not self.__getstate__(): that of a parametrized module refuses.
        copied.__setstate__(copy.deepcopy(nn.Module.__getstate__(self), memo))
        return copied


def swap_in(
    module: nn.Module,
    num_seeds: int,
    *,
    layer_id: str | None = None,
    telemetry: bool | TelemetryPolicy = True,
    reserve: int = 0,
    config: SeedConfig | None = None,
) -> SwappedLayer:
    """Give a module seeds, in place; arguments as of :class:`~kasmina_fx.KasminaLayer`.

    Raises:
        InvalidArgument: It can't have any; says why. Nothing has changed.
    """
    reason = why_not(module)
    if reason is not None:
        raise InvalidArgument(f"{layer_id or type(module).__name__}: {reason}")
    cls = swapped_class(type(module))
    store = seeds_for(
        module,
        num_seeds,
        layer_id=layer_id,
        telemetry=telemetry,
        reserve=reserve,
        config=config,
        without=_SEEDS,
    )
    module.__class__ = cls
    module._modules[_SEEDS] = store
    return module  # type: ignore[return-value]  # it is one now


def swap_out(layer: SwappedLayer) -> nn.Module:
    """Take the seeds from a module, in place: it is what it was before :func:`swap_in`."""
    cls = plain_class(type(layer))
    layer._modules.pop(_SEEDS)
    layer.__class__ = cls  # type: ignore[assignment]
    return layer


def _renew(layer: SwappedLayer) -> None:
    """Dormant seeds watch the features that their module has now."""
    old = layer.kasmina
    features = find_features(layer, None, None)
    if features.count == old.chunks.layer_dim:
        return
    store = seeds_for(
        layer,
        min(old.num_seeds, features.count),
        layer_id=old.name,
        config=old.config,
        without=_SEEDS,
    )
    store.observed, store.one_in, store.in_eval = old.observed, old.one_in, old.in_eval
    store.rows_seen = old.rows_seen
    store.telemetry.observe_like(old.telemetry)
    store.publish()
    old.siblings.discard(old)
    store.join(old.siblings)
    layer._modules[_SEEDS] = store
    if old.key is not None:
        store.show_by_key()


def why_not(module: nn.Module) -> str | None:
    """The reason why a module can't be swapped, None if it can."""
    kind = type(module).__name__
    by_hand = "wrap it by hand, in KasminaLayer(module, num_seeds)"
    if isinstance(module, _CONTAINERS):
        return f"a {kind} runs all its children, and its seeds would be one: give its last layer"
    if isinstance(module, torch.jit.ScriptModule):
        return f"a {kind} is compiled already: give the module that it was made from"
    if "forward" in module.__dict__:
        return f"this {kind} has a forward of its own, which would pass its seeds by: {by_hand}"
    taken = sorted(name for name in _NAMES if _has_own(module, name))
    if taken:
        return f"this {kind} has {', '.join(taken[:4])} of its own, a KasminaLayer too: {by_hand}"
    return None


def _has_own(module: nn.Module, name: str) -> bool:
    inside = (module.__dict__, module._parameters, module._buffers, module._modules)
    classes = type(module).__mro__[: -len(nn.Module.__mro__)]
    return any(name in d for d in inside) or any(name in cls.__dict__ for cls in classes)


def swapped_class(plain: type[nn.Module]) -> type[SwappedLayer]:
    """The subclass of a module's class that has seeds; one for each class.

    Raises:
        InvalidArgument: The class can't be subclassed.
    """
    if _is_parametrizations(plain):  # torch takes its first base for what it was before
        return _with_base(plain, swapped_class(plain.__bases__[0]))  # type: ignore[return-value]
    if plain not in _CLASSES:
        own = {
            "plain": plain,
            "__module__": __name__,  # a name in torch.nn would make shapes static
            "__doc__": f"A {plain.__name__} with seeds.",
            # The module's own: KasminaLayer's look into a base.
            "__getattr__": plain.__getattr__,
        }
        try:
            _CLASSES[plain] = types.new_class(
                f"Kasmina{plain.__name__}",
                (SwappedLayer, plain),
                exec_body=lambda ns: ns.update(own),
            )
        except TypeError as error:
            raise InvalidArgument(
                f"{plain.__name__} can't be subclassed ({error}): wrap the module by hand, in "
                "KasminaLayer(module, num_seeds)"
            ) from error
    return _CLASSES[plain]


def plain_class(swapped: type[nn.Module]) -> type[nn.Module]:
    """The inverse of :func:`swapped_class`, parametrized since then or not.

    Raises:
        InvalidArgument: Something else has changed the class in the meantime.
    """
    if _is_parametrizations(swapped):
        return _with_base(swapped, plain_class(swapped.__bases__[0]))
    if "plain" not in swapped.__dict__:
        raise InvalidArgument(
            f"{swapped.__name__} was made from a class with seeds by somebody else (fully_shard "
            "does so): undo that first"
        )
    plain: type[nn.Module] = swapped.__dict__["plain"]
    return plain


def _is_parametrizations(cls: type) -> bool:
    """Torch makes a class of its own for each module that it parametrizes."""
    return cls.__name__.startswith("Parametrized") and cls.__module__.startswith("torch.nn.utils")


def _with_base(parametrized: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """The class of a parametrized module, with another class below it."""
    own = {k: v for k, v in parametrized.__dict__.items() if k not in ("__dict__", "__weakref__")}
    if issubclass(base, SwappedLayer):
        own.pop("__deepcopy__", None)  # that of SwappedLayer connects the copy
    name = f"Parametrized{base.__name__}"
    return types.new_class(name, (base,), exec_body=lambda ns: ns.update(own))


def _rebuild(plain: type[nn.Module]) -> SwappedLayer:
    cls = swapped_class(plain)
    return cls.__new__(cls)


#: What a KasminaLayer has and an nn.Module has not.
_NAMES: Final = frozenset(
    name
    for cls in (SwappedLayer, KasminaLayer, SeededModule, SeedCommands)
    for name in (*cls.__dict__, *cls.__annotations__)
    if not name.startswith("__") and not hasattr(nn.Module, name)
)

"""What calling a kasminified model runs: its forward, in which no seed changes."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from torch import nn

from kasmina_fx._torch.dynamo import compiled_layers, dynamo_is_on, not_traced
from kasmina_fx.seeds import finished, outside, ranks
from kasmina_fx.seeds.siblings import Siblings

_LOG: Final = logging.getLogger(__name__)

#: Where a model keeps its own. The name under which torch looks for it is dropped by copies.
KEPT: Final = "_kasmina_call"
_EAGER: Final = (
    "%s is a copy of a model that was compiled, and runs without the compiler, as copies do under "
    "torch.compile; kasminify(model) compiles it"
)


class ModelCall:
    """A model's forward, inside the gate of its layers' siblings.

    It takes the place that ``Module.compile`` fills. Hooks of the model would serve an eager call,
    but Dynamo would trace them; this it never sees: what it inlines is ``_call_impl``.

    Args:
        model: Held weakly: it holds this.
        siblings: Of its layers.
        compiled: Run instead of the model's hooks and forward.
        left_behind: This is the call of a copy, of a model that runs what was compiled.
    """

    def __init__(
        self,
        model: nn.Module,
        siblings: Siblings[Any],
        compiled: Callable[..., Any] | None = None,
        left_behind: bool = False,
    ) -> None:
        self._model, self._siblings = weakref.ref(model), siblings
        self.compiled, self._left_behind = compiled, left_behind
        self._first = True
        self._attach(model)

    # Dynamo may compile what it calls: torch.compile(model) calls the model.
    @partial(not_traced, below=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output."""
        replaced = look_at_registered(self._siblings)
        ranks.check(self._siblings)
        self._siblings.enter()
        folds = False
        try:
            folds = not replaced and finished.begin(self._siblings, self.owner.training)
            if replaced:
                # Compiled code holds the tensors that were registered when it was compiled.
                return _eagerly(self.owner, *args, **kwargs)
            if self._first and (self.compiled is not None or not dynamo_is_on()):
                self._first = False
                if self.lacks_compiled:
                    _LOG.warning(_EAGER, type(self.owner).__name__)
                return _watched(self._run, self.owner, self._siblings, *args, **kwargs)
            return self._run(*args, **kwargs)
        finally:
            if folds:
                finished.end(self._siblings)
            self._siblings.leave(self.compiled is not None or dynamo_is_on())

    @partial(not_traced, below=False)
    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self.compiled is not None:
            return self.compiled(*args, **kwargs)
        return self.owner._call_impl(*args, **kwargs)

    @property
    def lacks_compiled(self) -> bool:
        """Whether this runs eagerly what ran compiled before it was copied."""
        return self._left_behind and self.compiled is None

    @property
    def owner(self) -> nn.Module:
        """The model."""
        model = self._model()
        if model is None:
            raise ReferenceError("the model that this call was made for is gone")
        return model

    def _attach(self, model: nn.Module) -> None:
        model.__dict__[KEPT] = model.__dict__["_compiled_call_impl"] = self

    def __getstate__(self) -> dict[str, Any]:
        """Copied and pickled with the model, but for what was compiled, as torch does."""
        left_behind = self._left_behind or self.compiled is not None
        return {"model": self.owner, "siblings": self._siblings, "left_behind": left_behind}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Guard the copy."""
        self.__init__(**state)  # type: ignore[misc]


@not_traced
def look_at_registered(siblings: Siblings[Any]) -> bool:
    """Take over what was written to registered tensors; say whether others stand in their place."""
    replaced = False
    for store in siblings:
        registered = store.registered
        if registered.written:
            outside.take_over(store)
        elif registered.replaced:
            replaced = True
    return replaced


@partial(not_traced, below=False)
def _watched(
    call: Callable[..., Any], model: nn.Module, siblings: Siblings[Any], *args: Any, **kwargs: Any
) -> Any:
    """Call a model for the first time, and warn of layers that it never called."""
    with compiled_layers() as paths:
        out = call(*args, **kwargs)
    named = model.named_modules(remove_duplicate=False)
    stores = {path: module._modules.get("kasmina") for path, module in named}
    if any(stores.get(path) is None for path in paths):
        return out  # behind a graph break, say, paths start elsewhere: nobody knows what was called
    met = {id(stores[path]) for path in paths}
    met |= {id(store) for store in siblings if store.folded is not None}  # nobody sees their calls
    missed = [s.name for s in siblings if id(s) not in met and not s.__dict__.get("called")]
    if missed:
        _LOG.warning(
            "%s: the model's first forward called none of these, and their seeds saw nothing. An "
            "owner that reads a layer's weight passes its seeds by; filter_fn can leave them out",
            ", ".join(missed[:8]) + (f" and {len(missed) - 8} more" if len(missed) > 8 else ""),
        )
    return out


@not_traced
def _eagerly(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return model._call_impl(*args, **kwargs)


def left_uncompiled(model: nn.Module) -> list[ModelCall]:
    """List the calls in a model that left compiled code behind as they were copied."""
    calls = [part.__dict__.get(KEPT) for part in model.modules()]
    return [call for call in calls if isinstance(call, ModelCall) and call.lacks_compiled]


def runs_compiled(model: nn.Module) -> bool:
    """Say whether calling a model runs what was compiled of it as a whole."""
    call = model.__dict__.get("_compiled_call_impl")
    return call is not None and not (isinstance(call, ModelCall) and call.compiled is None)


def remove(model: nn.Module) -> None:
    """Let a model, and what was kasminified inside of it, be called as any other."""
    model.__dict__.pop("_compiled_call_impl", None)
    for part in model.modules():
        if part.__dict__.pop(KEPT, None) is not None:
            part.__dict__.pop("_compiled_call_impl", None)

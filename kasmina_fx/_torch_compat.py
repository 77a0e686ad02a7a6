"""Every private name of torch that the package needs, and why; nothing else imports one.

Those of Dynamo are in :mod:`_dynamo_compat`. Checked on torch 2.11 and 2.13.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch._inductor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._inductor import config as inductor_config
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, statically_known_true
from torch.utils import _pytree as pytree

from kasmina_fx.errors import InvalidArgument


def in_backward() -> bool:
    """Is this thread running inside ``backward()`` (as a recomputed forward does)?"""
    # -1 outside the autograd engine; there is no public way to ask.
    return bool(torch._C._current_graph_task_id() != -1)


def scale_of(scaler: torch.amp.GradScaler, device: torch.device) -> torch.Tensor:
    """The tensor that holds a scaler's current scale, float32 ``()``; it is updated in place.

    A scaler makes it at its first ``scale()``; asking earlier makes it now, with the same value.
    """
    if not scaler.is_enabled():
        return torch.ones((), dtype=torch.float32, device=device)
    if scaler._scale is None:
        scaler._lazy_init_scale_growth_tracker(device)
    # .data: its version counter is another, so that a backward still to run may read what update()
    # has written to since.
    scale = cast("torch.Tensor", scaler._scale).data
    return scale.view(()) if scale.device == device else scale.to(device)


def steps_for(scaler: torch.amp.GradScaler, optimizers: Iterable[torch.optim.Optimizer]) -> bool:
    """Is a scaler in the middle of ``unscale_()`` to ``update()`` for one of the optimizers?"""
    return any(id(optimizer) in scaler._per_optimizer_states for optimizer in optimizers)


#: References to the classes of GradScalers at a time when no instance was found.
_REFERENCES_WITHOUT: list[int] = []


def live_grad_scalers() -> list[torch.amp.GradScaler]:
    """Every enabled GradScaler that is alive: objects refer to their class.

    The search looks at all objects there are (0.1 s); it is left out while there are no more
    references to the classes than there were when nobody was found.
    """
    kinds = {torch.amp.GradScaler}
    while found := {sub for kind in kinds for sub in kind.__subclasses__()} - kinds:
        kinds |= found
    references = sum(sys.getrefcount(kind) for kind in kinds)
    if _REFERENCES_WITHOUT and references <= _REFERENCES_WITHOUT[0]:
        return []
    # Filtered at once: the list of all of them holds this frame, a cycle that would outlive it.
    found_now = [r for kind in kinds for r in gc.get_referrers(kind) if type(r) in kinds]
    scalers = {id(scaler): scaler for scaler in found_now}
    if not scalers:
        _REFERENCES_WITHOUT[:] = [references]
    return [scaler for scaler in scalers.values() if scaler.is_enabled()]


def asks_for_shapes(t: torch.Tensor) -> bool:
    """Is ``t`` a fake tensor of which nobody records what is done with it (Dynamo's own)?"""
    return isinstance(t, FakeTensor) and get_proxy_mode() is None


def known_empty(t: torch.Tensor) -> bool:
    """Has a tensor no elements? False where only a symbol says how many it has."""
    return statically_known_true(t.numel() == 0)


def in_functorch() -> bool:
    """Is a transform of ``torch.func`` (grad, vmap, jvp) active?"""
    return bool(torch._C._are_functorch_transforms_active())


#: What Dynamo writes around an autocast region inside a graph; arguments: device type, dtype,
#: enabled, cache.
ENTER_AUTOCAST = _enter_autocast
EXIT_AUTOCAST = _exit_autocast


class SymbolicSizes:
    """Sizes that are symbols in a shape environment of its own, and a mode for fakes of them."""

    def __init__(self) -> None:
        # Without duck shaping: two sizes that are equal by chance stay two symbols.
        self.shape_env = ShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self.shape_env)
        self._symbols: dict[str, torch.SymInt] = {}

    def symbol(self, name: str) -> torch.SymInt:
        """The size of that name."""
        if name not in self._symbols:
            # A stack's capacity (c) must not look smaller than the slots in use (k).
            hint = (101 if name.startswith("c") else 11) + 2 * len(self._symbols)
            source = ConstantSource(f"kasmina_{name}")
            symbol = self.shape_env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
            made = self.shape_env.create_symintnode(symbol, hint=hint, source=source)
            self._symbols[name] = cast("torch.SymInt", made)  # an int for a constant alone
        return self._symbols[name]

    def specialized(self) -> bool:
        """Did tracing turn one of the symbols into a number, or two into one?"""
        # An expression reads as what replaced it.
        expressions = [size.node.expr for size in self._symbols.values()]
        known = [e for e in expressions if not e.is_number]
        return len(known) < len(expressions) or len(set(known)) < len(known)

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """For ``make_fx`` on fake tensors with such sizes."""
        # Without the dispatcher: "SymIntArrayRef expected to contain only concrete integers".
        with self.mode, enable_python_dispatcher():
            yield


def fake_call(
    target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], like: Any
) -> Any:
    """Call an operator on fake tensors in the mode of ``like``: nothing is computed."""
    mode = like.fake_mode

    def fake(value: Any) -> Any:
        is_real = isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
        return mode.from_tensor(value) if is_real else value

    args, kwargs = pytree.tree_map(fake, (tuple(args), dict(kwargs)))
    with mode, enable_python_dispatcher(), torch.no_grad():
        return target(*args, **kwargs)


def inductor_option_names() -> frozenset[str]:
    """Names that ``torch._inductor.config`` has."""
    return frozenset(inductor_config.get_config_copy())


def mode_options(mode: str | None) -> dict[str, Any]:
    """What a mode of ``torch.compile`` means to Inductor.

    Raises:
        InvalidArgument: No such mode.
    """
    modes: dict[str, dict[str, Any]] = torch._inductor.list_mode_options()
    if mode is not None and mode not in modes:
        raise InvalidArgument(f"mode {mode!r}: there are {', '.join(modes)}")
    return dict(modes[mode]) if mode is not None else {}


def compile_with_inductor(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    patches: dict[str, Any],
    decompositions: Mapping[Any, Callable[..., Any]],
    cache_tag: str,
) -> Callable[..., Any]:
    """``compile_fx`` with options for this compile alone and our operators' decompositions.

    ``cache_tag`` becomes part of the key that Inductor's cache on disk knows the graph by.
    """
    from torch._inductor.compile_fx import compile_fx  # seconds to import: only where it compiles
    from torch._inductor.decomposition import select_decomp_table

    # Into the table, and not as compile_fx's argument, with which nothing is cached (torch 2.13).
    select_decomp_table().update(decompositions)
    tag = f"{torch.compiler.config.cache_key_tag}{cache_tag}"
    with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        compiled = compile_fx(gm, example_inputs, config_patches=patches or None)
    return cast("Callable[..., Any]", compiled)  # the rest of the union is for ahead-of-time use

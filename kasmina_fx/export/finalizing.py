"""Done growing: a plain model with all that became permanent."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from kasmina_fx._torch.dynamo import uncompiled
from kasmina_fx._torch.tracing import tensors_in
from kasmina_fx.bases import fast_paths
from kasmina_fx.errors import GraphMismatch, InvalidArgument, InvalidType, StillGrowing, shown
from kasmina_fx.export.grown import GROWN, attach, grown_by
from kasmina_fx.kasminify import take_seeds_off
from kasmina_fx.layer import KasminaLayer
from kasmina_fx.lifecycle import SeedLifecycle
from kasmina_fx.model import hold_seeds, kasmina_layers, layers_of, parameter_uses
from kasmina_fx.seeds import model_call
from kasmina_fx.seeds.finished import why_not_now
from kasmina_fx.seeds.folding import blended_by, fold_seeds, why_no_chunks, why_no_host
from kasmina_fx.seeds.store import SeedStore

M = TypeVar("M", bound=nn.Module)
_S = SeedLifecycle
#: Seeds that are on their way, whether they have a say in the output yet or not.
_GROWING: Final = tuple(SeedLifecycle)[_S.GERMINATED : _S.FOSSILIZED]
_CHOICES: Final = ("error", "freeze", "drop")
#: Of two outputs that differ by rounding alone, relative to the largest number, by dtype.
_BOUNDS: Final = {torch.float64: 1e-10, torch.float32: 1e-4}


def finalize(
    model: M,
    *,
    growing: Literal["error", "freeze", "drop"] = "error",
    example_inputs: tuple[Any, ...] | None = None,
) -> M:
    """Make a plain model of one that has grown: the same outputs, and no seeds.

    Blended seeds stay with their alpha. Blueprints that are linear (``affine``, ``lora``) go into
    the weight of their host where :func:`~kasmina_fx.unkasminify` could fold them; others become
    a child ``grown`` of their host, stacked, in operators of torch, which a forward hook runs (a
    module of a user's: a call for each seed). Dormant seeds and those that ended otherwise are
    gone. Of packs, the active one is what is taken.

    What comes out holds no class and no operator of this package. It goes through
    ``torch.export``, AOTInductor, ``torch.onnx.export(dynamo=True)`` and ``torch.jit.trace``, whose
    files run where this package is not installed. (To pickle the module itself is no way there: a
    pickle names the hook.)

    Args:
        model: With KasminaLayers, compiled or not. It is not changed.
        growing: Of seeds in GERMINATED to FINE_TUNING: ``"error"`` refuses them; ``"freeze"`` keeps
            those that are blended, at their present alpha, and drops the others, so that the output
            is the model's; ``"drop"`` drops them all, so that it is that of FOSSILIZED seeds alone.
        example_inputs: A tuple of positional arguments of the model's forward: its output before
            and after must then agree.

    Returns:
        A copy in evaluation mode, uncompiled; of a model that is a KasminaLayer made by hand, a
        copy of its base. All parameters and buffers are copies; those of ``grown`` want no
        gradient. Its output is that of ``model.eval()`` but for rounding: in float64 to 1e-12 of
        the largest number in most models; where a weight is folded in a shorter dtype, its elements
        are rounded once more.

    Raises:
        NoTargets: The model has no KasminaLayer.
        StillGrowing: Seeds on their way, and ``growing="error"``; says how many, where.
        InvalidArgument, InvalidType: A wrong argument, or a layer made by hand that has forward
            hooks itself, which would be lost with it.
        GraphMismatch: Outputs for ``example_inputs`` differ by more than rounding: 1e-10 of the
            largest number in float64, 1e-4 in float32, 0.05 in shorter dtypes.

    >>> from kasmina_fx import SeedLifecycle, kasminify
    >>> from kasmina_fx.testing import graft
    >>> net = kasminify(nn.Sequential(nn.Linear(4, 8), nn.Tanh()), num_seeds=4, compile=False)
    >>> graft(kasmina_layers(net)["0"], [0, 2], "affine", 1.0, SeedLifecycle.FOSSILIZED)
    >>> finalize(net, example_inputs=(torch.zeros(2, 4),))
    Sequential(
      (0): Linear(in_features=4, out_features=8, bias=True)
      (1): Tanh()
    )
    """
    plain: M = uncompiled(model)
    _check_arguments(plain, growing, example_inputs)
    with hold_seeds(plain):
        copied: M = copy.deepcopy(plain)
    copied.eval()
    model_call.remove(copied)
    if growing == "drop":
        for layer in kasmina_layers(copied).values():
            layer.reset(
                (layer.state.blended & (layer.state.stages != _S.FOSSILIZED)).nonzero().flatten()
            )
    if example_inputs is None:
        return _without_seeds(copied)
    before = _run(copied, example_inputs)
    final = _without_seeds(copied)
    _compare(before, _run(final, example_inputs))
    return final


def _check_arguments(model: nn.Module, growing: Any, example_inputs: Any) -> None:
    if not isinstance(growing, str) or growing not in _CHOICES:
        raise InvalidArgument(f"growing={shown(growing)}: there are {', '.join(_CHOICES)}")
    if example_inputs is not None and not isinstance(example_inputs, tuple):
        raise InvalidType(
            f"example_inputs={shown(example_inputs)}: give a tuple of positional arguments"
        )
    layers = layers_of(model)
    for name, layer in layers.items():
        hooks = (layer._forward_hooks, layer._forward_pre_hooks)
        if not layer.kasmina.host.in_place and any(hooks):
            raise InvalidArgument(
                f"{name or 'model'}: hooks of a layer made by hand would be lost with it: register "
                "them on its base"
            )
    if growing == "error":
        _refuse_growing(layers)


def _refuse_growing(layers: dict[str, KasminaLayer]) -> None:
    found = []
    for name, layer in layers.items():
        stages = layer.state.stages
        counts = {s: int((stages == s).sum()) for s in _GROWING}
        said = ", ".join(f"{n} in {stage.name}" for stage, n in counts.items() if n)
        found += [f"{name or 'model'}: {said}"] * bool(said)
    if found:
        more = f"; and {len(found) - 4} more layers" * (len(found) > 4)
        raise StillGrowing(
            f"seeds are still on their way: {'; '.join(found[:4])}{more}. Bring them to FOSSILIZED "
            'or cull them, or give growing="freeze" to keep those that are blended at their alpha, '
            'or growing="drop" to go without them'
        )


def _without_seeds(model: M) -> M:
    """Put what blended seeds add into weights and children, and take the seeds off, in place."""
    uses = parameter_uses(model)
    grown: list[tuple[nn.Module, GraphModule, bool]] = []
    for layer in kasmina_layers(model).values():
        store = layer.kasmina
        folded = _foldable(store, uses)
        fold_seeds(store, folded)
        rest = grown_by(store, layer.state.blended & ~folded)
        if rest is not None:
            # What hooks of a layer made in place see is what its seeds made.
            host = layer if store.host.in_place else layer.base
            grown.append((host, rest, store.host.in_place))
    plain = take_seeds_off(model)
    for host, rest, first in grown:
        attach(host, rest, first=first)
    fast_paths.turn_off(plain, lambda module: isinstance(getattr(module, GROWN, None), GraphModule))
    return plain


def _foldable(store: SeedStore, uses: Mapping[int, int]) -> Tensor:
    """Say of all seeds ``(S,)`` which are blended and go into the weight of their host."""
    blended, host = store.state.blended, store.host
    found = torch.zeros_like(blended)
    if why_no_host(store) is not None or why_not_now(host) is not None:
        return found
    changed_before_seeds = not host.in_place and bool(host.base._forward_hooks)
    if changed_before_seeds or any(uses[id(p)] > 2 for p in host.parameters()):
        return found  # 2: its module's and its layer's
    for bank, seeds, _ in blended_by(store, blended):
        if why_no_chunks(bank, host, seeds) is None:
            found[bank.run.first_seed + seeds] = True
    return found


def _run(model: nn.Module, inputs: Sequence[Any]) -> list[Tensor]:
    """Return the tensors of a model's output, in order."""
    with torch.no_grad():
        return tensors_in(model(*copy.deepcopy(inputs)))


def _compare(before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        bound = _BOUNDS.get(old.dtype, 0.05) * max(1.0, _largest(old))
        apart = _largest(old.double() - new.double())
        if apart > bound or not torch.equal(old.isfinite(), new.isfinite()):
            raise GraphMismatch(
                f"output {index} of the finalised model is {apart:.3g} from the model's, more than "
                f"{bound:.3g}, or one is not finite: a layer computes what its base and its seeds "
                "do not say"
            )


def _largest(values: Tensor) -> float:
    """Return the largest magnitude of the finite numbers; 0 if there are none."""
    return float(values.nan_to_num(0.0, 0.0, 0.0).abs().max()) if values.numel() else 0.0

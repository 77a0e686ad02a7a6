"""Whole models by the older calls: ``wrap``, ``MorphableModel``, ``unwrap``."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from kasmina_fx.arguments import check_count, check_instance
from kasmina_fx.bases import fast_paths
from kasmina_fx.compat.attention import KasminaAttentionLayer
from kasmina_fx.compat.conv import KasminaConv2dLayer
from kasmina_fx.compat.layer import KasminaLayer
from kasmina_fx.compat.norms import (
    KasminaBatchNorm1dLayer,
    KasminaBatchNorm2dLayer,
    KasminaLayerNormLayer,
)
from kasmina_fx.errors import InvalidArgument, InvalidType, StillGrowing, shown
from kasmina_fx.kasminify import unkasminify
from kasmina_fx.layer import KasminaLayer as Layer

_LOG: Final = logging.getLogger(__name__)

#: The layer for each type of module that :func:`wrap` takes.
LAYERS: Final[dict[type[nn.Module], type[KasminaLayer]]] = {
    nn.Linear: KasminaLayer,
    nn.Conv2d: KasminaConv2dLayer,
    nn.MultiheadAttention: KasminaAttentionLayer,
    nn.LayerNorm: KasminaLayerNormLayer,
    nn.BatchNorm1d: KasminaBatchNorm1dLayer,
    nn.BatchNorm2d: KasminaBatchNorm2dLayer,
}


class MorphableModel(nn.Module):
    """A model whose layers load kernels.

    Args:
        wrapped_model: The model with :class:`KasminaLayer` in it.
        kasmina_layers: These, by the names that calls use.
        original_model: What it was, for :meth:`compare_with_original`. It moves with the model, and
            is no part of its parameters and state dict.

    Attributes:
        total_forward_calls: Calls that Python made: a compiled model's are not counted.
        morphogenetic_active: Whether a kernel was loaded, and one is active.
    """

    original_model: nn.Module | None

    def __init__(
        self,
        wrapped_model: nn.Module,
        kasmina_layers: Mapping[str, KasminaLayer],
        original_model: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.wrapped_model = wrapped_model
        self.kasmina_layers = dict(kasmina_layers)
        self.__dict__["original_model"] = original_model  # no child: nothing trains or saves it
        self.total_forward_calls = 0
        self.morphogenetic_active = False
        self.register_load_state_dict_pre_hook(_drop_copies)  # type: ignore[no-untyped-call]  # torch's

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """What the wrapped model makes of it."""
        if not torch.compiler.is_compiling():
            self.__dict__["total_forward_calls"] += 1
        return self.wrapped_model(x, *args, **kwargs)

    async def load_kernel(self, layer_name: str, seed_idx: int, artifact_id: str) -> bool:
        """See :meth:`KasminaLayer.load_kernel`.

        Raises:
            InvalidArgument: No such layer (a ValueError).
        """
        done = await self._layer(layer_name).load_kernel(seed_idx, artifact_id)
        self.morphogenetic_active = self.morphogenetic_active or done
        return done

    async def unload_kernel(self, layer_name: str, seed_idx: int) -> bool:
        """See :meth:`KasminaLayer.unload_kernel`.

        Raises:
            InvalidArgument: No such layer (a ValueError).
        """
        done = await self._layer(layer_name).unload_kernel(seed_idx)
        self.morphogenetic_active = self._active_seeds() > 0
        return done

    def set_seed_alpha(self, layer_name: str, seed_idx: int, alpha: float) -> None:
        """See :meth:`KasminaLayer.set_seed_alpha`.

        Raises:
            InvalidArgument: No such layer (a ValueError).
        """
        self._layer(layer_name).set_seed_alpha(seed_idx, alpha)

    def enable_telemetry(self, enabled: bool = True) -> None:
        """Turn statistics of all layers on or off; a compiled model compiles once more."""
        for layer in self.kasmina_layers.values():
            layer.telemetry_enabled = enabled

    def get_layer_names(self) -> list[str]:
        """The names of the layers."""
        return list(self.kasmina_layers)

    def get_layer_stats(self, layer_name: str | None = None) -> dict[str, Any]:
        """A layer's stats, or those of all by name.

        Raises:
            InvalidArgument: No such layer (a ValueError).
        """
        if layer_name is not None:
            return self._layer(layer_name).get_layer_stats()
        return {name: layer.get_layer_stats() for name, layer in self.kasmina_layers.items()}

    def get_model_stats(self) -> dict[str, Any]:
        """Sums over the layers, and the stats of each."""
        layers = self.kasmina_layers.values()
        return {
            "total_forward_calls": self.total_forward_calls,
            "morphogenetic_active": self.morphogenetic_active,
            "total_kasmina_layers": len(layers),
            "total_seeds": sum(layer.num_seeds for layer in layers),
            "active_seeds": self._active_seeds(),
            "total_kernel_executions": sum(layer.total_kernel_executions for layer in layers),
            "layer_stats": self.get_layer_stats(),
        }

    def compare_with_original(self, x: Tensor) -> dict[str, Any]:
        """How far the output is from the original model's, which is as it was when wrapped.

        Raises:
            InvalidArgument: There is no original model (a ValueError).
        """
        if self.original_model is None:
            raise InvalidArgument("Original model not available for comparison")
        with torch.no_grad():
            out = self(x)
            difference = out - self.original_model(x)
        return {
            "mse": float(difference.square().mean()),
            "max_absolute_difference": float(difference.abs().max()),
            "output_shape": out.shape,
            "morphogenetic_active": self.morphogenetic_active,
        }

    def train(self, mode: bool = True) -> MorphableModel:
        """Set training or evaluation, of the original model too."""
        if self.original_model is not None:
            self.original_model.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MorphableModel:
        if self.original_model is not None:
            self.original_model._apply(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        return self

    def _active_seeds(self) -> int:
        layers = self.kasmina_layers.values()
        return sum(layer.state_layout.get_active_count() for layer in layers)

    def _layer(self, name: str) -> KasminaLayer:
        layer = self.kasmina_layers.get(name)
        if layer is None:
            raise InvalidArgument(
                f"Layer '{name}' not found in morphable model; it has "
                f"{', '.join(self.kasmina_layers) or 'none'}"
            )
        return layer


def wrap(
    model: nn.Module,
    target_layers: Sequence[type[nn.Module]] | None = None,
    seeds_per_layer: int = 4,
    cache_size_mb: int = 128,
    telemetry_enabled: bool = True,
    preserve_original: bool = True,
) -> MorphableModel:
    """Copy a model and give layers of the copy seeds.

    Args:
        model: Any module; it does not change. It may be a target itself.
        target_layers: Exact types to take; None: those of :data:`LAYERS`. Others are skipped with a
            warning.
        seeds_per_layer: Seeds a layer, capped at the layer's features.
        cache_size_mb: See :class:`KasminaLayer`.
        telemetry_enabled: See :class:`KasminaLayer`.
        preserve_original: Keep a second copy, for :meth:`MorphableModel.compare_with_original`.

    Raises:
        InvalidArgument, InvalidType: Says which argument.

    >>> model = wrap(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8)))
    >>> model.get_layer_names()
    ['0', '2']
    """
    check_instance("model", model, nn.Module)
    check_count("seeds_per_layer", seeds_per_layer, least=1)
    targets: tuple[Any, ...] = tuple(LAYERS if target_layers is None else target_layers)
    for target in targets:
        if not (isinstance(target, type) and issubclass(target, nn.Module)):
            raise InvalidType(f"target_layers holds {shown(target)}: give nn.Module classes")
    wrapped = copy.deepcopy(model)
    original = copy.deepcopy(model) if preserve_original else None
    wrapping = _Wrapping(targets, seeds_per_layer, cache_size_mb, telemetry_enabled)
    root = wrapping.layer_for(wrapped, "model")
    if root is None:
        wrapping.replace_below(wrapped)
    fast_paths.turn_off(wrapped, lambda module: isinstance(module, KasminaLayer))
    _LOG.info("%s: %d layers have seeds", type(model).__name__, len(wrapping.layers))
    return MorphableModel(wrapped if root is None else root, wrapping.layers, original)


class _Wrapping:
    """Layers in the place of the targets of one model."""

    def __init__(
        self, targets: Sequence[type[nn.Module]], seeds: int, cache_size_mb: int, telemetry: bool
    ) -> None:
        self.targets, self.settings = targets, (seeds, cache_size_mb, telemetry)
        self.layers: dict[str, KasminaLayer] = {}
        self._made: dict[nn.Module, KasminaLayer] = {}

    def layer_for(self, module: nn.Module, path: str) -> KasminaLayer | None:
        """The layer for a module, one for each; None if it is no target."""
        if module in self._made:
            return self._made[module]  # a module in two places stays one
        if type(module) not in self.targets:
            return None
        cls = LAYERS.get(type(module))
        if cls is None:
            kind, kinds = type(module).__name__, ", ".join(known.__name__ for known in LAYERS)
            _LOG.warning("%s: a %s is skipped; supported are %s", path, kind, kinds)
            return None
        name = path.replace(".", "_")
        while name in self.layers:
            name += "_"
        layer = cls.around(module, *self.settings, name)
        if self.layers:  # they start to grow together, and share locks
            layer.siblings = next(iter(self.layers.values())).siblings
        self._made[module] = self.layers[name] = layer
        return layer

    def replace_below(self, owner: nn.Module, path: str = "") -> None:
        """Put layers in the place of all targets below a module, but not inside of seeds."""
        if isinstance(owner, Layer):
            return
        for name, child in owner._modules.items():
            where = f"{path}.{name}" if path else name
            layer = None if child is None else self.layer_for(child, where)
            if layer is not None:
                owner._modules[name] = layer
            elif child is not None:
                self.replace_below(child, where)


def unwrap(morphable_model: MorphableModel) -> nn.Module:
    """Return the plain model with the weights that it has now: a copy.

    Where seeds are in effect that no weight can hold (all but fossilized ``affine`` and ``lora``),
    the wrapped model itself is returned, with a warning: nothing that was learnt is lost.

    Raises:
        InvalidType: No MorphableModel.
    """
    check_instance("morphable_model", morphable_model, MorphableModel)
    try:
        return unkasminify(copy.deepcopy(morphable_model.wrapped_model), fold=True)
    except StillGrowing as error:
        _LOG.warning("not unwrapped, the model with its seeds is returned: %s", error)
        return morphable_model.wrapped_model


def _drop_copies(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Leave out what older state dicts hold twice, and the original model."""
    for key in list(state_dict):
        if key.startswith((f"{prefix}kasmina_layers.", f"{prefix}original_model.")):
            del state_dict[key]

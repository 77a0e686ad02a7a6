"""One layer, two implementations: the logical view run seed by seed, and the chunked one.

There is one base, one set of seeds and one state; what is chosen is the code that reads them. So
both give the same output and gradients, and a switch loses nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from kasmina_fx import reference
from kasmina_fx._torch.dynamo import being_recorded, compile_apart, not_traced
from kasmina_fx.arguments import check_count, check_instance
from kasmina_fx.backend import kasmina
from kasmina_fx.bases.outputs import replaced, watched
from kasmina_fx.chunked_layer import ChunkedKasminaLayer
from kasmina_fx.config import SeedConfig, TelemetryPolicy
from kasmina_fx.physical import markers
from kasmina_fx.rollout.flags import FlagSource
from kasmina_fx.rollout.old_layouts import translate
from kasmina_fx.rollout.shadow import Shadow
from kasmina_fx.rollout.statistics import observe
from kasmina_fx.rollout.switch import CHUNKED, LEGACY, Switch
from kasmina_fx.rollout.traceless import (
    RandomStates,
    borrowed_buffers,
    drawn_again,
    measured,
    random_states,
)
from kasmina_fx.seeds import outside
from kasmina_fx.transactions.threads import inside_forward

#: Attributes that a hybrid layer has beyond a chunked one.
_OWN = ("switch", "shadow", "_compile_options", "_compiled")


class HybridKasminaLayer(ChunkedKasminaLayer):
    """A :class:`~kasmina_fx.ChunkedKasminaLayer` that can also run as its definition reads.

    Args:
        base_layer: The module to watch; it is used, not copied.
        layer_id: Name in messages, reports and feature flags.
        num_seeds: Seeds, 1 up to the number of output features.
        enable_telemetry: Keep statistics of every chunk.
        device: Move base and seeds there; None leaves it where it is.
        force_implementation: "legacy" or "chunked"; None: as the flag ``chunked_architecture``
            says at each call.
        feature_flags: Who is asked for the flag; None:
            :func:`kasmina_fx.rollout.get_feature_manager`.
        fallback: Let the other implementation answer where one raises; False: raise.
        chunk_sizes, feature_dim, reserve, config: See :class:`~kasmina_fx.KasminaLayer`.

    "legacy" is :func:`kasmina_fx.reference.forward`, eager always. "chunked" is compiled apart from
    what is around the layer: by :meth:`compile`, or when a compiled model calls the layer. So a
    switch compiles nothing anew, at the price of a graph break; :meth:`settle` takes it away where
    a layer has moved over for good. Both keep the same statistics; gradients that are not finite
    are dropped by both, and counted by "chunked" alone.

    >>> from kasmina_fx import FeatureFlagManager
    >>> flags = FeatureFlagManager("no_such_file.json")
    >>> layer = HybridKasminaLayer(nn.Linear(4, 6), "fc", num_seeds=3, feature_flags=flags)
    >>> x = torch.ones(2, 4)
    >>> before = layer(x)
    >>> flags.add_to_allowlist("chunked_architecture", "fc")
    >>> bool((layer(x) == before).all())
    True
    >>> layer.get_implementation_stats()["calls"]
    {'legacy': 1, 'chunked': 1}
    """

    def __init__(
        self,
        base_layer: nn.Module,
        layer_id: str | None = None,
        num_seeds: int = 1000,
        enable_telemetry: bool | TelemetryPolicy = True,
        device: torch.device | str | None = None,
        force_implementation: str | None = None,
        *,
        feature_flags: FlagSource | None = None,
        fallback: bool = True,
        chunk_sizes: Sequence[int] | None = None,
        feature_dim: int | None = None,
        reserve: int = 0,
        config: SeedConfig | None = None,
    ) -> None:
        switch = Switch(force_implementation, feature_flags, fallback)
        super().__init__(
            base_layer,
            num_seeds,
            layer_id,
            enable_telemetry,
            device,
            chunk_sizes=chunk_sizes,
            feature_dim=feature_dim,
            reserve=reserve,
            config=config,
        )
        switch.layer_id = self.layer_id
        self.switch = switch
        self.shadow: Shadow | None = None
        self._compile_options: dict[str, Any] | None = None
        self._compiled: Callable[..., Any] | None = None

    # Which implementation.

    @property
    def force_implementation(self) -> str | None:
        """The implementation that runs whatever the flag says; None: the flag decides."""
        return self.switch.forced

    @force_implementation.setter
    def force_implementation(self, name: str | None) -> None:
        self.switch.force(name)

    def enable_chunked_mode(self) -> None:
        """Run "chunked", which gets another chance if it was switched off."""
        self.switch.force(CHUNKED)

    def enable_legacy_mode(self) -> None:
        """Run "legacy", which gets another chance if it was switched off."""
        self.switch.force(LEGACY)

    def enable_auto_mode(self) -> None:
        """Let the feature flag decide at every call."""
        self.switch.force(None)

    def set_model_context(self, model_id: str | None) -> None:
        """Tell the flag which model the layer belongs to; None: one without a name."""
        self.switch.name_model(model_id)

    @property
    def feature_flags(self) -> FlagSource:
        """Who is asked for the flag."""
        return self.switch.flags

    def settle(self) -> ChunkedKasminaLayer:
        """Become a :class:`ChunkedKasminaLayer` for good: the same object, seeds and weights.

        A compiled model around it takes its graph in, which costs a compile of that model.
        """
        for name in _OWN:
            del self.__dict__[name]
        layer: ChunkedKasminaLayer = self
        layer.__class__ = ChunkedKasminaLayer
        return layer

    # Running it.

    def compile(self, **options: Any) -> None:
        """Compile "chunked", with options of ``torch.compile``; the backend is ``kasmina``."""
        self._compile_options, self._compiled = {"backend": kasmina} | options, None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's output with the blended seeds' contributions."""
        below = torch.compiler.is_dynamo_compiling()  # a compiled model
        if being_recorded() or (not below and any(isinstance(a, Proxy) for a in args)):
            return super().forward(*args, **kwargs)  # a program holds no choice
        return self._answer(below, args, kwargs)

    @not_traced
    def _answer(self, below: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device, shadow = self._device, self.shadow
        numbers = random_states(device) if shadow is not None and shadow.wants() else None
        with self._one_state():
            runs = {LEGACY: self._run_legacy, CHUNKED: self._chunked(below)}
            out, name = self.switch.run(runs, device, args, kwargs)
            if shadow is not None and numbers is not None:
                other = lambda: self._other(name, numbers, args, kwargs)  # noqa: E731
                shadow.look(self.layer_id, name, out, other)
        return out

    @property
    def _device(self) -> torch.device:
        return self.kasmina.state.alpha.device

    @contextmanager
    def _one_state(self) -> Iterator[None]:
        """Take over what others wrote to registered state, and let no seed change inside."""
        if self.kasmina.registered.written and not inside_forward():
            outside.take_over(self.kasmina)
        self.siblings.enter()
        try:
            yield
        finally:
            self.siblings.leave(self._compiled is not None)

    def _chunked(self, below: bool) -> Callable[..., Any]:
        if self.kasmina.registered.replaced:
            return super().forward  # compiled code holds the tensors that were there before
        if self._compiled is None and (below or self._compile_options is not None):
            options = self._compile_options or {"backend": kasmina}
            self._compiled = compile_apart(super().forward, "hybrid_layer", **options)
        return self._compiled or super().forward

    def _run_legacy(self, *args: Any, **kwargs: Any) -> Any:
        base_out = self.base(*args, **kwargs)
        out = reference.seeds_on(self, base_out)
        observe(self, watched(base_out), watched(out))
        return out

    def _other(
        self, name: str, numbers: RandomStates, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Compute what the other implementation makes of a call, and leave no trace of it."""
        with torch.no_grad(), drawn_again(numbers, self._device), borrowed_buffers(self.base):
            if name == CHUNKED:
                return reference.forward(self, *args, **kwargs)
            out, store = self.base(*args, **kwargs), self.kasmina
            asked = self._read(store).blend_arguments(
                watched(out), store.layout_text, self.training
            )
            return replaced(out, markers.BLEND(*asked)[0])

    # Reports.

    def get_implementation_stats(self) -> dict[str, Any]:
        """Calls and average latency (ms) of both implementations; nothing waits for a GPU.

        Latencies are of calls that compiled nothing and, on CUDA, are known to be over.
        ``<name>_available`` is False where it was switched off; ``switched_off`` says why.
        """
        return self.switch.stats()

    def get_layer_stats(self) -> dict[str, Any]:
        """:meth:`KasminaLayer.get_layer_stats` and :meth:`get_implementation_stats`, in one."""
        stats = self.switch.stats()
        return {
            **super().get_layer_stats(),
            "implementation": stats["current_implementation"],
            "forward_count": sum(stats["calls"].values()),
            "num_blueprints": len(self.kasmina.blueprints),
            "output_dim": self.chunks.layer_dim,
            "chunks_per_seed": self.chunks.layer_dim / self.num_seeds,
            **stats,
        }

    def get_health_report(self) -> dict[str, Any]:
        """:meth:`KasminaLayer.get_health_report`, whichever implementation runs, and how it runs.

        Added are ``implementation``, ``status`` ("healthy", or "degraded" where one is switched
        off), ``timestamp`` (seconds since 1970) and ``performance``.
        """
        stats = self.switch.stats()
        return {
            **super().get_health_report(),
            "timestamp": time.time(),
            "implementation": stats["current_implementation"],
            "status": "degraded" if stats["switched_off"] else "healthy",
            "performance": {key: stats[key] for key in ("calls", "avg_latency_ms")},
        }

    def compare_implementations(self, x: Tensor, num_runs: int = 10) -> dict[str, Any]:
        """Run both in evaluation mode, without gradients, and compare outputs and times (ms).

        It waits for the device. "chunked" runs compiled if :meth:`compile` was called. Calls are
        not counted; statistics stay as they are unless they are kept in evaluation.

        Args:
            x: The input.
            num_runs: Runs of each that are timed, after one that is not.

        Raises:
            InvalidArgument: ``num_runs`` below 1.
        """
        check_count("num_runs", num_runs, least=1)
        check_instance("x", x, Tensor)
        runs = {LEGACY: self._run_legacy, CHUNKED: self._chunked(False)}
        found, outs = measured(self, runs, x, num_runs)
        for name, times in found.items():
            times["available"] = name not in self.switch.off
        found[CHUNKED]["num_seeds"] = self.num_seeds
        return {
            "layer_id": self.layer_id,
            "num_runs": num_runs,
            "input_shape": list(x.shape),
            "implementations": found,
            "max_output_difference": float((outs[LEGACY] - outs[CHUNKED]).abs().max()),
        }

    # Copies and state dicts.

    def __getstate__(self) -> dict[str, Any]:
        """Copied and pickled without compiled code, and without who looks at its calls."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]  # torch's
        return state | {"_compiled": None, "shadow": None}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        translate(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

"""One seed, with the constructor and calls of older code."""

from __future__ import annotations

import logging
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kasmina_fx.arguments import as_seed_id, check_count
from kasmina_fx.compat.chunked.figures import health_score
from kasmina_fx.compat.chunked.older_calls import OlderCalls
from kasmina_fx.compat.chunked.seed_state import LogicalSeedState
from kasmina_fx.compat.chunked.state_tensor import StateTensor
from kasmina_fx.compat.chunked.states import RAMP, TRANSITIONS, SeedLifecycle, as_state
from kasmina_fx.lifecycle import SeedLifecycle as Stage
from kasmina_fx.lifecycle import is_blended
from kasmina_fx.physical.statistics import DEAD_BELOW

_LOG: Final = logging.getLogger(__name__)
#: Seeds that are less healthy ask for adaptation.
_SICK: Final = 0.7
#: Errors that put a seed into ERROR_RECOVERY.
_MOST_ERRORS: Final = 3


class LogicalSeed:
    """A seed that belongs to no layer, or by :meth:`of_layer` a view of one that does.

    Args:
        layer_id: Name of the layer, for reports.
        seed_id: Number of the seed.
        chunk_idx: Number of its chunk.
        chunk_size: Features of the chunk.
        device: Of its state; None for the CPU.

    >>> seed = LogicalSeed("fc", 0, 0, 4, torch.device("cpu"))
    >>> seed.transition_state(SeedLifecycle.ACTIVE), seed.transition_state(SeedLifecycle.LOADING)
    (False, True)
    """

    def __init__(
        self,
        layer_id: str,
        seed_id: int,
        chunk_idx: int,
        chunk_size: int,
        device: torch.device | str | None = None,
    ) -> None:
        for name, number in (("seed_id", seed_id), ("chunk_idx", chunk_idx)):
            check_count(name, number)
        check_count("chunk_size", chunk_size, least=1)
        self.layer_id, self.seed_id, self.chunk_idx = layer_id, seed_id, chunk_idx
        self.chunk_size = chunk_size
        self._rows, self._row = StateTensor(1, device), 0
        self._layer: OlderCalls | None = None

    @classmethod
    def of_layer(cls, layer: OlderCalls, seed_id: int) -> LogicalSeed:
        """Return a view of a layer's seed, which holds no state of its own."""
        seed = as_seed_id(seed_id, layer.num_seeds, layer.layer_id)
        view = cls(layer.layer_id, seed, seed, layer.chunks.sizes[seed])
        view._rows, view._row, view._layer = layer.state_tensor, seed, layer
        return view

    @property
    def device(self) -> torch.device:
        """Where its state is."""
        return self._rows.device

    @property
    def _state(self) -> SeedLifecycle:
        return SeedLifecycle(int(self._rows.get_lifecycle_states()[self._row]))

    def get_state(self) -> LogicalSeedState:
        """What is known of it now; of a layer's seed one device copy."""
        known = self._rows.get_seed_state(self._row)
        del known["alpha_blend"]
        known["lifecycle_state"] = SeedLifecycle(known["lifecycle_state"])
        return LogicalSeedState(self.layer_id, self.seed_id, self.chunk_idx, **known)

    def process_chunk(self, chunk: Tensor, blueprint: nn.Module | None = None) -> Tensor:
        """Blend in what a blueprint makes of the chunk.

        Its share is alpha: epochs over 30 while LOADING, 1 from ACTIVE on, unless it was set. The
        parameters of a FOSSILIZED seed's blueprint get no gradient, the chunk does.

        Args:
            chunk: The seed's features of the layer's output.
            blueprint: None: that of the layer's seed, by the definition; there is none else.
        """
        if blueprint is None:
            return chunk if self._layer is None else self._own_blueprint(self._layer, chunk)
        state = self._rows._state
        if not bool(is_blended(state.stages[self._row : self._row + 1])):
            return chunk
        frozen = self._state is SeedLifecycle.FOSSILIZED
        named = blueprint.named_parameters()
        tensors: dict[str, Tensor] = {n: p.detach() if frozen else p for n, p in named}
        made: Tensor = functional_call(blueprint, tensors, chunk)
        alpha = float(state.alphas[self._row])
        return (1 - alpha) * chunk + alpha * made

    def _own_blueprint(self, layer: OlderCalls, chunk: Tensor) -> Tensor:
        return layer.seeds[self._row].process_chunk(chunk)

    def compute_health_metrics(self, chunk: Tensor) -> dict[str, float]:
        """Mean, standard deviation (biased), sparsity, 2-norm and health of a chunk; it is kept.

        One device copy.
        """
        with torch.no_grad():
            flat = chunk.detach().flatten().float()
            silent = (flat.abs() < DEAD_BELOW).float().mean()
            found = [flat.mean(), flat.std(correction=0), silent, torch.linalg.vector_norm(flat)]
            found.append(health_score(found[1], silent))
            mean, std, sparsity, magnitude, health = torch.stack(found).tolist()
        self._rows.update_health_scores([self._row], health)
        return {
            "mean": mean,
            "std": std,
            "sparsity": sparsity,
            "magnitude": magnitude,
            "health_score": health,
        }

    def request_adaptation(self) -> dict[str, Any] | None:
        """What to ask a controller for: a DORMANT seed with a health below 0.7 asks."""
        known = self.get_state()
        if known.lifecycle_state is not SeedLifecycle.DORMANT or known.health_score >= _SICK:
            return None
        return {
            "seed_id": self.seed_id,
            "chunk_idx": self.chunk_idx,
            "health_score": known.health_score,
            "reason": "low_health",
            "urgency": 1.0 - known.health_score,
        }

    def transition_state(self, new_state: SeedLifecycle | int) -> bool:
        """Go to a state if it may follow the present one, and say whether; epochs start again.

        From ACTIVE on alpha is 1.

        Raises:
            InvalidArgument: There is no such state.
        """
        new, now = as_state(new_state), self._state
        if new not in TRANSITIONS[now]:
            text = "%s: seed %d can't go from %s to %s"
            _LOG.warning(text, self.layer_id, self.seed_id, now.name, new.name)
            return False
        with self._rows._change():
            self._rows.set_lifecycle_state(self._row, new)
            if new is SeedLifecycle.ACTIVE:
                self._rows.update_alpha_blend(self._row, 1.0)
        return True

    def increment_epoch(self) -> None:
        """One epoch more in its state; a seed that is LOADING has an alpha of epochs over 30."""
        state = self._rows._state
        with self._rows._change():
            epochs = int(state.epochs[self._row]) + 1
            state.set_rows(self._row, epochs_in_state=epochs)
            if int(state.stages[self._row]) == Stage.GRAFTING:
                state.set_alpha(self._row, epochs / RAMP)

    def set_blueprint(self, blueprint_id: int, grafting_strategy: int = 0) -> None:
        """Name its blueprint and strategy; see :meth:`StateTensor.set_blueprint`."""
        self._rows.set_blueprint(self._row, blueprint_id, grafting_strategy)

    def record_error(self) -> None:
        """Count an error; from the third on a seed that is LOADING or ACTIVE is put out."""
        if self._rows.increment_error_count(self._row) >= _MOST_ERRORS:
            self.transition_state(SeedLifecycle.ERROR_RECOVERY)

    def reset(self) -> None:
        """Make it DORMANT and healthy, without a blueprint and errors."""
        self._rows.set_lifecycle_state(self._row, SeedLifecycle.DORMANT)
        self._rows.forget(self._row)

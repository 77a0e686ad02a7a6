"""What a view of a layer's state asks of the layer: blueprints for seeds that need one."""

from __future__ import annotations

from torch import Tensor

from kasmina_fx import chunked_layer
from kasmina_fx.compat.state_layout import UNNAMED
from kasmina_fx.errors import InvalidArgument
from kasmina_fx.lifecycle import HOLDS_BLUEPRINT
from kasmina_fx.lifecycle import SeedLifecycle as Stage


class SeedOwner(chunked_layer.ChunkedKasminaLayer):
    """A layer whose seeds' state may be written to from outside."""

    def fill(self, ids: Tensor, stage: Stage) -> None:
        """Give those seeds that need a blueprint for a stage, and hold none, an identity."""
        if stage not in HOLDS_BLUEPRINT:
            return
        bare = [seed for seed in ids.tolist() if self.bank_of(seed) is None]
        alphas = self.state.alphas[bare]
        with self.transaction():
            self.reset(bare)
            super().request_germination(bare, UNNAMED)
            self.set_alpha(bare, alphas)

    def replace_blueprint(self, seed: int, blueprint_id: int, strategy: int) -> None:
        """Let a seed that is awake grow another registered blueprint, in the state that it is in.

        Raises:
            InvalidArgument: It is DORMANT.
            UnknownBlueprint: There is no such id.
        """
        stage, epochs = Stage(int(self.state.stages[seed])), int(self.state.epochs[seed])
        if stage not in HOLDS_BLUEPRINT:
            raise InvalidArgument(
                f"{self.layer_id}: seed {seed} is {stage.name} and grows nothing: call "
                f"request_germination({seed}, {blueprint_id}, {strategy})"
            )
        alpha = float(self.state.alphas[seed])
        with self.transaction():
            if blueprint_id == int(self.state.blueprint_ids[seed]):
                self.state.set_rows(seed, grafting_strategy=strategy)
                return
            self.reset(seed)
            chunked_layer.ChunkedKasminaLayer.request_germination(
                self, seed, blueprint_id, strategy
            )
            self.state.set_rows(seed, lifecycle_state=stage, epochs_in_state=epochs)
            self.set_alpha(seed, alpha)

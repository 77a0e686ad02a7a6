"""Any sequence of commands to a state tensor against a model in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from state_cases import leave_to_the_device

from kasmina_fx import (
    IllegalTransition,
    SeedLifecycle,
    StateTensor,
)
from kasmina_fx.lifecycle import BLENDED, HOLDS_BLUEPRINT, LEGAL

S = SeedLifecycle
LETS_GO = (S.DORMANT, S.CULLED, S.CANCELLED)


class Life(RuleBasedStateMachine):
    """The state tensor against lists of plain ints."""

    @initialize(n=st.integers(1, 6), embargo=st.integers(1, 3))
    def begin(self, n: int, embargo: int) -> None:
        self.embargo = embargo
        self.state = StateTensor(n, embargo_epochs=embargo)
        self.rows = [[0, 0, 0, 0] for _ in range(n)]
        self.alpha = [0.0] * n

    def _ids(self, data: st.DataObject) -> list[int]:
        return data.draw(st.lists(st.integers(0, len(self.rows) - 1), unique=True))

    def _may(self, i: int, to: SeedLifecycle) -> bool:
        stage, _, epochs, _ = self.rows[i]
        return to in LEGAL[S(stage)] and (stage != S.CULLED or epochs >= self.embargo)

    def _enter(self, i: int, to: SeedLifecycle) -> None:
        kept = [0, 0] if to is S.DORMANT else [self.rows[i][1], self.rows[i][3]]
        self.rows[i] = [int(to), kept[0], 0, kept[1]]
        if to in LETS_GO:
            self.alpha[i] = 0.0

    @rule(data=st.data(), to=st.sampled_from(SeedLifecycle))
    def advance(self, data: st.DataObject, to: SeedLifecycle) -> None:
        ids = self._ids(data)
        if not all(self._may(i, to) for i in ids):
            with pytest.raises(IllegalTransition):
                self.state.advance(ids, to)
            return
        self.state.advance(ids, to)
        for i in ids:
            self._enter(i, to)

    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        ids = self._ids(data)
        self.state.reset(ids)
        for i in ids:
            self._enter(i, S.DORMANT)

    @rule(
        data=st.data(),
        stage=st.sampled_from(SeedLifecycle),
        blueprint=st.integers(0, 9),
        strategy=st.integers(0, 3),
    )
    def put(self, data: st.DataObject, stage: SeedLifecycle, blueprint: int, strategy: int) -> None:
        ids = self._ids(data)
        row = [int(stage), blueprint, 0, strategy]
        self.state.set_rows(
            ids,
            lifecycle_state=stage,
            blueprint_id=blueprint,
            epochs_in_state=0,
            grafting_strategy=strategy,
        )
        for i in ids:
            self.rows[i] = list(row)

    @rule(data=st.data(), value=st.floats(-1, 2, width=32))
    def blend(self, data: st.DataObject, value: float) -> None:
        ids = self._ids(data)
        self.state.set_alpha(ids, value)
        for i in ids:
            self.alpha[i] = min(1.0, max(0.0, value))

    @rule(data=st.data(), value=st.floats(0, 1, width=32), look=st.booleans())
    def together(self, data: st.DataObject, value: float, look: bool) -> None:
        first, second = self._ids(data), self._ids(data)
        with self.state.transaction():
            self.state.set_alpha(first, value)
            if look:
                seen = [value if i in first else now for i, now in enumerate(self.alpha)]
                assert self.state.alphas.tolist() == seen
            self.state.reset(second)
        for i in first:
            self.alpha[i] = value
        for i in second:
            self._enter(i, S.DORMANT)

    @rule(data=st.data())
    def ramp(self, data: st.DataObject) -> None:
        values = st.floats(0, 1, width=32)
        self.alpha = [data.draw(values) for _ in self.rows]
        self.state.set_device_alpha(torch.tensor(self.alpha))

    @rule()
    def leave_to_the_device(self) -> None:
        leave_to_the_device(self.state)

    @rule()
    def look(self) -> None:
        assert self.state.alphas.tolist() == self.alpha

    @rule()
    def epoch(self) -> None:
        self.state.increment_epochs()
        for i, row in enumerate(self.rows):
            row[2] = min(32_767, row[2] + (row[0] != 0))
            if row[0] == S.CULLED and row[2] >= self.embargo:
                self._enter(i, S.DORMANT)

    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        ids = self._ids(data)

        def failing() -> None:
            with self.state.transaction():
                self.state.set_rows(ids, lifecycle_state=S.FOSSILIZED, blueprint_id=5)
                self.state.set_alpha(ids, 1.0)
                self.state.increment_epochs()
                raise KeyError

        with pytest.raises(KeyError):
            failing()

    @rule()
    def reload(self) -> None:
        fresh = StateTensor(len(self.rows), embargo_epochs=self.embargo)
        fresh.load_state_dict(self.state.state_dict())
        fresh.refresh_mirror()
        self.state = fresh

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "state"):
            return
        assert self.state.state_tensor.tolist() == self.state.rows.tolist() == self.rows
        assert self.state.alpha.tolist() == self.alpha  # not .alphas, which asks the device
        columns = [self.state.stages, self.state.blueprint_ids, self.state.epochs]
        assert [list(row) for row in zip(*[c.tolist() for c in columns], strict=True)] == [
            row[:3] for row in self.rows
        ]
        assert self.state.strategies.tolist() == [row[3] for row in self.rows]
        blended = [row[0] in BLENDED and row[1] > 0 for row in self.rows]
        assert self.state.blended.tolist() == self.state.get_active_seeds().tolist() == blended
        assert self.state.holding.tolist() == [row[0] in HOLDS_BLUEPRINT for row in self.rows]
        assert self.state.embargoed.tolist() == [
            row[0] == S.CULLED and row[2] < self.embargo for row in self.rows
        ]


TestLife = Life.TestCase

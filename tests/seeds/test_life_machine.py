"""Random commands on a layer's seeds against the same life written in plain Python."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import nn

from kasmina_fx import IllegalTransition, KasminaLayer, SeedConfig
from kasmina_fx.grafting import GraftingConfig
from kasmina_fx.lifecycle import SeedLifecycle as S

# Written down anew, not taken from the package.
NEXT = {
    S.DORMANT: {S.GERMINATED},
    S.GERMINATED: {S.TRAINING, S.CANCELLED},
    S.TRAINING: {S.GRAFTING, S.CULLED, S.CANCELLED, S.ROLLED_BACK},
    S.GRAFTING: {S.STABILIZATION, S.CULLED, S.ROLLED_BACK},
    S.STABILIZATION: {S.EVALUATING, S.ROLLED_BACK},
    S.EVALUATING: {S.FINE_TUNING, S.CULLED, S.ROLLED_BACK},
    S.FINE_TUNING: {S.FOSSILIZED, S.CULLED, S.ROLLED_BACK},
    S.FOSSILIZED: set(),
    S.CULLED: {S.DORMANT},
    S.CANCELLED: {S.DORMANT},
    S.ROLLED_BACK: set(),
}
BLENDS = {S.GRAFTING, S.STABILIZATION, S.EVALUATING, S.FINE_TUNING, S.FOSSILIZED}
HOLDS = BLENDS | {S.GERMINATED, S.TRAINING, S.ROLLED_BACK}
RAMP = 4
SIZE = 2  # features of a chunk
MOST = 64


@dataclass
class Seed:
    stage: S = S.DORMANT
    blueprint: int = 0
    epochs: int = 0
    strategy: int = 0
    alpha: float = 0.0
    values: tuple[float, float] = (1.0, 0.0)  # scale and shift of its own blueprint

    def enter(self, stage: S) -> None:
        self.stage, self.epochs = stage, 0
        if stage is S.DORMANT:
            self.blueprint = self.strategy = 0
        if stage in (S.DORMANT, S.CULLED, S.CANCELLED):
            self.alpha = 0.0


@dataclass
class Plain:
    """The layer as a list of seeds; a command returns what the layer's does, or what it raises."""

    seeds: list[Seed]
    embargo: int
    shared_id: int
    shared: tuple[float, float] = (1.0, 0.0)
    given_out: set[int] = field(default_factory=set)

    def of(self, ids: Iterable[int]) -> list[Seed]:
        return [self.seeds[i] for i in ids]

    def values(self, seed: Seed) -> tuple[float, float]:
        return self.shared if seed.blueprint == self.shared_id else seed.values

    def may(self, seed: Seed, stage: S) -> bool:
        rests = seed.stage is S.CULLED and seed.epochs < self.embargo
        # "affine" starts as the identity; nobody knows what a shared one has learnt.
        skips = seed.stage is S.GERMINATED and seed.blueprint not in (0, self.shared_id)
        return (stage in NEXT[seed.stage] and not rests) or (skips and stage is S.GRAFTING)

    def germinate(self, ids: list[int], shared: bool, strategy: int) -> Any:
        if any(seed.stage is not S.DORMANT for seed in self.of(ids)):
            return False
        for seed in self.of(ids):
            seed.enter(S.GERMINATED)
            seed.blueprint, seed.strategy = self.shared_id if shared else -1, strategy
            seed.alpha, seed.values = 0.0, (1.0, 0.0)
        return True

    def cancel(self, ids: list[int]) -> Any:
        if any(seed.stage not in (S.GERMINATED, S.TRAINING) for seed in self.of(ids)):
            return False
        for seed in self.of(ids):
            seed.enter(S.CANCELLED)
        return True

    def advance(self, ids: list[int], stage: S) -> Any:
        if not all(self.may(seed, stage) for seed in self.of(ids)):
            return IllegalTransition
        for seed in self.of(ids):
            seed.enter(stage)
        return None

    def reset(self, ids: list[int]) -> Any:
        for seed in self.of(ids):
            seed.enter(S.DORMANT)

    def set_alpha(self, ids: list[int], alpha: float) -> Any:
        for seed in self.of(ids):
            seed.alpha = min(1.0, max(0.0, alpha))

    def step_epoch(self) -> Any:
        for seed in self.seeds:
            if seed.stage is not S.DORMANT:
                seed.epochs += 1
            if seed.stage is S.CULLED and seed.epochs >= self.embargo:
                seed.enter(S.DORMANT)
            if seed.stage is S.GRAFTING:
                seed.alpha = min(1.0, seed.alpha + 1 / RAMP)

    def rollback(self, then: Plain, ids: list[int], mark: bool) -> Any:
        if mark and not all(self.may(seed, S.ROLLED_BACK) for seed in self.of(ids)):
            return IllegalTransition
        for i in ids:
            old = copy.copy(then.seeds[i])
            if old.stage in HOLDS and old.blueprint == self.shared_id:
                self.shared = then.shared
            old.stage = S.ROLLED_BACK if mark else old.stage
            self.seeds[i] = old
        return None


Command = Callable[[], tuple[Any, Callable[[], Any]]]

seeds_of = st.sets(st.integers(0, MOST - 1), min_size=1, max_size=5)
alphas = st.integers(-2, 10).map(lambda eighths: eighths / 8)
stages = st.sampled_from(S)
#: A command by name with its arguments, seeds not yet cut to the layer's number.
commands = st.one_of(
    st.tuples(st.just("germinate"), seeds_of, st.booleans(), st.sampled_from([0, 2])),
    st.tuples(st.just("cancel"), seeds_of),
    st.tuples(st.just("advance"), seeds_of, stages),
    st.tuples(st.just("promote"), seeds_of),
    st.tuples(st.just("reset"), seeds_of),
    st.tuples(st.just("set_alpha"), seeds_of, alphas),
    st.tuples(st.just("rollback"), seeds_of, st.booleans()),
    st.tuples(st.just("step_epoch")),
)


class Life(RuleBasedStateMachine):
    """Each rule is done to both; the invariants compare all that can be seen."""

    layer: KasminaLayer
    plain: Plain

    @initialize(count=st.integers(1, MOST), embargo=st.integers(0, 2))
    def begin(self, count: int, embargo: int) -> None:
        self.base = nn.Linear(2, SIZE * count)
        self.config = SeedConfig(
            grafting=GraftingConfig(fixed_steps=RAMP), embargo_epochs=embargo, error_limit=None
        )
        self.layer = KasminaLayer(self.base, count, layer_id="life", config=self.config)
        shared = self.layer.register_blueprint("affine")
        self.plain = Plain([Seed() for _ in range(count)], embargo, shared)
        self.remember()

    @rule()
    def remember(self) -> None:
        self.snapshot, self.then = self.layer.snapshot(), copy.deepcopy(self.plain)

    @rule(command=commands)
    def command(self, command: tuple[Any, ...]) -> None:
        name, *given = command
        if given:
            given[0] = sorted({seed % len(self.plain.seeds) for seed in given[0]})
        if name == "promote":  # the first seed's next stage, or most commands would be illegal
            name = "advance"
            options = sorted(NEXT[self.plain.seeds[given[0][0]].stage]) or [S.DORMANT]
            given.append(options[0])
        layer = self.layer
        calls: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
            "germinate": (self.plain.germinate, self._germinate),
            "cancel": (self.plain.cancel, layer.cancel_germination),
            "advance": (self.plain.advance, layer.advance),
            "reset": (self.plain.reset, layer.reset),
            "set_alpha": (self.plain.set_alpha, layer.set_alpha),
            "step_epoch": (self.plain.step_epoch, layer.step_epoch),
            "rollback": (
                lambda ids, mark: self.plain.rollback(self.then, ids, mark),
                lambda ids, mark: layer.rollback(self.snapshot, ids, mark=mark),
            ),
        }
        expected, got = (call(*given) for call in (calls[name][0], _outcome(calls[name][1])))
        assert got == expected
        self._take_ids()

    def _germinate(self, ids: list[int], shared: bool, strategy: int) -> bool:
        return self.layer.request_germination(
            ids, self.plain.shared_id if shared else "affine", strategy
        )

    def _take_ids(self) -> None:
        """Private ids are the layer's to choose, but each once and for all."""
        for seed, number in zip(self.plain.seeds, self.layer.state.blueprint_ids, strict=True):
            if seed.blueprint == -1:
                seed.blueprint = int(number)
                assert seed.blueprint > 0
                assert seed.blueprint not in {self.plain.shared_id, *self.plain.given_out}
                self.plain.given_out.add(seed.blueprint)

    @rule(several=st.lists(commands, min_size=1, max_size=4), commit=st.booleans())
    def transaction(self, several: list[tuple[Any, ...]], commit: bool) -> None:
        before, seen = copy.deepcopy(self.plain), self.layer.state.state_tensor.clone()
        try:
            with self.layer.transaction():
                for command in several:
                    self.command(command)
                    assert torch.equal(self.layer.state.state_tensor, seen)
                if not commit:
                    raise _Abort
        except _Abort:
            before.given_out |= self.plain.given_out
            self.plain = before

    @rule(seeds=seeds_of, scale=alphas, shift=alphas)
    def train(self, seeds: set[int], scale: float, shift: float) -> None:
        """What an optimizer would do."""
        for i in sorted({seed % len(self.plain.seeds) for seed in seeds}):
            seed, held = self.plain.seeds[i], self.layer.bank_of(i)
            assert (held is not None) == (seed.stage in HOLDS and seed.blueprint > 0)
            if held is None:
                continue
            tensors = held[0].slot_tensors(held[1])
            for name, value in (("scale", scale), ("shift", shift)):
                tensors[name].data.fill_(value)
            if seed.blueprint == self.plain.shared_id:
                self.plain.shared = scale, shift
            else:
                seed.values = scale, shift

    @rule(reserve=st.sampled_from([0, 2, 9]))
    def save_and_load(self, reserve: int) -> None:
        saved = self.layer.state_dict()
        self.layer = KasminaLayer(
            self.base, len(self.plain.seeds), layer_id="life", reserve=reserve, config=self.config
        )
        self.layer.load_state_dict(saved)

    @invariant()
    def everything_seen_is_the_same(self) -> None:
        state, seeds = self.layer.state, self.plain.seeds
        rows = [[s.stage, s.blueprint, s.epochs, s.strategy] for s in seeds]
        assert state.rows.tolist() == rows
        assert state.state_tensor.tolist() == rows
        assert state.alphas.tolist() == state.alpha.tolist() == [s.alpha for s in seeds]
        counts = {stage.name: sum(s.stage is stage for s in seeds) for stage in S}
        assert state.get_state_distribution() == {k: n for k, n in counts.items() if n}
        assert state.blended.tolist() == [s.stage in BLENDS and s.blueprint > 0 for s in seeds]
        assert state.holding.tolist() == [s.stage in HOLDS for s in seeds]
        for stage in S:
            ids = [i for i, s in enumerate(seeds) if s.stage is stage]
            assert state.find_seeds_by_state(stage).tolist() == ids

    @invariant()
    def a_seed_says_the_same_of_itself(self) -> None:
        for logical, seed in list(zip(self.layer.seeds, self.plain.seeds, strict=True))[:3]:
            said = logical.get_state()
            assert (said.stage, said.blueprint_id, said.alpha) == (
                seed.stage,
                seed.blueprint,
                seed.alpha,
            )
            assert logical.is_blended == (seed.stage in BLENDS and seed.blueprint > 0)

    @invariant()
    @torch.no_grad()
    def the_output_is_what_the_seeds_say(self) -> None:
        x = torch.tensor([[0.5, -1.5]])
        (y,) = self.layer.base(x).tolist()
        expected = []
        for i, seed in enumerate(self.plain.seeds):
            scale, shift = self.plain.values(seed)
            blends = seed.stage in BLENDS and seed.blueprint > 0
            alpha = seed.alpha if blends else 0.0
            chunk = y[SIZE * i : SIZE * (i + 1)]
            expected += [v + alpha * (scale * v + shift - v) for v in chunk]
        assert self.layer(x)[0].tolist() == pytest.approx(expected, abs=1e-5)


class _Abort(Exception):
    pass


def _outcome(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call's result, or the type of what it raises."""

    def run(*args: Any) -> Any:
        try:
            return call(*args)
        except IllegalTransition:
            return IllegalTransition

    return run


Life.TestCase.settings = settings(max_examples=40, stateful_step_count=30)
TestLife = pytest.mark.untraced(Life.TestCase)

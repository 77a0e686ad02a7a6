"""Chunks, and seeds one by one: what older code gets of them, and what it is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kasmina_fx import KasminaError
from kasmina_fx.compat.chunked import (
    TRANSITIONS,
    ChunkedKasminaLayer,
    ChunkManager,
    ExtendedLifecycle,
    LogicalSeed,
    LogicalSeedState,
    SeedLifecycle,
)
from kasmina_fx.compat.chunked.states import STAGES, STATES, as_state, five_of

S = SeedLifecycle


def test_chunks_have_the_attributes_and_sizes_of_before() -> None:
    chunks = ChunkManager(10, 4)
    assert (chunks.chunk_size, chunks.remainder) == (2, 2)
    assert chunks.chunk_starts.tolist() == [0, 3, 6, 8]
    assert chunks.chunk_ends.tolist() == [3, 6, 8, 10]
    assert [i.tolist() for i in chunks.chunk_indices] == [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]
    assert [chunks.get_chunk_size(i) for i in range(4)] == [3, 3, 2, 2]
    assert chunks.to("cpu") is chunks
    assert chunks.device == torch.device("cpu")


def test_chunks_do_what_they_did() -> None:
    chunks, x = ChunkManager(10, 4), torch.randn(5, 10)
    parts = chunks.split_tensor(x)
    assert all(part.untyped_storage().data_ptr() == x.data_ptr() for part in parts)
    assert torch.equal(chunks.concatenate_chunks(parts), x)
    called = []

    def scaled(part: Tensor, i: int, by: float, *, plus: float) -> Tensor:
        called.append(i)
        return part * by + plus

    assert torch.equal(chunks.apply_to_chunks(x, scaled, 2.0, plus=1.0), x * 2.0 + 1.0)
    assert called == [0, 1, 2, 3]
    mask = chunks.create_chunk_mask(torch.tensor([False, True, False, True]))
    assert mask.tolist() == [False] * 3 + [True] * 3 + [False] * 2 + [True] * 2
    out = chunks.parallel_chunk_operation(x, [None, torch.neg, None, None])
    assert torch.equal(out[:, 3:6], -x[:, 3:6])
    assert torch.equal(out[:, 6:], x[:, 6:])
    means, variances = chunks.get_chunk_statistics(x)
    assert means.shape == variances.shape == (5, 4)
    torch.testing.assert_close(variances[:, 1], x[:, 3:6].var(1, correction=0))


REFUSED: dict[str, tuple[Callable[[ChunkManager], Any], str]] = {
    "another width": (
        lambda c: c.split_tensor(torch.zeros(2, 9)),
        "Expected tensor with last dimension 10, got 9",
    ),
    "too few chunks": (
        lambda c: c.concatenate_chunks([torch.zeros(2, 3)]),
        "Expected 4 chunks, got 1",
    ),
    "no such chunk": (lambda c: c.get_chunk_size(4), "chunk 4"),
    "a negative chunk": (lambda c: c.get_chunk_size(-1), "chunk -1"),
    "a result of another width": (
        lambda c: c.apply_to_chunks(torch.zeros(2, 10), lambda part, i: part[:, :1]),
        "chunk 0 has 1 features, expected 3",
    ),
    "an operation of another width": (
        lambda c: c.parallel_chunk_operation(torch.zeros(2, 10), [lambda p: p[:, :1]] + [None] * 3),
        "chunk 0 has 1 features, expected 3",
    ),
    "too few operations": (lambda c: c.parallel_chunk_operation(torch.zeros(2, 10), []), "got 0"),
    "more chunks than features": (lambda c: ChunkManager(3, 4), "num_chunks=4"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_chunks_refuse_with_a_value_error(what: str) -> None:
    call, text = REFUSED[what]
    with pytest.raises(ValueError, match=text) as found:
        call(ChunkManager(10, 4))
    assert isinstance(found.value, KasminaError)


def test_each_of_the_eleven_is_one_of_the_five_and_back() -> None:
    assert set(STATES) == set(ExtendedLifecycle)
    for five, stage in STAGES.items():
        assert STATES[stage] is five
    assert five_of(torch.arange(11)).tolist() == [STATES[stage] for stage in ExtendedLifecycle]
    for bad in (5, -1, "ACTIVE", None):
        with pytest.raises(ValueError, match="allowed are DORMANT"):
            as_state(bad)


def test_a_snapshot_says_whether_it_is_active_or_at_an_end() -> None:
    found = {state: LogicalSeedState("fc", 0, 0, state, 0, 0, 0) for state in SeedLifecycle}
    assert {s for s, known in found.items() if known.is_active} == {S.LOADING, S.ACTIVE}
    assert {s for s, known in found.items() if known.is_terminal} == {
        S.FOSSILIZED,
        S.ERROR_RECOVERY,
    }
    plain = found[S.LOADING].to_dict()
    assert (plain["lifecycle_state"], plain["lifecycle_value"]) == ("LOADING", 1)


def alone() -> LogicalSeed:
    return LogicalSeed("fc", 2, 2, 3, torch.device("cpu"))


def of_a_layer() -> LogicalSeed:
    layer = ChunkedKasminaLayer(nn.Linear(4, 9), 3, "fc")
    return LogicalSeed.of_layer(layer, 2)


BOTH = pytest.mark.parametrize("make", [alone, of_a_layer])
WAYS: dict[SeedLifecycle, list[SeedLifecycle]] = {
    S.DORMANT: [],
    S.LOADING: [S.LOADING],
    S.ACTIVE: [S.LOADING, S.ACTIVE],
    S.ERROR_RECOVERY: [S.LOADING, S.ERROR_RECOVERY],
    S.FOSSILIZED: [S.LOADING, S.ACTIVE, S.FOSSILIZED],
}


def brought_to(make: Callable[[], LogicalSeed], state: SeedLifecycle) -> LogicalSeed:
    seed = make()
    for step in WAYS[state]:
        assert seed.transition_state(step)
    assert seed.get_state().lifecycle_state is state
    return seed


@BOTH
@pytest.mark.parametrize("state", list(SeedLifecycle))
def test_transitions_are_those_of_the_table(
    make: Callable[[], LogicalSeed], state: SeedLifecycle
) -> None:
    for new in SeedLifecycle:
        seed = brought_to(make, state)
        allowed = new in TRANSITIONS[state]
        assert seed.transition_state(new) is allowed
        assert seed.get_state().lifecycle_state is (new if allowed else state)
        assert seed.get_state().epochs_in_state == 0


def test_the_table_of_transitions() -> None:
    assert {s.name: sorted(t.name for t in to) for s, to in TRANSITIONS.items()} == {
        "DORMANT": ["LOADING"],
        "LOADING": ["ACTIVE", "ERROR_RECOVERY"],
        "ACTIVE": ["ERROR_RECOVERY", "FOSSILIZED"],
        "ERROR_RECOVERY": ["DORMANT"],
        "FOSSILIZED": ["DORMANT"],
    }


@BOTH
@pytest.mark.parametrize(
    ("state", "epochs", "share"),
    [
        (S.DORMANT, 0, 0.0),
        (S.LOADING, 0, 0.0),
        (S.LOADING, 15, 0.5),
        (S.LOADING, 45, 1.0),
        (S.ACTIVE, 0, 1.0),
        (S.ERROR_RECOVERY, 0, 0.0),
        (S.FOSSILIZED, 0, 1.0),
    ],
)
def test_a_chunk_is_blended_by_the_state(
    make: Callable[[], LogicalSeed], state: SeedLifecycle, epochs: int, share: float
) -> None:
    seed, blueprint, chunk = brought_to(make, state), nn.Linear(3, 3), torch.randn(5, 3)
    for _ in range(epochs):
        seed.increment_epoch()
    assert seed.get_state().epochs_in_state == epochs
    chunk.requires_grad_()
    out = seed.process_chunk(chunk, blueprint)
    torch.testing.assert_close(out, (1 - share) * chunk + share * blueprint(chunk))
    out.sum().backward()
    assert chunk.grad is not None  # of a frozen blueprint too
    learns = share > 0 and state is not S.FOSSILIZED
    assert (blueprint.weight.grad is not None and bool(blueprint.weight.grad.any())) == learns


def test_without_a_blueprint_it_is_the_layer_s_own_or_the_identity() -> None:
    chunk = torch.randn(5, 3)
    assert torch.equal(brought_to(alone, S.ACTIVE).process_chunk(chunk), chunk)
    layer = ChunkedKasminaLayer(nn.Linear(4, 9), 3, "fc")
    layer.request_germination(2, "mlp")
    seed = LogicalSeed.of_layer(layer, 2)
    seed.transition_state(S.ACTIVE)
    x = torch.randn(5, 4)
    expected = seed.process_chunk(layer.base_layer(x)[:, 6:])
    torch.testing.assert_close(layer(x)[:, 6:], expected)
    assert not torch.equal(expected, layer.base_layer(x)[:, 6:])


@BOTH
def test_health_is_measured_and_sick_seeds_ask_for_adaptation(
    make: Callable[[], LogicalSeed],
) -> None:
    seed = make()
    assert seed.request_adaptation() is None
    found = seed.compute_health_metrics(torch.zeros(8, 3))
    assert found == {
        "mean": 0.0,
        "std": 0.0,
        "sparsity": 1.0,
        "magnitude": 0.0,
        "health_score": 0.0,
    }
    assert seed.request_adaptation() == {
        "seed_id": 2,
        "chunk_idx": 2,
        "health_score": 0.0,
        "reason": "low_health",
        "urgency": 1.0,
    }
    values = torch.tensor([[1.0, -1.0, 0.0, 0.0]])
    found = seed.compute_health_metrics(values)
    assert found["health_score"] == pytest.approx(0.5 + 0.25)
    assert (found["sparsity"], found["magnitude"]) == pytest.approx((0.5, 2**0.5))
    assert seed.request_adaptation() is None
    seed.compute_health_metrics(torch.ones(4, 1))  # one value, and no NaN
    assert seed.get_state().health_score == 0.5
    seed.transition_state(S.LOADING)
    assert seed.request_adaptation() is None  # it adapts


@BOTH
def test_three_errors_put_it_out_and_a_reset_forgets_them(make: Callable[[], LogicalSeed]) -> None:
    seed = brought_to(make, S.LOADING)
    for count in (1, 2, 3):
        assert seed.get_state().lifecycle_state is S.LOADING
        seed.record_error()
        assert seed.get_state().error_count == count
    assert seed.get_state().lifecycle_state is S.ERROR_RECOVERY
    seed.compute_health_metrics(torch.zeros(2, 3))
    seed.reset()
    state = seed.get_state()
    assert (state.lifecycle_state, state.error_count, state.health_score) == (S.DORMANT, 0, 1.0)
    assert (state.blueprint_id, state.epochs_in_state, state.grafting_strategy) == (0, 0, 0)


def test_a_seed_is_connected_to_the_state_of_its_layer() -> None:
    layer = ChunkedKasminaLayer(nn.Linear(4, 9), 3, "fc")
    seed = LogicalSeed.of_layer(layer, 1)
    blueprint = layer.register_blueprint("lora")
    layer.request_germination(1, "mlp")
    assert seed.get_state().lifecycle_state is S.LOADING
    seed.set_blueprint(blueprint, 1)
    known = layer.state_tensor.get_seed_state(1)
    assert (known["blueprint_id"], known["grafting_strategy"]) == (blueprint, 1)
    assert seed.device == layer.device
    seed.transition_state(S.ACTIVE)
    assert layer.state_tensor.alpha_blend.tolist() == [0.0, 1.0, 0.0]
    one = alone()
    one.set_blueprint(7, 2)
    assert (one.get_state().blueprint_id, one.get_state().grafting_strategy) == (7, 2)


@pytest.mark.parametrize(
    "given", [("fc", -1, 0, 3), ("fc", 0, -1, 3), ("fc", 0, 0, 0), ("fc", "0", 0, 3)]
)
def test_seeds_that_can_t_be_are_refused(given: tuple[Any, ...]) -> None:
    with pytest.raises(KasminaError, match="give an int"):
        LogicalSeed(*given)
    with pytest.raises(ValueError, match="does not exist"):
        LogicalSeed.of_layer(ChunkedKasminaLayer(nn.Linear(4, 9), 3), 3)

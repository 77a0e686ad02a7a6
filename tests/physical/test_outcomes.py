"""The operators that take what blueprints made back to the host: mix and notes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operator_cases import INF, NAN
from outcome_cases import (
    ALPHA,
    BLENDED,
    POSITIONS,
    RAN,
    ROLES,
    SEEDS,
    made,
    mix_arguments,
    notes_arguments,
    of_seed,
)
from torch import Tensor
from torch._inductor.utils import fresh_cache, run_fw_bw_and_get_code

from kasmina_fx._torch.inductor import compile_with_inductor
from kasmina_fx.physical import operators
from kasmina_fx.physical.operators import DECOMPOSITIONS, MIX, NOTES
from kasmina_fx.physical.outcomes import noted

each_mix = pytest.mark.parametrize(
    "mix",
    [MIX, DECOMPOSITIONS[MIX], operators._PLAIN.mix],
    ids=["operator", "decomposition", "plain"],
)
each_notes = pytest.mark.parametrize(
    "notes", [NOTES, DECOMPOSITIONS[NOTES], noted], ids=["operator", "decomposition", "plain"]
)


def mixed_by_hand(host: Tensor, found: list[Tensor]) -> Tensor:
    out = host.clone()
    for seed in BLENDED:
        f, y = of_seed(found, seed), host[:, seed]
        wide = torch.promote_types(torch.promote_types(f.dtype, y.dtype), torch.float32)
        exact, alpha = y.to(wide), ALPHA[seed].to(wide)
        grown = (exact + alpha * (f.to(wide) - exact)).to(y.dtype)
        out[:, seed] = torch.where(grown.isfinite() & f.to(y.dtype).isfinite(), grown, y)
    return out


@each_mix
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("made_in", [torch.float32, torch.bfloat16])
def test_mix_blends_seeds_that_blend_and_leaves_others_to_the_bit(
    mix: Any, dtype: torch.dtype, made_in: torch.dtype
) -> None:
    host, found, *rest = mix_arguments(dtype, made_in)
    with torch.no_grad():
        host[0, 2], host[1, 3], host[2, 3] = -0.0, NAN, INF
        found[0][0, 0, 0], found[0][1, 0, 1], found[1][0, 0, 2, 0] = INF, NAN, 1e38
    out, mixed = mix(host, found, *rest)
    expected = mixed_by_hand(host.detach(), [f.detach() for f in found])
    assert out.dtype == dtype
    assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))
    of_blended = torch.zeros_like(host, dtype=torch.int8)
    of_blended[:, list(BLENDED)] = 1
    of_blended[0, 4] = of_blended[1, 1] = 0
    if dtype == torch.float16:
        of_blended[2, 0, 0] = 0
    assert torch.equal(mixed, of_blended)


def test_banks_may_compute_in_different_dtypes() -> None:
    host, found, *rest = mix_arguments(torch.float32)
    found[1] = found[1].detach().bfloat16().requires_grad_()
    out, _ = MIX(host, found, *rest)
    assert torch.equal(out, mixed_by_hand(host, found))
    grads = torch.autograd.grad(out.sum(), found)
    assert [g.dtype for g in grads] == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_mix_passes_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(MIX, mix_arguments(dtype))


def test_mix_passes_gradcheck() -> None:
    host, found, *rest = mix_arguments()

    def run(host: Tensor, *found: Tensor) -> Tensor:
        out: Tensor = MIX(host, list(found), *rest)[0]
        return out

    assert torch.autograd.gradcheck(run, (host, *found))
    assert torch.autograd.gradgradcheck(run, (host, *found))


def test_what_is_not_blended_sends_the_gradient_back_as_it_came() -> None:
    host, found, *rest = mix_arguments(torch.float32)
    with torch.no_grad():
        found[0][1, 0, 2] = INF  # seed 1's third row
    out, _ = MIX(host, found, *rest)
    grad = torch.randn_like(out)
    grad[0, 2], grad[1, 3], grad[2, 1] = INF, NAN, -0.0
    to_host, *to_made = torch.autograd.grad(out, [host, *found], grad)
    for seed in (2, 3):
        assert torch.equal(to_host[:, seed].view(torch.int32), grad[:, seed].view(torch.int32))
        assert not of_seed(to_made, seed).any()
    for seed in BLENDED:
        expected = grad[:, seed] - grad[:, seed] * ALPHA[seed]
        sent = grad[:, seed] * ALPHA[seed]
        if seed == 1:
            expected[2], sent[2] = grad[2, seed], 0
        assert torch.equal(to_host[:, seed], expected)
        assert torch.equal(of_seed(to_made, seed), sent)
    free = to_made[1][1, 0]
    assert not free.any()


def test_plain_code_has_the_operators_gradients_where_they_are_finite() -> None:
    host, found, *rest = mix_arguments()
    grad = torch.randn_like(host)
    expected = torch.autograd.grad(MIX(host, found, *rest)[0], [host, *found], grad)
    plain = operators._PLAIN.mix(host, found, *rest)[0]
    for a, b in zip(torch.autograd.grad(plain, [host, *found], grad), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_gradient_that_is_nan_stays_so_for_the_host() -> None:
    host, found, *rest = mix_arguments(torch.float32)
    out, _ = MIX(host, found, *rest)
    grad = torch.ones_like(out)
    grad[0, 0], grad[1, 0] = NAN, INF
    (to_host,) = torch.autograd.grad(out, host, grad)
    assert to_host[:2, 0].isnan().all()  # Inf - alpha * Inf
    assert to_host[2, 0].tolist() == [0.5, 0.5]


@each_mix
def test_a_host_keeps_its_memory_format(mix: Any) -> None:
    images = torch.randn(2, 10, 3, 3).to(memory_format=torch.channels_last)
    host = images.unflatten(1, (5, 2))
    found = made(torch.float32, (2, 2, 3, 3))
    out, mixed = mix(host, found, RAN, POSITIONS, SEEDS, ALPHA, ROLES, -4)
    assert out.stride() == mixed.stride() == host.stride()
    straight, _ = MIX(host.contiguous(), found, RAN, POSITIONS, SEEDS, ALPHA, ROLES, -4)
    assert torch.equal(out, straight)


def test_inductor_keeps_no_bool_of_the_hosts_size_and_copies_no_product_s_operand() -> None:
    # It takes 30 times as long to store as an int8 on a CPU (torch 2.13).
    seeds, rows = torch.arange(8), 16
    index, weight = seeds.view(8, 1), torch.randn(8, 20, 20, requires_grad=True)
    alpha, roles, ran = torch.full((8,), 0.5), torch.full((8,), 2), torch.ones(8).bool()

    def step(y: Tensor) -> Tensor:
        host = y.view(rows, 8, 20)
        taken = torch.ops.kasmina.gather.default(host, index, seeds, -2)
        f = torch.bmm(taken.view(8, rows, 20), weight.mT).view(8, 1, rows, 20)
        out, _ = MIX(host, [f], [ran], [seeds], [index], alpha, roles, -2)
        total: Tensor = torch.nn.functional.gelu(out).sum()
        return total

    y = torch.randn(rows, 160, requires_grad=True)

    def backend(gm: Any, inputs: Any) -> Any:
        return compile_with_inductor(gm, inputs, {}, DECOMPOSITIONS, "test_outcomes")

    with fresh_cache():
        _, codes = run_fw_bw_and_get_code(lambda: torch.compile(step, backend=backend)(y))
    assert len(codes) == 2
    for code in codes:
        assert f"({rows}, 8, 20), (160, 20, 1), torch.bool" not in code
        assert "empty_strided_cpu((8, 20, 20)" not in code.split("extern_kernels.bmm")[0]
    assert f"({rows}, 8, 20), (160, 20, 1), torch.int8" in codes[0]


@each_notes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_notes_say_of_each_seed_what_its_blueprint_did(notes: Any, dtype: torch.dtype) -> None:
    found, rows, *rest = notes_arguments(dtype)
    found = [f.detach() for f in found]
    with torch.no_grad():
        found[0][0, 0, 0, 0] = NAN  # seed 4: faulty
        rows[0][1, 0, 0, 0] = INF  # seed 1: its chunk is not finite, so that nobody is at fault
    said = notes(found, rows, *rest)
    assert said.dtype == torch.float32
    losses = [
        (of_seed(found, seed).double() - of_seed(rows, seed).double()).square().mean()
        for seed in (0, 2)
    ]
    expected = [
        [0, 0, 0, 1, 1],
        [float(losses[0]), -1, float(losses[1]), -1, -1],
        [0.25 * float(losses[0]), 0, 0, 0, 0],
    ]
    torch.testing.assert_close(said, torch.tensor(expected), rtol=1e-2, atol=1e-6)


@each_notes
def test_what_does_not_fit_the_hosts_dtype_is_a_fault(notes: Any) -> None:
    found, rows, *rest = notes_arguments(torch.float32)
    with torch.no_grad():
        found[0][1, 0, 0, 0] = 1e6
    assert notes(found, rows, *rest)[0].tolist() == [0, 0, 0, 1, 0]
    halves = [r.half() for r in rows]
    assert notes(found, halves, *rest)[0].tolist() == [0, 1, 0, 1, 0]


@each_notes
def test_seeds_that_no_bank_holds_have_nothing_said_of_them(notes: Any) -> None:
    found, rows, ran, positions, *rest = notes_arguments(torch.float32)
    said = notes(found[:1], rows[:1], ran[:1], positions[:1], *rest)
    assert said[:, [0, 2, 3]].tolist() == [[0] * 3, [-1] * 3, [0] * 3]
    assert (said[1, [1, 4]] > 0).all()


def test_a_loss_may_be_too_large_for_float32_and_is_no_fault() -> None:
    found, rows, *rest = notes_arguments(torch.float32)
    with torch.no_grad():
        found[0][1] = 1e30
    said = NOTES(found, rows, *rest)
    assert said[:, 1].tolist() == [0, INF, INF]


def test_notes_pass_opcheck_and_send_nothing_back() -> None:
    found, rows, *rest = notes_arguments(torch.float32)
    torch.library.opcheck(NOTES, (found, rows, *rest))
    assert not NOTES(found, rows, *rest).requires_grad

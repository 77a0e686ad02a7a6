"""The kernel behind a backward: sums of parts become gradients of stacks, all in one launch."""

import triton
import triton.language as tl

#: See :mod:`kasmina_fx.lowerings.triton.two_layer`.
WRITES = {
    "finish": {
        "blame": None,
        "d1": None,
        "d2": None,
        **{f"d{number}": f"N{number}" for number in (3, 4, 5, 6)},
    }
}


@triton.jit
def finish(
    sums, seeds, positions, loss_scale, blame, d1, d2, d3, d4, d5, d6,
    count, capacity, slots, places, splits,
    N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, N4: tl.constexpr, N5: tl.constexpr,
    N6: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    SEEDS: tl.constexpr,
):  # fmt: skip
    """Add what programs and places found for a slot; refuse all of it where it is not finite.

    ``d1`` to ``d6`` are the gradients of the stacks, ``(capacity, N)`` each, and ``blame``
    ``(count,)`` says whose blueprint's fault something was that is not finite. Every number of
    them is written.
    """
    inf = float("inf")
    B3: tl.constexpr = N1 + N2  # where the numbers of the third begin
    B4: tl.constexpr = B3 + N3
    B5: tl.constexpr = B4 + N4
    B6: tl.constexpr = B5 + N5
    slot = tl.program_id(0)
    # A bank has slots that no table reaches yet; those have no place, and no gradient.
    last = tl.minimum(slot + 1, slots) * places
    fault, refused, unsound = 0, 0.0, 0.0
    for first in range(0, P, BLOCK):
        e = first + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for place in range(slot * places, last):
            seed = tl.load(seeds + place + tl.zeros([PARTS], tl.int64))
            for split in range(0, splits, PARTS):
                part = (split + tl.arange(0, PARTS)).to(tl.int64)
                there = sums + (place * splits + part)[:, None] * P + e[None, :]
                counts = ((seed >= 0) & (part < splits))[:, None] & (e < P)[None, :]
                total += tl.sum(tl.load(there, mask=counts, other=0.0), 0)
        refused += tl.sum(tl.where(e == P - 2, total, 0.0))
        unsound += tl.sum(tl.where(e == P - 1, total, 0.0))
        total = tl.where(e < P - 2, total, 0.0)
        total = total.to(d1.dtype.element_ty)
        fault += tl.sum((~(tl.abs(total.to(tl.float32)) < inf)).to(tl.int32))
        tl.store(d1 + slot * N1 + e, total, mask=e < N1)
        tl.store(d2 + slot * N2 + e - N1, total, mask=(e >= N1) & (e < N1 + N2))
        if N3 > 0:
            tl.store(d3 + slot * N3 + e - B3, total, mask=(e >= B3) & (e < B4))
        if N4 > 0:
            tl.store(d4 + slot * N4 + e - B4, total, mask=(e >= B4) & (e < B5))
        if N5 > 0:
            tl.store(d5 + slot * N5 + e - B5, total, mask=(e >= B5) & (e < B6))
        if N6 > 0:
            tl.store(d6 + slot * N6 + e - B6, total, mask=(e >= B6) & (e < P - 2))
    if fault > 0:
        for first in range(0, P - 2, BLOCK):
            e = first + tl.arange(0, BLOCK)
            nothing = tl.zeros([BLOCK], tl.float32)
            tl.store(d1 + slot * N1 + e, nothing, mask=e < N1)
            tl.store(d2 + slot * N2 + e - N1, nothing, mask=(e >= N1) & (e < N1 + N2))
            if N3 > 0:
                tl.store(d3 + slot * N3 + e - B3, nothing, mask=(e >= B3) & (e < B4))
            if N4 > 0:
                tl.store(d4 + slot * N4 + e - B4, nothing, mask=(e >= B4) & (e < B5))
            if N5 > 0:
                tl.store(d5 + slot * N5 + e - B5, nothing, mask=(e >= B5) & (e < B6))
            if N6 > 0:
                tl.store(d6 + slot * N6 + e - B6, nothing, mask=(e >= B6) & (e < P - 2))
    # An overflow in the backward of a scaled loss is how a GradScaler finds its scale.
    mine = (unsound == 0) & (tl.load(loss_scale) == 1) & ((refused > 0) | (fault > 0))
    for place in range(slot * places, last):
        seed = tl.load(seeds + place)
        tl.store(blame + seed, mine.to(tl.float32), mask=seed >= 0)
    for first in range(slot * SEEDS, count, capacity * SEEDS):
        seed = first + tl.arange(0, SEEDS)
        alone = tl.load(positions + seed, mask=seed < count, other=0) < 0
        tl.store(blame + seed, tl.zeros([SEEDS], tl.float32), mask=(seed < count) & alone)

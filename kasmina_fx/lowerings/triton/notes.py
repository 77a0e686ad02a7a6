"""Kernels that put together what is said of seeds: a blend's notes, and statistics of an output."""

import triton
import triton.language as tl

#: See :mod:`kasmina_fx.lowerings.triton.two_layer`.
WRITES = {
    "report": {"notes": None},
    "observe": {"telemetry": None},
    "observe_together": {f"telemetry{layer}": None for layer in range(4)},
}


@triton.jit
def report(
    said, before, notes, positions, alpha, roles, first_seed, count, rows, parts,
    c: tl.constexpr, TOGETHER: tl.constexpr, CHAINED: tl.constexpr,
    SEEDS: tl.constexpr,
):  # fmt: skip
    """Sum what parts of the rows said; seeds of other banks keep what ``before`` says of them."""
    seed = tl.program_id(0) * SEEDS + tl.arange(0, SEEDS)
    there = seed < count
    ran = tl.load(positions + seed, mask=there, other=-1) >= 0
    ran = ran & (tl.zeros([SEEDS], tl.int32) < rows)  # nothing is known of an empty batch
    blends = tl.load(roles + first_seed + seed, mask=there, other=0) == 2
    a = tl.load(alpha + first_seed + seed, mask=there, other=0.0)
    squares, wrong = tl.zeros([SEEDS], tl.float32), tl.zeros([SEEDS], tl.float32)
    unsound = tl.zeros([SEEDS], tl.float32)
    for first in range(0, parts, TOGETHER):
        part = first + tl.arange(0, TOGETHER)
        at = (part * 3 * count)[:, None] + seed[None, :]
        asked = (part < parts)[:, None] & (there & ran)[None, :]
        squares += tl.sum(tl.load(said + at, mask=asked, other=0.0), 0)
        wrong += tl.sum(tl.load(said + at + count, mask=asked, other=0.0), 0)
        unsound += tl.sum(tl.load(said + at + 2 * count, mask=asked, other=0.0), 0)
    loss = squares / (1.0 * tl.maximum(rows, 1) * c)
    faulty = tl.where((wrong > 0) & (unsound == 0), 1.0, 0.0)
    added = tl.where((wrong == 0) & blends, a * a * loss, 0.0)
    loss = tl.where(wrong == 0, loss, -1.0)
    old_faulty, old_loss, old_added = (
        tl.zeros_like(loss),
        tl.zeros_like(loss) - 1,
        tl.zeros_like(loss),
    )
    if CHAINED:
        old_faulty = tl.load(before + seed, mask=there, other=0.0)
        old_loss = tl.load(before + count + seed, mask=there, other=0.0)
        old_added = tl.load(before + 2 * count + seed, mask=there, other=0.0)
    tl.store(notes + seed, tl.where(ran, faulty, old_faulty), mask=there)
    tl.store(notes + count + seed, tl.where(ran, loss, old_loss), mask=there)
    tl.store(notes + 2 * count + seed, tl.where(ran, added, old_added), mask=there)


@triton.jit
def merge(
    program, telemetry, y, notes, features, offset, first_seed, count, num_seeds, rows, seen,
    c: tl.constexpr, SEEDS: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, EVEN: tl.constexpr, NOTES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Merge one step's statistics of a run's chunks; see :mod:`kasmina_fx.physical.statistics`.

    A program reads the columns of ``SEEDS`` seeds, from the last multiple of ``EVEN`` before them,
    so that rows of any chunk size are loaded ``EVEN`` features at a time. Sums are taken around the
    first element of a chunk that is looked at.
    """
    inf = float("inf")
    first = program * SEEDS
    begins = offset + first * c
    col = begins // EVEN * EVEN + tl.arange(0, TILE)
    member = (col - offset) // c - first
    on = (col >= begins) & (member < SEEDS) & (first + member < count)
    on = on & (tl.zeros([TILE], tl.int32) < seen)  # of a batch without rows nothing may be read
    start = tl.load(y + offset + (first + member) * c, mask=on, other=0.0).to(tl.float32)
    s1, s2 = tl.zeros([ROWS, TILE], tl.float32), tl.zeros([ROWS, TILE], tl.float32)
    low = tl.full([ROWS, TILE], float("inf"), tl.float32)
    high, near = -low, tl.zeros([ROWS, TILE], tl.float32)
    divisor = tl.maximum(seen, 1)
    step, rest = rows // divisor, rows % divisor
    for block in range(0, seen, ROWS):
        number = block + tl.arange(0, ROWS)
        if WIDE:
            number = number.to(tl.int64)
        row = number.to(tl.int64) * step + number * rest // seen + number % step
        here = (number < seen)[:, None] & (col < features)[None, :]
        z = tl.load(y + row[:, None] * features + col[None, :], mask=here, other=0.0).to(tl.float32)
        here = here & on[None, :]
        q = tl.where(here, z - start[None, :], 0.0)
        s1 += q
        s2 += q * q
        low, high = tl.where(here & (z < low), z, low), tl.where(here & (z > high), z, high)
        near += tl.where(here & (tl.abs(z) < 1e-6), 1.0, 0.0)
    mine = (member[:, None] == tl.arange(0, PADDED)[None, :]) & on[:, None]
    first_moment = tl.sum(tl.where(mine, tl.sum(s1, 0)[:, None], 0.0), 0)
    squares = tl.sum(tl.where(mine, tl.sum(s2, 0)[:, None], 0.0), 0)
    step_low = tl.min(tl.where(mine, tl.min(low, 0)[:, None], inf), 0)
    step_high = tl.max(tl.where(mine, tl.max(high, 0)[:, None], -inf), 0)
    step_near = tl.sum(tl.where(mine, tl.sum(near, 0)[:, None], 0.0), 0)
    seed = first + tl.arange(0, PADDED)
    there = (seed < count) & (tl.arange(0, PADDED) < SEEDS)
    there = there & (tl.zeros([PADDED], tl.int32) < seen)
    begin = tl.load(y + offset + seed * c, mask=there, other=0.0).to(tl.float32)
    elements = 1.0 * divisor * c
    step_mean = first_moment / elements
    spread = squares - first_moment * step_mean
    spread = tl.where(spread < 0, 0.0, spread)
    finite = tl.abs(begin + spread) < inf
    t = telemetry + first_seed + seed
    before = tl.load(t, mask=there, other=0.0)
    mean = tl.load(t + num_seeds, mask=there, other=0.0)
    deviations = tl.load(t + 2 * num_seeds, mask=there, other=0.0)
    origin = tl.load(t + 3 * num_seeds, mask=there, other=0.0)
    minimum = tl.load(t + 4 * num_seeds, mask=there, other=0.0)
    maximum = tl.load(t + 5 * num_seeds, mask=there, other=0.0)
    zeros = tl.load(t + 6 * num_seeds, mask=there, other=0.0)
    bad = tl.load(t + 7 * num_seeds, mask=there, other=0.0)
    phase = tl.load(t + 8 * num_seeds, mask=there, other=0.0)
    every = tl.load(t + 9 * num_seeds, mask=there, other=0.0)
    due = phase == 0
    merged = there & due & finite
    nothing = before == 0
    origin = tl.where(nothing, begin, origin)
    total = before + elements
    delta = (begin - origin) + step_mean - mean
    shift = delta * (elements / total)
    tl.store(t, total, mask=merged)
    tl.store(t + num_seeds, mean + shift, mask=merged)
    tl.store(t + 2 * num_seeds, deviations + spread + delta * shift * before, mask=merged)
    tl.store(t + 3 * num_seeds, origin, mask=merged)
    tl.store(
        t + 4 * num_seeds, tl.where(nothing | (step_low < minimum), step_low, minimum), mask=merged
    )
    tl.store(
        t + 5 * num_seeds,
        tl.where(nothing | (step_high > maximum), step_high, maximum),
        mask=merged,
    )
    tl.store(t + 6 * num_seeds, zeros + step_near, mask=merged)
    tl.store(t + 7 * num_seeds, bad + 1, mask=there & due & ~finite)
    tl.store(t + 8 * num_seeds, tl.where(phase + 1 >= every, 0.0, phase + 1), mask=there)
    if NOTES:
        told = notes + first_seed + seed
        rejected = tl.load(t + 10 * num_seeds, mask=there, other=0.0)
        runs = tl.load(t + 11 * num_seeds, mask=there, other=0.0)
        losses = tl.load(t + 12 * num_seeds, mask=there, other=0.0)
        deltas = tl.load(t + 13 * num_seeds, mask=there, other=0.0)
        loss = tl.load(told + num_seeds, mask=there, other=-1.0)
        ran = (loss >= 0) & (loss < inf)
        weight = tl.where(runs == 0, 1.0, 0.1)
        new = tl.load(told + 2 * num_seeds, mask=there, other=0.0)
        tl.store(t + 10 * num_seeds, rejected + tl.load(told, mask=there, other=0.0), mask=there)
        tl.store(t + 11 * num_seeds, runs + 1, mask=there & ran)
        tl.store(t + 12 * num_seeds, losses + weight * (loss - losses), mask=there & ran)
        tl.store(t + 13 * num_seeds, deltas + weight * (new - deltas), mask=there & ran)


@triton.jit
def observe(
    telemetry, y, notes, features, offset, first_seed, count, num_seeds, rows, seen,
    c: tl.constexpr, SEEDS: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, EVEN: tl.constexpr, NOTES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Merge the statistics of one layer."""
    merge(
        tl.program_id(0), telemetry, y, notes, features, offset, first_seed, count, num_seeds,
        rows, seen, c, SEEDS, PADDED, TILE, ROWS, EVEN, NOTES, WIDE,
    )  # fmt: skip


@triton.jit
def observe_together(
    telemetry0, y0, notes0, features0, offset0, first_seed0, count0, num_seeds0,
    rows0, seen0, c0: tl.constexpr, SEEDS0: tl.constexpr, PADDED0: tl.constexpr,
    TILE0: tl.constexpr, ROWS0: tl.constexpr, EVEN0: tl.constexpr, NOTES0: tl.constexpr,
    WIDE0: tl.constexpr,
    telemetry1, y1, notes1, features1, offset1, first_seed1, count1, num_seeds1,
    rows1, seen1, c1: tl.constexpr, SEEDS1: tl.constexpr, PADDED1: tl.constexpr,
    TILE1: tl.constexpr, ROWS1: tl.constexpr, EVEN1: tl.constexpr, NOTES1: tl.constexpr,
    WIDE1: tl.constexpr,
    telemetry2, y2, notes2, features2, offset2, first_seed2, count2, num_seeds2,
    rows2, seen2, c2: tl.constexpr, SEEDS2: tl.constexpr, PADDED2: tl.constexpr,
    TILE2: tl.constexpr, ROWS2: tl.constexpr, EVEN2: tl.constexpr, NOTES2: tl.constexpr,
    WIDE2: tl.constexpr,
    telemetry3, y3, notes3, features3, offset3, first_seed3, count3, num_seeds3,
    rows3, seen3, c3: tl.constexpr, SEEDS3: tl.constexpr, PADDED3: tl.constexpr,
    TILE3: tl.constexpr, ROWS3: tl.constexpr, EVEN3: tl.constexpr, NOTES3: tl.constexpr,
    WIDE3: tl.constexpr,
):  # fmt: skip
    """Merge the statistics of four layers: programs of one after those of the other."""
    first = (count0 + SEEDS0 - 1) // SEEDS0
    second = first + (count1 + SEEDS1 - 1) // SEEDS1
    third = second + (count2 + SEEDS2 - 1) // SEEDS2
    program = tl.program_id(0)
    if program < first:
        merge(
            program, telemetry0, y0, notes0, features0, offset0, first_seed0, count0,
            num_seeds0, rows0, seen0, c0, SEEDS0, PADDED0, TILE0, ROWS0, EVEN0, NOTES0, WIDE0,
        )  # fmt: skip
    elif program < second:
        merge(
            program - first, telemetry1, y1, notes1, features1, offset1, first_seed1, count1,
            num_seeds1, rows1, seen1, c1, SEEDS1, PADDED1, TILE1, ROWS1, EVEN1, NOTES1, WIDE1,
        )  # fmt: skip
    elif program < third:
        merge(
            program - second, telemetry2, y2, notes2, features2, offset2, first_seed2, count2,
            num_seeds2, rows2, seen2, c2, SEEDS2, PADDED2, TILE2, ROWS2, EVEN2, NOTES2, WIDE2,
        )  # fmt: skip
    else:
        merge(
            program - third, telemetry3, y3, notes3, features3, offset3, first_seed3, count3,
            num_seeds3, rows3, seen3, c3, SEEDS3, PADDED3, TILE3, ROWS3, EVEN3, NOTES3, WIDE3,
        )  # fmt: skip

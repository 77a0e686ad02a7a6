"""Kernels that pass over whole rows, for the blueprint ``affine``, and what follows the layer.

Programs are as in :mod:`kasmina_fx.lowerings.triton.rows_two_layer`. Elements never meet, so
nothing is ever computed again.
"""

import triton
import triton.language as tl

from kasmina_fx.lowerings.triton.shared import activated, blame, columns, say, sent_back

#: See :mod:`kasmina_fx.lowerings.triton.two_layer`.
WRITES = {
    "forward": {"out": None, "said": "NOTES"},
    "backward": {"dy": None, "sums": None},
}


@triton.jit
def parameters(
    scale, shift, slot, member, on,
    c: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Return a tile's scales and shifts, 0 and 0 of seeds with one not finite, and who these are.

    A feature where no seed runs keeps its value: its scale is 1.
    """
    inf = float("inf")
    i = tl.arange(0, TILE)
    gain = tl.load(scale + slot * c + i % c, mask=on, other=1.0).to(tl.float32)
    more = tl.load(shift + slot * c + i % c, mask=on, other=0.0).to(tl.float32)
    ill = (~(tl.abs(gain) < inf) | ~(tl.abs(more) < inf)).to(tl.int32)
    sick = tl.max(tl.where(member[:, None] == member[None, :], ill[None, :], 0), 1)
    return tl.where(sick > 0, 0.0, gain), tl.where(sick > 0, 0.0, more), sick


@triton.jit
def forward(
    y, out, said, positions, alpha, roles, _seeds, _modes, _loss_scale,
    scale, shift,
    features, offset, first_seed, count, places, rows, seen, splits, left,
    c: tl.constexpr, PER: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    NOTES: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, THEN: tl.constexpr,
    SAMPLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Blend and activate all features; of ``seen`` rows, which are all unless SAMPLE."""
    inf = float("inf")
    FAST: tl.constexpr = y.dtype.element_ty != tl.float32
    tile, split = tl.program_id(0) - left, tl.program_id(1)
    col, there, seed, place = columns(positions, tile, offset, count, features, c, PER, TILE, EVEN)
    member, on = tl.arange(0, TILE) // c, place >= 0
    gain, more, sick = parameters(scale, shift, place // places, member, on, c, TILE)
    a = tl.load(alpha + first_seed + seed, mask=on, other=0.0)
    blends = tl.load(roles + first_seed + seed, mask=on, other=0) == 2
    blends = blends & (sick == 0)
    squares = tl.zeros([ROWS, TILE], tl.float32)
    wrongs = tl.zeros([ROWS, TILE], tl.float32)
    unsounds = tl.zeros([ROWS, TILE], tl.float32)
    step, rest = rows // seen, rows % seen
    for block in tl.range(split, tl.cdiv(seen, ROWS), splits, num_stages=STAGES):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        here = (row < seen)[:, None]
        if not WHOLE:
            here = here & there[None, :]
        source = row
        if SAMPLE:
            source = row * step + row * rest // seen + row % step
        raw = tl.load(y + source[:, None] * features + col[None, :], mask=here, other=0.0)
        z = raw.to(tl.float32)
        f = z * gain[None, :] + more[None, :]
        delta = f - z
        grown = (z + a[None, :] * delta).to(raw.dtype).to(tl.float32)
        fits = tl.abs(f.to(raw.dtype).to(tl.float32)) < inf
        fine = fits & (tl.abs(grown) < inf) & blends[None, :]
        ended = activated(tl.where(fine, grown, z), THEN, FAST).to(raw.dtype)
        tl.store(out + row[:, None] * features + col[None, :], ended, mask=here)
        if NOTES:
            fits = fits & (tl.abs(delta) < inf)
            squares += tl.where(fits & here, delta * delta, 0.0)
            wrongs += tl.where(~fits & here, 1.0, 0.0)
            unsounds += tl.where(~(tl.abs(z) < inf) & here, 1.0, 0.0)
    if NOTES:
        wrong = tl.sum(wrongs, 0) + sick.to(tl.float32)
        squared, unsound = tl.sum(squares, 0), tl.sum(unsounds, 0)
        say(said, positions, tile, split, count, squared, wrong, unsound, member, on, PER)


@triton.jit
def backward(
    dout, y, dy, sums, positions, alpha, roles, modes, loss_scale, scale, shift,
    features, offset, first_seed, count, places, rows, splits, left,
    c: tl.constexpr, PER: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr,
    EVEN: tl.constexpr, WHOLE: tl.constexpr, THEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write the gradient of ``y`` and sum those of the slots."""
    inf = float("inf")
    FAST: tl.constexpr = y.dtype.element_ty != tl.float32
    tile, split = tl.program_id(0) - left, tl.program_id(1)
    col, there, seed, place = columns(positions, tile, offset, count, features, c, PER, TILE, EVEN)
    i = tl.arange(0, TILE)
    member, on = i // c, place >= 0
    gain, more, sick = parameters(scale, shift, place // places, member, on, c, TILE)
    a = tl.load(alpha + first_seed + seed, mask=on, other=0.0)
    blends = tl.load(roles + first_seed + seed, mask=on, other=0) == 2
    mode = tl.load(modes + place, mask=on, other=0)
    blends, trains = blends & (sick == 0), (mode == 2) & (sick == 0)
    weight = 2.0 * tl.load(loss_scale) / (1.0 * rows * c)  # of the mean of squared errors
    g1, g2 = tl.zeros([ROWS, TILE], tl.float32), tl.zeros([ROWS, TILE], tl.float32)
    flags = tl.zeros([ROWS, TILE], tl.int32)  # 1: something was refused; 2: a chunk is not finite
    for block in tl.range(split, tl.cdiv(rows, ROWS), splits, num_stages=STAGES):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        here = (row < rows)[:, None]
        if not WHOLE:
            here = here & there[None, :]
        at = row[:, None] * features + col[None, :]
        raw = tl.load(y + at, mask=here, other=0.0)
        came = tl.load(dout + at, mask=here, other=0.0)
        z = raw.to(tl.float32)
        f = z * gain[None, :] + more[None, :]
        delta = f - z
        grown = (z + a[None, :] * delta).to(raw.dtype).to(tl.float32)
        fits = tl.abs(f.to(raw.dtype).to(tl.float32)) < inf
        blended = fits & (tl.abs(grown) < inf) & blends[None, :]
        dz = sent_back(came.to(tl.float32), tl.where(blended, grown, z), THEN, FAST)
        error = tl.where(fits & (tl.abs(delta) < inf) & trains[None, :], delta, 0.0) * weight
        df = tl.where(blended & (tl.abs(dz) < inf), a[None, :] * dz, error)
        df = tl.where(here, df, 0.0)
        dx = df * gain[None, :]
        sent = tl.abs(dx) < inf
        direct = tl.where(blended, dz - a[None, :] * dz, dz)
        total = direct + tl.where(sent & blends[None, :], dx, 0.0)
        tl.store(dy + at, total.to(came.dtype), mask=here)
        g1 += df * z
        g2 += df
        flags |= tl.where(here & ~sent, 1, 0) | tl.where(here & ~(tl.abs(z) < inf), 2, 0)
    base, row_of = sums + split * P, splits * P
    to = base + place * row_of + i % c
    tl.store(to, tl.where(mode > 0, tl.sum(g1, 0), 0.0), mask=on)
    tl.store(to + c, tl.where(mode > 0, tl.sum(g2, 0), 0.0), mask=on)
    no, bad = tl.max(flags & 1, 0).to(tl.float32), tl.max(flags & 2, 0).to(tl.float32)
    blame(base, positions, tile, count, no, bad, member, on, row_of, PER, P)

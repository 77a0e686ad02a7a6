"""Kernels for the blueprint ``affine``: ``x * scale + shift``.

A program handles the chunks of ``PER`` active seeds, and every R-th block of rows; the rest is as
in :mod:`kasmina_fx.lowerings.triton.two_layer`. Elements never meet, so no block is computed twice.
"""

import triton
import triton.language as tl

from kasmina_fx.lowerings.triton.chunks import (
    blame,
    blending,
    blocks_of,
    columns,
    columns_kept,
    say,
)

#: See :mod:`kasmina_fx.lowerings.triton.two_layer`.
WRITES = {
    "forward": {"out": None, "kept": "KEEP", "said": "NOTES"},
    "backward": {"dy": None, "sums": None},
}


@triton.jit
def forward(
    out, kept, said, order, seeds, alpha, roles, _positions, _modes, _loss_scale,
    scale, shift,
    features, offset, first_seed, count, places, rows,
    c: tl.constexpr, PER: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    KEEP: tl.constexpr, NOTES: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Blend in place; put what was there aside in ``kept``, and what happened in ``said``."""
    inf = float("inf")
    split, splits, active = tl.program_id(1), tl.num_programs(1), tl.num_programs(0) * PER
    i = tl.arange(0, TILE)
    member = i // c
    at = tl.program_id(0) * PER + member
    place = tl.load(order + at, mask=(member < PER) & (at < active), other=-1)
    on = place >= 0
    seed = tl.load(seeds + place, mask=on, other=0)
    slot = place // places
    col = columns(seed, offset, c, TILE, EVEN)
    beside = columns_kept(member, c, PER, TILE, EVEN)
    _, a, blends = blending(alpha, roles, first_seed, seed, place)
    gain = tl.load(scale + slot * c + i % c, mask=on, other=0.0).to(tl.float32)
    more = tl.load(shift + slot * c + i % c, mask=on, other=0.0).to(tl.float32)
    ill = (~(tl.abs(gain) < inf) | ~(tl.abs(more) < inf)).to(tl.int32)
    sick = tl.max(tl.where(member[:, None] == member[None, :], ill[None, :], 0), 1)
    blends = blends & (sick == 0)
    squares = tl.zeros([ROWS, TILE], tl.float32)
    wrong = tl.zeros([ROWS, TILE], tl.float32)
    unsound = tl.zeros([ROWS, TILE], tl.float32)
    blocks = blocks_of(place, rows, ROWS)[0]
    for block in range(split, blocks, splits):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        here = (row < rows)[:, None] & on[None, :]
        where = out + row[:, None] * features + col[None, :]
        raw = tl.load(where, mask=here, other=0.0)
        if KEEP:
            aside = kept + row[:, None] * (active * c) + beside[None, :]
            tl.store(aside, raw, mask=here)
        z = raw.to(tl.float32)
        f = z * gain[None, :] + more[None, :]
        delta = f - z
        grown = (z + a[None, :] * delta).to(raw.dtype)
        fits = tl.abs(f.to(raw.dtype).to(tl.float32)) < inf
        fine = fits & (tl.abs(grown.to(tl.float32)) < inf)
        tl.store(where, grown, mask=here & fine & blends[None, :])
        if NOTES:
            fits = fits & (tl.abs(delta) < inf)
            squares += tl.where(fits & here, delta * delta, 0.0)
            wrong += tl.where(~fits & here, 1.0, 0.0)
            unsound += tl.where(~(tl.abs(z) < inf) & here, 1.0, 0.0)
    if NOTES:
        squared, wrongs = tl.sum(squares, 0), tl.sum(wrong, 0) + sick.to(tl.float32)
        unsounds = tl.sum(unsound, 0)
        say(
            said, order, seeds, active, split, count, squared, wrongs, unsounds, member, on, True,
            PER,
        )  # fmt: skip


@triton.jit
def backward(
    dy, sums, kept, order, seeds, alpha, roles, modes, loss_scale, scale, shift,
    features, offset, first_seed, places, rows,
    c: tl.constexpr, PER: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Change the gradient of the output into that of ``y`` in place; sum those of the slots."""
    inf = float("inf")
    split, splits, active = tl.program_id(1), tl.num_programs(1), tl.num_programs(0) * PER
    i = tl.arange(0, TILE)
    member = i // c
    at = tl.program_id(0) * PER + member
    place = tl.load(order + at, mask=(member < PER) & (at < active), other=-1)
    on = place >= 0
    seed = tl.load(seeds + place, mask=on, other=0)
    slot = place // places
    col = columns(seed, offset, c, TILE, EVEN)
    beside = columns_kept(member, c, PER, TILE, EVEN)
    _, a, blends = blending(alpha, roles, first_seed, seed, place)
    mode = tl.load(modes + place, mask=on, other=0)
    gain = tl.load(scale + slot * c + i % c, mask=on, other=0.0).to(tl.float32)
    more = tl.load(shift + slot * c + i % c, mask=on, other=0.0).to(tl.float32)
    ill = (~(tl.abs(gain) < inf) | ~(tl.abs(more) < inf)).to(tl.int32)
    sick = tl.max(tl.where(member[:, None] == member[None, :], ill[None, :], 0), 1)
    gain, more = tl.where(sick > 0, 0.0, gain), tl.where(sick > 0, 0.0, more)
    blends, trains = blends & (sick == 0), (mode == 2) & (sick == 0)
    weight = 2.0 * tl.load(loss_scale) / (1.0 * rows * c)  # of the mean of squared errors
    g1, g2 = tl.zeros([ROWS, TILE], tl.float32), tl.zeros([ROWS, TILE], tl.float32)
    flags = tl.zeros([ROWS, TILE], tl.int32)  # 1: something was refused; 2: a chunk is not finite
    blocks = blocks_of(place, rows, ROWS)[0]
    for block in range(split, blocks, splits):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        here = (row < rows)[:, None] & on[None, :]
        where = dy + row[:, None] * features + col[None, :]
        aside = kept + row[:, None] * (active * c) + beside[None, :]
        raw = tl.load(aside, mask=here, other=0.0)
        came = tl.load(where, mask=here, other=0.0)
        z, dz = raw.to(tl.float32), came.to(tl.float32)
        made = z * gain[None, :] + more[None, :]
        grown = (z + a[None, :] * (made - z)).to(raw.dtype).to(tl.float32)
        fits = tl.abs(made.to(raw.dtype).to(tl.float32)) < inf
        blend = fits & (tl.abs(grown) < inf) & blends[None, :]
        error = tl.where(fits & (tl.abs(made - z) < inf) & trains[None, :], made - z, 0.0) * weight
        df = tl.where(blend & (tl.abs(dz) < inf), a[None, :] * dz, error)
        df = tl.where(here, df, 0.0)
        dx = df * gain[None, :]
        sent = tl.abs(dx) < inf
        direct = tl.where(blend, dz - a[None, :] * dz, dz)
        total = direct + tl.where(sent & blends[None, :], dx, 0.0)
        tl.store(where, total.to(came.dtype), mask=here & blends[None, :])
        g1 += df * z
        g2 += df
        flags |= tl.where(here & ~sent, 1, 0) | tl.where(here & ~(tl.abs(z) < inf), 2, 0)
    base, row_of = sums + split * P, splits * P  # a place's parts lie together
    to = base + place * row_of + i % c
    tl.store(to, tl.where(mode > 0, tl.sum(g1, 0), 0.0), mask=on)
    tl.store(to + c, tl.where(mode > 0, tl.sum(g2, 0), 0.0), mask=on)
    no, bad = tl.max(flags & 1, 0).to(tl.float32), tl.max(flags & 2, 0).to(tl.float32)
    blame(base, order, active, no, bad, member, on, True, row_of, PER, P)

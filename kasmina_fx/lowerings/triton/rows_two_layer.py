"""Kernels that pass over whole rows, for blueprints of two products, and what follows the layer.

A program handles a tile (see :mod:`kasmina_fx.lowerings.triton.shared`), whether its seeds run or
not, and every R-th block of rows. Weights stand block-diagonally in registers, as in
:mod:`kasmina_fx.lowerings.triton.two_layer`.

The inner loop takes it that everything is finite. Sums that it needs anyway tell at the end if it
was: what is not finite makes them so. Only then all blocks are computed again, seed by seed and
element by element. Nothing is written that is read, so that this is right.
"""

import triton
import triton.language as tl

from kasmina_fx.lowerings.triton.products import back, back_alone, made, made_alone, weights
from kasmina_fx.lowerings.triton.shared import (
    activated,
    blame,
    block_of,
    columns,
    first_left,
    say,
    sent_back,
)

#: See :mod:`kasmina_fx.lowerings.triton.two_layer`.
WRITES = {
    "forward": {"out": None, "said": "NOTES"},
    "backward": {"dy": None, "sums": None},
}


@triton.jit
def forward(
    y, out, said, positions, alpha, roles, _seeds, _modes, _loss_scale, w1, b1, w2, b2,
    features, offset, first_seed, count, places, rows, seen, splits, left,
    c: tl.constexpr, h: tl.constexpr, PER: tl.constexpr, TILE: tl.constexpr, HIDDEN: tl.constexpr,
    ROWS: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    NOTES: tl.constexpr, DOT: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
    THEN: tl.constexpr, SAMPLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Blend and activate all features; of ``seen`` rows, which are all unless SAMPLE."""
    inf = float("inf")
    PRODUCT: tl.constexpr = tl.float32 if DOT == 0 else (tl.bfloat16 if DOT == 1 else tl.float16)
    FAST: tl.constexpr = y.dtype.element_ty != tl.float32
    FEW: tl.constexpr = 16  # rows of a block seed by seed: such code should take few registers
    tile, split = tl.program_id(0) - left, tl.program_id(1)
    col, there, seed, place = columns(positions, tile, offset, count, features, c, PER, TILE, EVEN)
    blocks, full = tl.cdiv(seen, ROWS), seen // ROWS
    step, rest = rows // seen, rows % seen
    if tl.max(place, 0) < 0:
        for block in tl.range(split, blocks, splits, num_stages=STAGES):
            row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
            here = (row < seen)[:, None]
            if not WHOLE:
                here = here & there[None, :]
            source = row
            if SAMPLE:
                source = row * step + row * rest // seen + row % step
            raw = tl.load(y + source[:, None] * features + col[None, :], mask=here, other=0.0)
            ended = activated(raw.to(tl.float32), THEN, FAST).to(raw.dtype)
            tl.store(out + row[:, None] * features + col[None, :], ended, mask=here)
    else:
        member, member_h = tl.arange(0, TILE) // c, tl.arange(0, HIDDEN) // h
        seed_h = tile * PER + member_h
        runs_h = (member_h < PER) & (seed_h >= 0) & (seed_h < count)
        place_h = tl.load(positions + seed_h, mask=runs_h, other=-1)
        on, on_h = place >= 0, place_h >= 0
        W1, B1, W2, B2, sick = weights(
            w1, b1, w2, b2, place // places, place_h // places, member, member_h, on, on_h,
            c, h, TILE, HIDDEN, BIAS, PRODUCT,
        )  # fmt: skip
        a = tl.load(alpha + first_seed + seed, mask=on, other=0.0)
        blends = tl.load(roles + first_seed + seed, mask=on, other=0) == 2
        blends = blends & (sick == 0)
        squares = tl.zeros([ROWS, TILE], tl.float32)
        peak = tl.zeros([ROWS, TILE], tl.float32)
        for block in tl.range(split, full, splits, num_stages=STAGES):
            row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
            source = row
            if SAMPLE:
                source = row * step + row * rest // seen + row % step
            if WHOLE:
                raw = tl.load(y + source[:, None] * features + col[None, :])
            else:
                here = (row >= 0)[:, None] & there[None, :]
                raw = tl.load(y + source[:, None] * features + col[None, :], mask=here, other=0.0)
            z = raw.to(tl.float32)
            _, _, f = made(raw, z, W1, B1, W2, B2, ACT, RESIDUAL, PRODUCT)
            delta = f - z
            grown = (z + a[None, :] * delta).to(raw.dtype).to(tl.float32)
            value = tl.where(blends[None, :], grown, z)
            ended = activated(value, THEN, FAST).to(raw.dtype)
            if WHOLE:
                tl.store(out + row[:, None] * features + col[None, :], ended)
            else:
                tl.store(out + row[:, None] * features + col[None, :], ended, mask=here)
            squares += delta * delta
            if y.dtype.element_ty == tl.float16:
                peak = tl.maximum(peak, tl.abs(f))
        squared, wrong = tl.sum(squares, 0), sick.to(tl.float32)
        unsound = tl.zeros([TILE], tl.float32)
        # Finite, and far from where sums leave the dtype: then all decisions were the usual one.
        sound = (tl.sum(squared) < 1e30) & (tl.sum((~(tl.abs(a) <= 1)).to(tl.int32)) == 0)
        if y.dtype.element_ty == tl.float16:
            sound = sound & (tl.max(peak) < 65000)
        begin = first_left(sound, split, splits, full)
        if begin < blocks:  # the last rows, or all of them again
            more = tl.zeros([FEW, TILE], tl.float32)
            wrongs = tl.zeros([FEW, TILE], tl.float32)
            unsounds = tl.zeros([FEW, TILE], tl.float32)
            for few in range(begin * (ROWS // FEW), blocks * (ROWS // FEW)):
                if few // (ROWS // FEW) % splits == split:
                    row = (few * FEW + tl.arange(0, FEW)).to(tl.int64)
                    here = (row < seen)[:, None] & there[None, :]
                    source = row
                    if SAMPLE:
                        source = row * step + row * rest // seen + row % step
                    raw = tl.load(
                        y + source[:, None] * features + col[None, :], mask=here, other=0.0
                    )
                    z = raw.to(tl.float32)
                    _, _, f = made_alone(
                        raw, z, W1, B1, W2, B2, member, member_h, PER, ACT, RESIDUAL, PRODUCT
                    )
                    delta = f - z
                    grown = (z + a[None, :] * delta).to(raw.dtype).to(tl.float32)
                    fits = tl.abs(f.to(raw.dtype).to(tl.float32)) < inf
                    fine = fits & (tl.abs(grown) < inf) & blends[None, :]
                    ended = activated(tl.where(fine, grown, z), THEN, FAST).to(raw.dtype)
                    tl.store(out + row[:, None] * features + col[None, :], ended, mask=here)
                    fits = fits & (tl.abs(delta) < inf)
                    more += tl.where(fits & here, delta * delta, 0.0)
                    wrongs += tl.where(~fits & here, 1.0, 0.0)
                    unsounds += tl.where(~(tl.abs(z) < inf) & here, 1.0, 0.0)
            squared = tl.where(sound, squared, 0.0) + tl.sum(more, 0)
            wrong += tl.sum(wrongs, 0)
            unsound = tl.sum(unsounds, 0)
        if NOTES:
            say(said, positions, tile, split, count, squared, wrong, unsound, member, on, PER)


@triton.jit
def backward(
    dout, y, dy, sums, positions, alpha, roles, modes, loss_scale, w1, b1, w2, b2,
    features, offset, first_seed, count, places, rows, splits, left,
    c: tl.constexpr, h: tl.constexpr, PER: tl.constexpr, TILE: tl.constexpr, HIDDEN: tl.constexpr,
    ROWS: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    DOT: tl.constexpr, P: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
    THEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write the gradient of ``y`` and sum those of the slots; the hidden layer is made again."""
    inf = float("inf")
    PRODUCT: tl.constexpr = tl.float32 if DOT == 0 else (tl.bfloat16 if DOT == 1 else tl.float16)
    FAST: tl.constexpr = y.dtype.element_ty != tl.float32
    FEW: tl.constexpr = 16  # rows of a block seed by seed: such code should take few registers
    tile, split = tl.program_id(0) - left, tl.program_id(1)
    col, there, seed, place = columns(positions, tile, offset, count, features, c, PER, TILE, EVEN)
    blocks, full = tl.cdiv(rows, ROWS), rows // ROWS
    if tl.max(place, 0) < 0:
        for block in tl.range(split, blocks, splits, num_stages=STAGES):
            row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
            here = (row < rows)[:, None]
            if not WHOLE:
                here = here & there[None, :]
            at = row[:, None] * features + col[None, :]
            raw = tl.load(y + at, mask=here, other=0.0)
            came = tl.load(dout + at, mask=here, other=0.0)
            dz = sent_back(came.to(tl.float32), raw.to(tl.float32), THEN, FAST)
            tl.store(dy + at, dz.to(came.dtype), mask=here)
    else:
        i, j = tl.arange(0, TILE), tl.arange(0, HIDDEN)
        member, member_h = i // c, j // h
        seed_h = tile * PER + member_h
        runs_h = (member_h < PER) & (seed_h >= 0) & (seed_h < count)
        place_h = tl.load(positions + seed_h, mask=runs_h, other=-1)
        on, on_h = place >= 0, place_h >= 0
        W1, B1, W2, B2, sick = weights(
            w1, b1, w2, b2, place // places, place_h // places, member, member_h, on, on_h,
            c, h, TILE, HIDDEN, BIAS, PRODUCT,
        )  # fmt: skip
        W1t, W2t = tl.trans(W1), tl.trans(W2)
        a = tl.load(alpha + first_seed + seed, mask=on, other=0.0)
        mode = tl.load(modes + place, mask=on, other=0)
        mode_h = tl.load(modes + place_h, mask=on_h, other=0)
        blends = tl.load(roles + first_seed + seed, mask=on, other=0) == 2
        blends, trains = blends & (sick == 0), (mode == 2) & (sick == 0)
        # Of the mean of squared errors. In float16 it would vanish: there it multiplies the sums.
        weight = 2.0 * tl.load(loss_scale) / (1.0 * rows * c)
        at_once = weight if DOT != 2 else 1.0
        ab, at_loss = tl.where(blends, a, 0.0), tl.where(trains & (~blends), at_once, 0.0)
        stays, added = 1.0 - ab, tl.where(blends, 1.0, 0.0)
        g1, g2 = tl.zeros([TILE, HIDDEN], tl.float32), tl.zeros([HIDDEN, TILE], tl.float32)
        gb1, gb2 = tl.zeros([16, HIDDEN], tl.float32), tl.zeros([16, TILE], tl.float32)
        doubt = tl.zeros([ROWS, TILE], tl.float32)
        ones = tl.full([16, ROWS], 1.0, PRODUCT)
        # Triton keeps loads in flight by itself, but not one that two products read in two ways.
        ahead = block_of(y, split, rows, there, col, features, ROWS, WHOLE)
        for block in tl.range(split, full, splits, num_stages=STAGES):
            raw = ahead
            ahead = block_of(y, block + splits, rows, there, col, features, ROWS, WHOLE)
            row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
            at = row[:, None] * features + col[None, :]
            if WHOLE:
                came = tl.load(dout + at)
            else:
                here = (row >= 0)[:, None] & there[None, :]
                came = tl.load(dout + at, mask=here, other=0.0)
            z = raw.to(tl.float32)
            u, hidden, f = made(raw, z, W1, B1, W2, B2, ACT, RESIDUAL, PRODUCT)
            delta = f - z
            dz = sent_back(came.to(tl.float32), z + ab[None, :] * delta, THEN, FAST)
            df = ab[None, :] * dz + at_loss[None, :] * delta
            dh, dx = back(df, u, W1t, W2t, ACT, PRODUCT)
            if RESIDUAL:
                dx += df
            total = (stays[None, :] * dz + added[None, :] * dx).to(came.dtype)
            if WHOLE:
                tl.store(dy + at, total)
            else:
                tl.store(dy + at, total, mask=here)
            df = df.to(PRODUCT)
            g1 = tl.dot(tl.trans(raw.to(PRODUCT)), dh, g1, input_precision="ieee")
            g2 = tl.dot(tl.trans(hidden), df, g2, input_precision="ieee")
            gb1 = tl.dot(ones, dh, gb1, input_precision="ieee")
            gb2 = tl.dot(ones, df, gb2, input_precision="ieee")
            # Zero, or NaN where something is not finite or near to leave the dtype.
            if y.dtype.element_ty == tl.float16:
                doubt += (f * 5.2e33 + dx) * 0.0
            else:
                doubt += (delta * 1.2676506e30 + dx) * 0.0
        no, bad = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
        sum1, sum2 = tl.sum(gb1, 0) * 0.0625, tl.sum(gb2, 0) * 0.0625
        sound = tl.abs(tl.sum(sum1) + tl.sum(sum2) + tl.sum(doubt)) < inf
        sound = sound & (tl.sum((~(tl.abs(a) <= 1)).to(tl.int32)) == 0)
        begin = first_left(sound, split, splits, full)
        if begin < blocks:  # the last rows, or all of them again
            g1, g2 = tl.where(sound, g1, 0.0), tl.where(sound, g2, 0.0)
            r1, r2 = tl.zeros([FEW, HIDDEN], tl.float32), tl.zeros([FEW, TILE], tl.float32)
            flags = tl.zeros([FEW, TILE], tl.int32)  # 1: refused something; 2: z is not finite
            for few in range(begin * (ROWS // FEW), blocks * (ROWS // FEW)):
                if few // (ROWS // FEW) % splits == split:
                    row = (few * FEW + tl.arange(0, FEW)).to(tl.int64)
                    here = (row < rows)[:, None] & there[None, :]
                    at = row[:, None] * features + col[None, :]
                    raw = tl.load(y + at, mask=here, other=0.0)
                    came = tl.load(dout + at, mask=here, other=0.0)
                    z = raw.to(tl.float32)
                    u, hidden, f = made_alone(
                        raw, z, W1, B1, W2, B2, member, member_h, PER, ACT, RESIDUAL, PRODUCT
                    )
                    delta = f - z
                    grown = z + a[None, :] * delta
                    fits = tl.abs(f.to(raw.dtype).to(tl.float32)) < inf
                    blended = fits & (tl.abs(grown.to(raw.dtype).to(tl.float32)) < inf)
                    blended = blended & blends[None, :]
                    dz = sent_back(came.to(tl.float32), tl.where(blended, grown, z), THEN, FAST)
                    learns = fits & (tl.abs(delta) < inf) & trains[None, :]
                    error = tl.where(learns, delta, 0.0) * at_once
                    df = tl.where(blended & (tl.abs(dz) < inf), a[None, :] * dz, error)
                    df = tl.where(here & on[None, :], df, 0.0)
                    dh, dx = back_alone(df, u, W1t, W2t, member, member_h, PER, ACT, PRODUCT)
                    if RESIDUAL:
                        dx += df
                    sent = tl.abs(dx) < inf
                    direct = tl.where(blended, dz - a[None, :] * dz, dz)
                    total = direct + tl.where(sent & blends[None, :], dx, 0.0)
                    tl.store(dy + at, total.to(came.dtype), mask=here)
                    x, d1, d2 = tl.trans(raw.to(PRODUCT)), dh, df.to(PRODUCT)
                    g1 = tl.dot(x, d1, g1, input_precision="ieee")
                    g2 = tl.dot(tl.trans(hidden), d2, g2, input_precision="ieee")
                    r1 += dh.to(tl.float32)
                    r2 += df
                    flags |= tl.where(here & ~sent, 1, 0)
                    flags |= tl.where(here & ~(tl.abs(z) < inf), 2, 0)
            sum1 = tl.where(sound, sum1, 0.0) + tl.sum(r1, 0)
            sum2 = tl.where(sound, sum2, 0.0) + tl.sum(r2, 0)
            no = tl.max(flags & 1, 0).to(tl.float32)
            bad = tl.max(flags & 2, 0).to(tl.float32)
        # Not a product where nothing is learnt: what is not finite would be 0 x Inf.
        g1 = tl.where(mode[:, None] > 0, g1, 0.0)
        g2 = tl.where(mode[None, :] > 0, g2, 0.0)
        sum1, sum2 = tl.where(mode_h > 0, sum1, 0.0), tl.where(mode > 0, sum2, 0.0)
        if DOT == 2:
            g1 = tl.where(mode[:, None] == 2, g1 * weight, g1)
            g2 = tl.where(mode[None, :] == 2, g2 * weight, g2)
            sum1 = tl.where(mode_h == 2, sum1 * weight, sum1)
            sum2 = tl.where(mode == 2, sum2 * weight, sum2)
        base, row_of = sums + split * P, splits * P
        same = (member[:, None] == member_h[None, :]) & on[:, None] & on_h[None, :]
        same_t = (member_h[:, None] == member[None, :]) & on_h[:, None] & on[None, :]
        own1 = place_h[None, :] * row_of + (j % h)[None, :] * c + (i % c)[:, None]
        tl.store(base + own1, g1, mask=same)
        BEHIND: tl.constexpr = h * c + h if BIAS else h * c
        own2 = place[None, :] * row_of + BEHIND + (i % c)[None, :] * h + (j % h)[:, None]
        tl.store(base + own2, g2, mask=same_t)
        if BIAS:
            tl.store(base + place_h * row_of + h * c + j % h, sum1, mask=on_h)
            tl.store(base + place * row_of + 2 * h * c + h + i % c, sum2, mask=on)
        blame(base, positions, tile, count, no, bad, member, on, row_of, PER, P)

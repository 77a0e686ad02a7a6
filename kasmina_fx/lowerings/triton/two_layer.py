"""Kernels for blueprints of two products, ``act(x W1 + b1) W2 + b2``, with or without ``x +``.

A program handles a *tile*: the chunks of ``PER`` active seeds, and every R-th block of rows. The
seeds' weights stand block-diagonally in registers, so that tensor cores do the products. Columns
come from the tables, so active seeds may lie anywhere; nothing of other seeds is touched.

A zero beside a NaN does not keep it out of a product's sum, so one seed could reach its neighbours
in the tile. The first loop goes on while what it computes is finite, and far from where it would
not be: one number a block tells. From the first block on of which that is not so, the second loop
computes seed by seed (``made_alone``), and decides element by element; it does the last rows, too.
Blocks are written in place, so none is ever done twice.

Shapes as of :mod:`kasmina_fx.lowerings.tiles`.
"""

import triton
import triton.language as tl

from kasmina_fx.lowerings.triton.chunks import (
    FAR,
    blame,
    blending,
    blocks_of,
    columns_kept,
    members,
    most,
    say,
)
from kasmina_fx.lowerings.triton.products import back_alone, made, made_alone, weights

#: What the kernels write to, and the switch without which they don't (None: always).
WRITES = {
    "forward": {"out": None, "kept": "KEEP", "said": "NOTES"},
    "backward": {"dy": None, "sums": None},
}


@triton.jit
def forward(
    out, kept, said, order, seeds, alpha, roles, _positions, _modes, _loss_scale,
    w1, b1, w2, b2,
    features, offset, first_seed, count, places, rows,
    c: tl.constexpr, h: tl.constexpr, PER: tl.constexpr, TILE: tl.constexpr, HIDDEN: tl.constexpr,
    ROWS: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    KEEP: tl.constexpr, NOTES: tl.constexpr, DOT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Blend in place; put what was there aside in ``kept``, and what happened in ``said``."""
    inf = float("inf")
    PRODUCT: tl.constexpr = tl.float32 if DOT == 0 else (tl.bfloat16 if DOT == 1 else tl.float16)
    split, splits, active = tl.program_id(1), tl.num_programs(1), tl.num_programs(0) * PER
    member, place, seed, col, member_h, place_h = members(
        order, seeds, offset, active, c, h, PER, TILE, HIDDEN, EVEN
    )
    on_h = place_h >= 0
    on, a, blends = blending(alpha, roles, first_seed, seed, place)
    W1, B1, W2, B2, sick = weights(
        w1, b1, w2, b2, place // places, place_h // places, member, member_h, on, on_h,
        c, h, TILE, HIDDEN, BIAS, PRODUCT,
    )  # fmt: skip
    blends = blends & (sick == 0)
    r, wide = tl.arange(0, ROWS), active * c
    at = r[:, None] * features + col[None, :]
    aside = r[:, None] * wide + columns_kept(member, c, PER, TILE, EVEN)[None, :]
    squares = tl.zeros([ROWS, TILE], tl.float32)
    blocks, full = blocks_of(place, rows, ROWS)
    usual = tl.where(tl.sum((~(tl.abs(a) <= 1)).to(tl.int32)) == 0, 1, 0)
    moves = blends.to(tl.int32)
    begin = split  # the first block that is still to do
    first = split.to(tl.int64) * ROWS
    here = ((first + r) < rows)[:, None] & on[None, :]
    ahead = tl.load(out + first * features + at, mask=here, other=0.0)
    for block in range(split, full, splits):
        raw, first = ahead, tl.cast(block, tl.int64) * ROWS
        there = first + splits * ROWS
        here = ((there + r) < rows)[:, None] & on[None, :]
        ahead = tl.load(out + there * features + at, mask=here, other=0.0)
        if KEEP:
            tl.store(kept + first * wide + aside, raw, mask=on[None, :])
        z = raw.to(tl.float32)
        _, _, f = made(raw, z, W1, B1, W2, B2, ACT, RESIDUAL, PRODUCT)
        delta = f - z
        square = delta * delta
        worst = most(square)
        if out.dtype.element_ty == tl.float16:
            worst = tl.maximum(worst, most(f * 1.5384615e25))
        usual = tl.where(worst < FAR, usual, 0)
        grown = (z + a[None, :] * delta).to(raw.dtype)
        tl.store(out + first * features + at, grown, mask=(moves[None, :] & usual) > 0)
        squares += tl.where(usual > 0, square, 0.0)
        begin = tl.where(usual > 0, block + splits, begin)
    squared, wrong = tl.sum(squares, 0), sick.to(tl.float32)
    unsound = tl.zeros([TILE], tl.float32)
    if begin < blocks:
        more = tl.zeros([ROWS, TILE], tl.float32)
        wrongs = tl.zeros([ROWS, TILE], tl.float32)
        unsounds = tl.zeros([ROWS, TILE], tl.float32)
        for block in range(begin, blocks, splits):
            first = tl.cast(block, tl.int64) * ROWS
            here = ((first + r) < rows)[:, None] & on[None, :]
            raw = tl.load(out + first * features + at, mask=here, other=0.0)
            if KEEP:
                tl.store(kept + first * wide + aside, raw, mask=here)
            z = raw.to(tl.float32)
            _, _, f = made_alone(
                raw, z, W1, B1, W2, B2, member, member_h, PER, ACT, RESIDUAL, PRODUCT
            )
            delta = f - z
            grown = (z + a[None, :] * delta).to(raw.dtype)
            fits = tl.abs(f.to(raw.dtype).to(tl.float32)) < inf
            fine = fits & (tl.abs(grown.to(tl.float32)) < inf)
            tl.store(out + first * features + at, grown, mask=here & fine & blends[None, :])
            fits = fits & (tl.abs(delta) < inf)
            more += tl.where(fits & here, delta * delta, 0.0)
            wrongs += tl.where(~fits & here, 1.0, 0.0)
            unsounds += tl.where(~(tl.abs(z) < inf) & here, 1.0, 0.0)
        squared += tl.sum(more, 0)
        wrong += tl.sum(wrongs, 0)
        unsound = tl.sum(unsounds, 0)
    if NOTES:
        ill = (begin < blocks) | (tl.max(sick, 0) > 0)
        say(said, order, seeds, active, split, count, squared, wrong, unsound, member, on, ill, PER)


@triton.jit
def backward(
    dy, sums, kept, order, seeds, alpha, roles, modes, loss_scale, w1, b1, w2, b2,
    features, offset, first_seed, places, rows,
    c: tl.constexpr, h: tl.constexpr, PER: tl.constexpr, TILE: tl.constexpr, HIDDEN: tl.constexpr,
    ROWS: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    DOT: tl.constexpr, P: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Change the gradient of the output into that of ``y`` in place; sum those of the slots."""
    inf = float("inf")
    PRODUCT: tl.constexpr = tl.float32 if DOT == 0 else (tl.bfloat16 if DOT == 1 else tl.float16)
    split, splits, active = tl.program_id(1), tl.num_programs(1), tl.num_programs(0) * PER
    member, place, seed, col, member_h, place_h = members(
        order, seeds, offset, active, c, h, PER, TILE, HIDDEN, EVEN
    )
    on_h = place_h >= 0
    on, a, blends = blending(alpha, roles, first_seed, seed, place)
    mode = tl.load(modes + place, mask=on, other=0)
    mode_h = tl.load(modes + place_h, mask=on_h, other=0)
    W1, B1, W2, B2, sick = weights(
        w1, b1, w2, b2, place // places, place_h // places, member, member_h, on, on_h,
        c, h, TILE, HIDDEN, BIAS, PRODUCT,
    )  # fmt: skip
    W1t, W2t = tl.trans(W1), tl.trans(W2)
    blends, trains = blends & (sick == 0), (mode == 2) & (sick == 0)
    # Of the mean of squared errors. In float16 such a small number would vanish: there the sums of
    # a slot are multiplied by it, at the end.
    weight = 2.0 * tl.load(loss_scale) / (1.0 * rows * c)
    at_once = weight if DOT != 2 else 1.0
    ab, at_loss = tl.where(blends, a, 0.0), tl.where(trains & (~blends), at_once, 0.0)
    i, j = tl.arange(0, TILE), tl.arange(0, HIDDEN)
    r, wide = tl.arange(0, ROWS), active * c
    at = r[:, None] * features + col[None, :]
    aside = r[:, None] * wide + columns_kept(member, c, PER, TILE, EVEN)[None, :]
    g1, g2 = tl.zeros([TILE, HIDDEN], tl.float32), tl.zeros([HIDDEN, TILE], tl.float32)
    gb1, gb2 = tl.zeros([ROWS, HIDDEN], tl.float32), tl.zeros([ROWS, TILE], tl.float32)
    blocks, full = blocks_of(place, rows, ROWS)
    usual = tl.where(tl.sum((~(tl.abs(a) <= 1)).to(tl.int32)) == 0, 1, 0)
    moves = blends.to(tl.int32)
    learns = tl.max(tl.where(mode > 0, 1, 0))
    begin = split  # the first block that is still to do
    first = split.to(tl.int64) * ROWS
    here = ((first + r) < rows)[:, None] & on[None, :]
    next_raw = tl.load(kept + first * wide + aside, mask=here, other=0.0)
    next_came = tl.load(dy + first * features + at, mask=here, other=0.0)
    for block in range(split, full, splits):
        raw, came, first = next_raw, next_came, tl.cast(block, tl.int64) * ROWS
        there = first + splits * ROWS
        here = ((there + r) < rows)[:, None] & on[None, :]
        next_raw = tl.load(kept + there * wide + aside, mask=here, other=0.0)
        next_came = tl.load(dy + there * features + at, mask=here, other=0.0)
        z, dz = raw.to(tl.float32), came.to(tl.float32)
        u, hidden, f = made(raw, z, W1, B1, W2, B2, ACT, RESIDUAL, PRODUCT)
        delta = f - z
        df = ab[None, :] * dz + at_loss[None, :] * delta
        # Not back(): sums of biases take what is in float32 here.
        dh = tl.dot(df.to(PRODUCT), W2t, input_precision="ieee")
        if ACT == 1:
            dh = tl.where(u > 0, dh, 0.0)
        dx = tl.dot(dh.to(PRODUCT), W1t, input_precision="ieee")
        if RESIDUAL:
            dx += df
        # Zero, or NaN where something is not finite or near to leave the dtype.
        if dy.dtype.element_ty == tl.float16:
            doubt = (f * 5.2e33 + dx) * 0.0
        else:
            doubt = (delta * 1.2676506e30 + dx) * 0.0
        usual = tl.where(most(doubt) == 0, usual, 0)
        total = (dz - ab[None, :] * dz) + dx
        where = dy + first * features + at
        tl.store(where, total.to(came.dtype), mask=(moves[None, :] & usual) > 0)
        # An `if` is slower, and around sums lost a gradient (Triton 3.6). Not so raw, for what is
        # not finite there spoils gradients of its own seed alone, as it must.
        for _ in range(learns):
            own_hidden = tl.where(usual > 0, hidden, 0.0).to(PRODUCT)
            own_df, own_dh = tl.where(usual > 0, df, 0.0), tl.where(usual > 0, dh, 0.0)
            g1 = tl.dot(tl.trans(raw.to(PRODUCT)), own_dh.to(PRODUCT), g1, input_precision="ieee")
            g2 = tl.dot(tl.trans(own_hidden), own_df.to(PRODUCT), g2, input_precision="ieee")
            gb1 += own_dh
            gb2 += own_df
        begin = tl.where(usual > 0, block + splits, begin)
    no, bad = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    if begin < blocks:
        flags = tl.zeros([ROWS, TILE], tl.int32)  # 1: refused something; 2: z is not finite
        for block in range(begin, blocks, splits):
            first = tl.cast(block, tl.int64) * ROWS
            here = ((first + r) < rows)[:, None] & on[None, :]
            raw = tl.load(kept + first * wide + aside, mask=here, other=0.0)
            came = tl.load(dy + first * features + at, mask=here, other=0.0)
            z, dz = raw.to(tl.float32), came.to(tl.float32)
            u, hidden, f = made_alone(
                raw, z, W1, B1, W2, B2, member, member_h, PER, ACT, RESIDUAL, PRODUCT
            )
            delta = f - z
            grown = (z + a[None, :] * delta).to(raw.dtype).to(tl.float32)
            fits = tl.abs(f.to(raw.dtype).to(tl.float32)) < inf
            blended = fits & (tl.abs(grown) < inf) & blends[None, :]
            error = tl.where(fits & (tl.abs(delta) < inf) & trains[None, :], delta, 0.0) * at_once
            df = tl.where(blended & (tl.abs(dz) < inf), a[None, :] * dz, error)
            df = tl.where(here, df, 0.0)
            dh, dx = back_alone(df, u, W1t, W2t, member, member_h, PER, ACT, PRODUCT)
            if RESIDUAL:
                dx += df
            sent = tl.abs(dx) < inf
            direct = tl.where(blended, dz - a[None, :] * dz, dz)
            total = direct + tl.where(sent & blends[None, :], dx, 0.0)
            where = dy + first * features + at
            tl.store(where, total.to(came.dtype), mask=here & blends[None, :])
            g1 = tl.dot(tl.trans(raw.to(PRODUCT)), dh, g1, input_precision="ieee")
            g2 = tl.dot(tl.trans(hidden), df.to(PRODUCT), g2, input_precision="ieee")
            gb1 += dh.to(tl.float32)
            gb2 += df
            flags |= tl.where(here & ~sent, 1, 0) | tl.where(here & ~(tl.abs(z) < inf), 2, 0)
        no, bad = tl.max(flags & 1, 0).to(tl.float32), tl.max(flags & 2, 0).to(tl.float32)
    # Not a product where nothing is learnt: what is not finite would be 0 x Inf.
    g1 = tl.where(mode[:, None] > 0, g1, 0.0)
    g2 = tl.where(mode[None, :] > 0, g2, 0.0)
    sum1 = tl.where(mode_h > 0, tl.sum(gb1, 0), 0.0)
    sum2 = tl.where(mode > 0, tl.sum(gb2, 0), 0.0)
    if DOT == 2:
        g1 = tl.where(mode[:, None] == 2, g1 * weight, g1)
        g2 = tl.where(mode[None, :] == 2, g2 * weight, g2)
        sum1 = tl.where(mode_h == 2, sum1 * weight, sum1)
        sum2 = tl.where(mode == 2, sum2 * weight, sum2)
    same = (member[:, None] == member_h[None, :]) & on[:, None] & on_h[None, :]
    same_t = (member_h[:, None] == member[None, :]) & on_h[:, None] & on[None, :]
    base, row_of = sums + split * P, splits * P  # a place's parts lie together
    own1 = place_h[None, :] * row_of + (j % h)[None, :] * c + (i % c)[:, None]
    tl.store(base + own1, g1, mask=same)
    BEHIND: tl.constexpr = h * c + h if BIAS else h * c
    own2 = place[None, :] * row_of + BEHIND + (i % c)[None, :] * h + (j % h)[:, None]
    tl.store(base + own2, g2, mask=same_t)
    if BIAS:
        tl.store(base + place_h * row_of + h * c + j % h, sum1, mask=on_h)
        tl.store(base + place * row_of + 2 * h * c + h + i % c, sum2, mask=on)
    blame(base, order, active, no, bad, member, on, begin < blocks, row_of, PER, P)

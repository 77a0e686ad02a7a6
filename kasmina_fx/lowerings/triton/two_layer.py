"""Kernels for blueprints of two products, ``act(x W1 + b1) W2 + b2``, with or without ``x +``.

A program handles a *tile*: the chunks of ``PER`` active seeds, and every R-th block of rows. The
seeds' weights stand block-diagonally in registers, so that tensor cores do the products. Columns
come from the tables, so active seeds may lie anywhere; nothing of other seeds is touched.

A zero beside a NaN does not keep it out of a product's sum, so one seed could reach its neighbours
in the tile. Each block is therefore checked, and computed again seed by seed (``p``) where
something is not finite: exact, and nearly free where nothing is.

One function a kernel, hence the same addresses twice: torch 2.11 can't analyse what a kernel writes
that calls another, and a test compares :data:`WRITES` with what it finds. Shapes as of
:mod:`kasmina_fx.lowerings.tiles`.
"""

import triton
import triton.language as tl

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
    ROWS: tl.constexpr, ALONE: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, KEEP: tl.constexpr, NOTES: tl.constexpr, DOT: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Blend in place; put what was there aside in ``kept``, and what happened in ``said``."""
    inf = float("inf")
    PRODUCT: tl.constexpr = tl.float32 if DOT == 0 else (tl.bfloat16 if DOT == 1 else tl.float16)
    split, splits, active = tl.program_id(1), tl.num_programs(1), tl.num_programs(0) * PER
    i, j = tl.arange(0, TILE), tl.arange(0, HIDDEN)
    member, member_h = i // c, j // h
    at, at_h = tl.program_id(0) * PER + member, tl.program_id(0) * PER + member_h
    place = tl.load(order + at, mask=(member < PER) & (at < active), other=-1)
    place_h = tl.load(order + at_h, mask=(member_h < PER) & (at_h < active), other=-1)
    on, on_h = place >= 0, place_h >= 0
    seed = tl.load(seeds + place, mask=on, other=0)
    slot, slot_h = place // places, place_h // places
    col = offset + seed * c + i % c
    if EVEN > 1:  # neighbours in a chunk lie together: one load for several
        col = tl.max_contiguous(tl.multiple_of(col, EVEN), EVEN)
    a = tl.load(alpha + first_seed + seed, mask=on, other=0.0)
    blends = tl.load(roles + first_seed + seed, mask=on, other=0) == 2
    same = (member[:, None] == member_h[None, :]) & on[:, None] & on_h[None, :]
    same_t = (member_h[:, None] == member[None, :]) & on_h[:, None] & on[None, :]
    at1 = slot_h[None, :] * (c * h) + (j % h)[None, :] * c + (i % c)[:, None]
    at2 = slot[None, :] * (c * h) + (i % c)[None, :] * h + (j % h)[:, None]
    W1 = tl.load(w1 + at1, mask=same, other=0.0)
    W2 = tl.load(w2 + at2, mask=same_t, other=0.0)
    if BIAS:
        B1 = tl.load(b1 + slot_h * h + j % h, mask=on_h, other=0.0).to(tl.float32)
        B2 = tl.load(b2 + slot * c + i % c, mask=on, other=0.0).to(tl.float32)
    else:
        B1, B2 = tl.zeros([HIDDEN], tl.float32), tl.zeros([TILE], tl.float32)
    # Seeds with a parameter that is not finite do not run; whose it is, is asked only if there is.
    ill1 = (~(tl.abs(W1.to(tl.float32)) < inf)) | (~(tl.abs(B1) < inf))[None, :]
    ill2 = (~(tl.abs(W2.to(tl.float32)) < inf)) | (~(tl.abs(B2) < inf))[None, :]
    sick, sick_h = tl.zeros([TILE], tl.int32), tl.zeros([HIDDEN], tl.int32)
    if tl.sum(ill1.to(tl.int32)) + tl.sum(ill2.to(tl.int32)) > 0:
        ill = tl.max(tl.where(same, ill1, False).to(tl.int32), 0)
        ill = tl.maximum(ill, tl.max(tl.where(same_t, ill2, False).to(tl.int32), 1))
        sick = tl.max(tl.where(same, ill[None, :], 0), 1)
        sick_h = tl.max(tl.where(same, sick[:, None], 0), 0)
        W1 = tl.where(sick_h[None, :] > 0, 0.0, W1)
        W2 = tl.where(sick_h[:, None] > 0, 0.0, W2)
        B1, B2 = tl.where(sick_h > 0, 0.0, B1), tl.where(sick > 0, 0.0, B2)
    W1, W2 = W1.to(PRODUCT), W2.to(PRODUCT)
    blends = blends & (sick == 0)
    squares = tl.zeros([ROWS, TILE], tl.float32)
    wrong = tl.zeros([ROWS, TILE], tl.float32)
    unsound = tl.zeros([ROWS, TILE], tl.float32)
    blocks = tl.where(tl.max(place, 0) >= 0, tl.cdiv(rows, ROWS), 0)  # none of an idle bank
    for block in range(split, blocks, splits):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        here = (row < rows)[:, None] & on[None, :]
        where = out + row[:, None] * features + col[None, :]
        raw = tl.load(where, mask=here, other=0.0)
        if KEEP:
            aside = kept + row[:, None] * (active * c) + (at * c + i % c)[None, :]
            tl.store(aside, raw, mask=here)
        z = raw.to(tl.float32)
        u = tl.dot(raw.to(PRODUCT), W1, input_precision="ieee") + B1[None, :]
        if ACT == 1:
            u = tl.where(u < 0, 0.0, u)
        f = tl.dot(u.to(PRODUCT), W2, input_precision="ieee") + B2[None, :]
        if ALONE > 0:
            if tl.sum((~(tl.abs(f) < inf)).to(tl.int32)) > 0:
                for p in range(ALONE):
                    x = tl.where((member == p)[None, :], raw, 0.0).to(PRODUCT)
                    u = tl.dot(x, W1, input_precision="ieee") + B1[None, :]
                    if ACT == 1:
                        u = tl.where(u < 0, 0.0, u)
                    hidden = tl.where((member_h == p)[None, :], u, 0.0).to(PRODUCT)
                    made = tl.dot(hidden, W2, input_precision="ieee") + B2[None, :]
                    f = tl.where((member == p)[None, :], made, f)
        if RESIDUAL:
            f += z
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
        for p in tl.static_range(PER):
            number = tl.program_id(0) * PER + p
            mine = (member == p) & on
            whose = tl.load(order + number, mask=number < active, other=-1)
            to = said + split * 3 * count + tl.load(seeds + whose, mask=whose >= 0, other=0)
            tl.store(to, tl.sum(tl.where(mine, squared, 0.0)), mask=whose >= 0)
            tl.store(to + count, tl.sum(tl.where(mine, wrongs, 0.0)), mask=whose >= 0)
            tl.store(to + 2 * count, tl.sum(tl.where(mine, unsounds, 0.0)), mask=whose >= 0)


@triton.jit
def backward(
    dy, sums, kept, order, seeds, alpha, roles, modes, loss_scale, w1, b1, w2, b2,
    features, offset, first_seed, places, rows,
    c: tl.constexpr, h: tl.constexpr, PER: tl.constexpr, TILE: tl.constexpr, HIDDEN: tl.constexpr,
    ROWS: tl.constexpr, ALONE: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, DOT: tl.constexpr, P: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Change the gradient of the output into that of ``y`` in place; sum those of the slots."""
    inf = float("inf")
    PRODUCT: tl.constexpr = tl.float32 if DOT == 0 else (tl.bfloat16 if DOT == 1 else tl.float16)
    split, splits, active = tl.program_id(1), tl.num_programs(1), tl.num_programs(0) * PER
    i, j = tl.arange(0, TILE), tl.arange(0, HIDDEN)
    member, member_h = i // c, j // h
    at, at_h = tl.program_id(0) * PER + member, tl.program_id(0) * PER + member_h
    place = tl.load(order + at, mask=(member < PER) & (at < active), other=-1)
    place_h = tl.load(order + at_h, mask=(member_h < PER) & (at_h < active), other=-1)
    on, on_h = place >= 0, place_h >= 0
    seed = tl.load(seeds + place, mask=on, other=0)
    slot, slot_h = place // places, place_h // places
    col = offset + seed * c + i % c
    if EVEN > 1:  # neighbours in a chunk lie together: one load for several
        col = tl.max_contiguous(tl.multiple_of(col, EVEN), EVEN)
    a = tl.load(alpha + first_seed + seed, mask=on, other=0.0)
    blends = tl.load(roles + first_seed + seed, mask=on, other=0) == 2
    mode = tl.load(modes + place, mask=on, other=0)
    mode_h = tl.load(modes + place_h, mask=on_h, other=0)
    same = (member[:, None] == member_h[None, :]) & on[:, None] & on_h[None, :]
    same_t = (member_h[:, None] == member[None, :]) & on_h[:, None] & on[None, :]
    at1 = slot_h[None, :] * (c * h) + (j % h)[None, :] * c + (i % c)[:, None]
    at2 = slot[None, :] * (c * h) + (i % c)[None, :] * h + (j % h)[:, None]
    W1 = tl.load(w1 + at1, mask=same, other=0.0)
    W2 = tl.load(w2 + at2, mask=same_t, other=0.0)
    if BIAS:
        B1 = tl.load(b1 + slot_h * h + j % h, mask=on_h, other=0.0).to(tl.float32)
        B2 = tl.load(b2 + slot * c + i % c, mask=on, other=0.0).to(tl.float32)
    else:
        B1, B2 = tl.zeros([HIDDEN], tl.float32), tl.zeros([TILE], tl.float32)
    # Seeds with a parameter that is not finite do not run; whose it is, is asked only if there is.
    ill1 = (~(tl.abs(W1.to(tl.float32)) < inf)) | (~(tl.abs(B1) < inf))[None, :]
    ill2 = (~(tl.abs(W2.to(tl.float32)) < inf)) | (~(tl.abs(B2) < inf))[None, :]
    sick, sick_h = tl.zeros([TILE], tl.int32), tl.zeros([HIDDEN], tl.int32)
    if tl.sum(ill1.to(tl.int32)) + tl.sum(ill2.to(tl.int32)) > 0:
        ill = tl.max(tl.where(same, ill1, False).to(tl.int32), 0)
        ill = tl.maximum(ill, tl.max(tl.where(same_t, ill2, False).to(tl.int32), 1))
        sick = tl.max(tl.where(same, ill[None, :], 0), 1)
        sick_h = tl.max(tl.where(same, sick[:, None], 0), 0)
        W1 = tl.where(sick_h[None, :] > 0, 0.0, W1)
        W2 = tl.where(sick_h[:, None] > 0, 0.0, W2)
        B1, B2 = tl.where(sick_h > 0, 0.0, B1), tl.where(sick > 0, 0.0, B2)
    W1, W2 = W1.to(PRODUCT), W2.to(PRODUCT)
    blends, trains = blends & (sick == 0), (mode == 2) & (sick == 0)
    # Of the mean of squared errors. In float16 such a small number would vanish: there the sums of
    # a slot are multiplied by it, at the end.
    weight = 2.0 * tl.load(loss_scale) / (1.0 * rows * c)
    at_once = weight if DOT != 2 else 1.0
    W1t, W2t = tl.trans(W1), tl.trans(W2)
    g1, g2 = tl.zeros([TILE, HIDDEN], tl.float32), tl.zeros([HIDDEN, TILE], tl.float32)
    gb1, gb2 = tl.zeros([ROWS, HIDDEN], tl.float32), tl.zeros([ROWS, TILE], tl.float32)
    flags = tl.zeros([ROWS, TILE], tl.int32)  # 1: something was refused; 2: a chunk is not finite
    blocks = tl.where(tl.max(place, 0) >= 0, tl.cdiv(rows, ROWS), 0)  # none of an idle bank
    for block in range(split, blocks, splits):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        here = (row < rows)[:, None] & on[None, :]
        where = dy + row[:, None] * features + col[None, :]
        aside = kept + row[:, None] * (active * c) + (at * c + i % c)[None, :]
        raw = tl.load(aside, mask=here, other=0.0)
        came = tl.load(where, mask=here, other=0.0)
        z, dz = raw.to(tl.float32), came.to(tl.float32)
        u = tl.dot(raw.to(PRODUCT), W1, input_precision="ieee") + B1[None, :]
        hidden = u
        if ACT == 1:
            hidden = tl.where(u < 0, 0.0, u)
        f = tl.dot(hidden.to(PRODUCT), W2, input_precision="ieee") + B2[None, :]
        if ALONE > 0:
            if tl.sum((~(tl.abs(f) < inf)).to(tl.int32)) > 0:
                for p in range(ALONE):
                    x = tl.where((member == p)[None, :], raw, 0.0).to(PRODUCT)
                    v = tl.dot(x, W1, input_precision="ieee") + B1[None, :]
                    u = tl.where((member_h == p)[None, :], v, u)
                    if ACT == 1:
                        v = tl.where(v < 0, 0.0, v)
                    hidden = tl.where((member_h == p)[None, :], v, hidden)
                    v = tl.where((member_h == p)[None, :], v, 0.0).to(PRODUCT)
                    made = tl.dot(v, W2, input_precision="ieee") + B2[None, :]
                    f = tl.where((member == p)[None, :], made, f)
        if RESIDUAL:
            f += z
        delta = f - z
        grown = (z + a[None, :] * delta).to(raw.dtype).to(tl.float32)
        fits = tl.abs(f.to(raw.dtype).to(tl.float32)) < inf
        blended = fits & (tl.abs(grown) < inf) & blends[None, :]
        error = tl.where(fits & (tl.abs(delta) < inf) & trains[None, :], delta, 0.0) * at_once
        df = tl.where(blended & (tl.abs(dz) < inf), a[None, :] * dz, error)
        df = tl.where(here, df, 0.0)
        dh = tl.dot(df.to(PRODUCT), W2t, input_precision="ieee")
        if ACT == 1:
            dh = tl.where(u > 0, dh, 0.0)
        dx = tl.dot(dh.to(PRODUCT), W1t, input_precision="ieee")
        if ALONE > 0:
            if tl.sum((~(tl.abs(dx) < inf)).to(tl.int32)) > 0:
                for p in range(ALONE):
                    mine = tl.where((member == p)[None, :], df, 0.0).to(PRODUCT)
                    back = tl.dot(mine, W2t, input_precision="ieee")
                    if ACT == 1:
                        back = tl.where(u > 0, back, 0.0)
                    back = tl.where((member_h == p)[None, :], back, 0.0)
                    dh = tl.where((member_h == p)[None, :], back, dh)
                    made = tl.dot(back.to(PRODUCT), W1t, input_precision="ieee")
                    dx = tl.where((member == p)[None, :], made, dx)
        if RESIDUAL:
            dx += df
        sent = tl.abs(dx) < inf
        direct = tl.where(blended, dz - a[None, :] * dz, dz)
        total = direct + tl.where(sent & blends[None, :], dx, 0.0)
        tl.store(where, total.to(came.dtype), mask=here & blends[None, :])
        g1 = tl.dot(tl.trans(raw.to(PRODUCT)), dh.to(PRODUCT), g1, input_precision="ieee")
        g2 = tl.dot(tl.trans(hidden.to(PRODUCT)), df.to(PRODUCT), g2, input_precision="ieee")
        gb1 += dh
        gb2 += df
        flags |= tl.where(here & ~sent, 1, 0) | tl.where(here & ~(tl.abs(z) < inf), 2, 0)
    # Not a product where nothing is learnt: what is not finite would be 0 x Inf.
    g1 = tl.where(mode[:, None] > 0, g1, 0.0)
    g2 = tl.where(mode[None, :] > 0, g2, 0.0)
    if DOT == 2:
        g1 = tl.where(mode[:, None] == 2, g1 * weight, g1)
        g2 = tl.where(mode[None, :] == 2, g2 * weight, g2)
    base, row_of = sums + split * P, splits * P  # a place's parts lie together
    own1 = place_h[None, :] * row_of + (j % h)[None, :] * c + (i % c)[:, None]
    tl.store(base + own1, g1, mask=same)
    BEHIND: tl.constexpr = h * c + h if BIAS else h * c
    own2 = place[None, :] * row_of + BEHIND + (i % c)[None, :] * h + (j % h)[:, None]
    tl.store(base + own2, g2, mask=same_t)
    if BIAS:
        sum1 = tl.where(mode_h > 0, tl.sum(gb1, 0), 0.0)
        sum2 = tl.where(mode > 0, tl.sum(gb2, 0), 0.0)
        if DOT == 2:
            sum1 = tl.where(mode_h == 2, sum1 * weight, sum1)
            sum2 = tl.where(mode == 2, sum2 * weight, sum2)
        tl.store(base + place_h * row_of + h * c + j % h, sum1, mask=on_h)
        tl.store(base + place * row_of + 2 * h * c + h + i % c, sum2, mask=on)
    no, bad = tl.max(flags & 1, 0).to(tl.float32), tl.max(flags & 2, 0).to(tl.float32)
    for p in tl.static_range(PER):
        number = tl.program_id(0) * PER + p
        mine = (member == p) & on
        whose = tl.load(order + number, mask=number < active, other=-1)
        to = base + whose * row_of + P - 2
        tl.store(to, tl.sum(tl.where(mine, no, 0.0)), mask=whose >= 0)
        tl.store(to + 1, tl.sum(tl.where(mine, bad, 0.0)), mask=whose >= 0)

"""Kernels for the blueprint ``bottleneck``: ``x + gelu(norm(x) W1 + b1) W2 + b2``.

Tiles, parts of the rows and blocks that are computed again are those of
:mod:`kasmina_fx.lowerings.triton.two_layer`. The LayerNorm is of each seed's columns of a row, in
float32 and two passes; what is not finite stays with its seed there. The gradients of its scale and
shift are sums over rows, as those of biases.
"""

import triton
import triton.language as tl

from kasmina_fx.lowerings.triton.chunks import (
    blame,
    blending,
    blocks_of,
    columns_kept,
    members,
    say,
)
from kasmina_fx.lowerings.triton.products import weights
from kasmina_fx.lowerings.triton.shared import normal

#: See :mod:`kasmina_fx.lowerings.triton.two_layer`.
WRITES = {
    "forward": {"out": None, "kept": "KEEP", "said": "NOTES"},
    "backward": {"dy": None, "sums": None},
}


@triton.jit
def averages(x, member, c: tl.constexpr, PER: tl.constexpr):
    """Return the mean of each seed's columns, in all of these; columns of no seed are 0 in ``x``.

    Numbers are divided before they are added, so that sums stay in range.
    """
    ROWS: tl.constexpr = x.shape[0]
    TILE: tl.constexpr = x.shape[1]
    x = x * (1.0 / c)
    if c == 1:
        mean = x
    elif PER == 1:
        mean = tl.broadcast_to(tl.sum(x, 1)[:, None], [ROWS, TILE])
    elif PER * c == TILE:
        own = tl.sum(tl.reshape(x, [ROWS, PER, c]), 2)
        mean = tl.reshape(tl.broadcast_to(own[:, :, None], [ROWS, PER, c]), [ROWS, TILE])
    else:
        mean = tl.zeros([ROWS, TILE], tl.float32)
        for p in tl.static_range(PER):
            mine = (member == p)[None, :]
            mean = tl.where(mine, tl.sum(tl.where(mine, x, 0.0), 1)[:, None], mean)
    return mean


@triton.jit
def normed(z, gain, more, member, on, c: tl.constexpr, PER: tl.constexpr):
    """Return LayerNorms without and with scale and shift, and one by the deviations.

    NaN where a variance is not finite; plain operators are NaN there or 0, as sums fall.
    """
    apart = tl.where(on[None, :], z - averages(z, member, c, PER), 0.0)
    variance = averages(apart * apart, member, c, PER)
    inverse = tl.where(variance < float("inf"), tl.math.rsqrt(variance + 1e-5), float("nan"))
    hat = apart * inverse
    return hat, hat * gain[None, :] + more[None, :], inverse


@triton.jit
def gelu(u, FAST: tl.constexpr):
    """Return GELU and its slope."""
    below, e = normal(u, FAST)
    return u * below, below + (0.3989422804014327 * u) * e


@triton.jit
def scales(
    gains, shifts, slot, member, member_h, on, sick,
    c: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    """Return scale and shift of a tile's columns, and which have a parameter that is not finite.

    Those of such seeds are 0. ``sick`` says the same of their other parameters.
    """
    inf = float("inf")
    i = tl.arange(0, sick.shape[0])
    gain = tl.load(gains + slot * c + i % c, mask=on, other=0.0).to(tl.float32)
    more = tl.load(shifts + slot * c + i % c, mask=on, other=0.0).to(tl.float32)
    ill = (~(tl.abs(gain) < inf) | ~(tl.abs(more) < inf)).to(tl.int32)
    ill = tl.maximum(ill, sick)
    sick = tl.max(tl.where(member[:, None] == member[None, :], ill[None, :], 0), 1)
    return tl.where(sick > 0, 0.0, gain), tl.where(sick > 0, 0.0, more), sick


@triton.jit
def forward(
    out, kept, said, order, seeds, alpha, roles, _positions, _modes, _loss_scale,
    gains, shifts, w1, b1, w2, b2,
    features, offset, first_seed, count, places, rows,
    c: tl.constexpr, h: tl.constexpr, PER: tl.constexpr, TILE: tl.constexpr, HIDDEN: tl.constexpr,
    ROWS: tl.constexpr, ALONE: tl.constexpr, KEEP: tl.constexpr, NOTES: tl.constexpr,
    DOT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Blend in place; put what was there aside in ``kept``, and what happened in ``said``."""
    inf = float("inf")
    PRODUCT: tl.constexpr = tl.float32 if DOT == 0 else (tl.bfloat16 if DOT == 1 else tl.float16)
    FAST: tl.constexpr = out.dtype.element_ty != tl.float32
    split, splits, active = tl.program_id(1), tl.num_programs(1), tl.num_programs(0) * PER
    member, place, seed, col, member_h, place_h = members(
        order, seeds, offset, active, c, h, PER, TILE, HIDDEN, EVEN
    )
    beside = columns_kept(member, c, PER, TILE, EVEN)
    on_h = place_h >= 0
    slot, slot_h = place // places, place_h // places
    on, a, blends = blending(alpha, roles, first_seed, seed, place)
    W1, B1, W2, B2, sick = weights(
        w1, b1, w2, b2, slot, slot_h, member, member_h, on, on_h, c, h, TILE, HIDDEN, 1, PRODUCT
    )
    gain, more, sick = scales(gains, shifts, slot, member, member_h, on, sick, c, PER)
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
        _, x, _ = normed(z, gain, more, member, on, c, PER)
        u = tl.dot(x.to(PRODUCT), W1, input_precision="ieee") + B1[None, :]
        hidden, _ = gelu(u, FAST)
        f = tl.dot(hidden.to(PRODUCT), W2, input_precision="ieee") + B2[None, :]
        if ALONE > 0:
            if tl.sum((~(tl.abs(f) < inf)).to(tl.int32)) > 0:
                for p in range(ALONE):
                    own = tl.where((member == p)[None, :], x, 0.0).to(PRODUCT)
                    u = tl.dot(own, W1, input_precision="ieee") + B1[None, :]
                    hidden, _ = gelu(tl.where((member_h == p)[None, :], u, 0.0), FAST)
                    made = tl.dot(hidden.to(PRODUCT), W2, input_precision="ieee") + B2[None, :]
                    f = tl.where((member == p)[None, :], made, f)
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
        say(
            said, order, seeds, active, split, count, squared, wrongs, unsounds, member, on, True,
            PER,
        )  # fmt: skip


@triton.jit
def backward(
    dy, sums, kept, order, seeds, alpha, roles, modes, loss_scale, gains, shifts, w1, b1, w2, b2,
    features, offset, first_seed, places, rows,
    c: tl.constexpr, h: tl.constexpr, PER: tl.constexpr, TILE: tl.constexpr, HIDDEN: tl.constexpr,
    ROWS: tl.constexpr, ALONE: tl.constexpr, DOT: tl.constexpr, P: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Change the gradient of the output into that of ``y`` in place; sum those of the slots."""
    inf = float("inf")
    PRODUCT: tl.constexpr = tl.float32 if DOT == 0 else (tl.bfloat16 if DOT == 1 else tl.float16)
    FAST: tl.constexpr = dy.dtype.element_ty != tl.float32
    split, splits, active = tl.program_id(1), tl.num_programs(1), tl.num_programs(0) * PER
    i, j = tl.arange(0, TILE), tl.arange(0, HIDDEN)
    member, place, seed, col, member_h, place_h = members(
        order, seeds, offset, active, c, h, PER, TILE, HIDDEN, EVEN
    )
    beside = columns_kept(member, c, PER, TILE, EVEN)
    on_h = place_h >= 0
    slot, slot_h = place // places, place_h // places
    on, a, blends = blending(alpha, roles, first_seed, seed, place)
    mode = tl.load(modes + place, mask=on, other=0)
    mode_h = tl.load(modes + place_h, mask=on_h, other=0)
    same = (member[:, None] == member_h[None, :]) & on[:, None] & on_h[None, :]
    same_t = (member_h[:, None] == member[None, :]) & on_h[:, None] & on[None, :]
    W1, B1, W2, B2, sick = weights(
        w1, b1, w2, b2, slot, slot_h, member, member_h, on, on_h, c, h, TILE, HIDDEN, 1, PRODUCT
    )
    gain, more, sick = scales(gains, shifts, slot, member, member_h, on, sick, c, PER)
    blends, trains = blends & (sick == 0), (mode == 2) & (sick == 0)
    # Of the mean of squared errors. In float16 such a small number would vanish: there the sums of
    # a slot are multiplied by it, at the end.
    weight = 2.0 * tl.load(loss_scale) / (1.0 * rows * c)
    at_once = weight if DOT != 2 else 1.0
    W1t, W2t = tl.trans(W1), tl.trans(W2)
    g1, g2 = tl.zeros([TILE, HIDDEN], tl.float32), tl.zeros([HIDDEN, TILE], tl.float32)
    gb1, gb2 = tl.zeros([ROWS, HIDDEN], tl.float32), tl.zeros([ROWS, TILE], tl.float32)
    ggain, gmore = tl.zeros([ROWS, TILE], tl.float32), tl.zeros([ROWS, TILE], tl.float32)
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
        hat, x, inverse = normed(z, gain, more, member, on, c, PER)
        u = tl.dot(x.to(PRODUCT), W1, input_precision="ieee") + B1[None, :]
        hidden, slope = gelu(u, FAST)
        f = tl.dot(hidden.to(PRODUCT), W2, input_precision="ieee") + B2[None, :]
        if ALONE > 0:
            if tl.sum((~(tl.abs(f) < inf)).to(tl.int32)) > 0:
                for p in range(ALONE):
                    own = tl.where((member == p)[None, :], x, 0.0).to(PRODUCT)
                    v = tl.dot(own, W1, input_precision="ieee") + B1[None, :]
                    v, steep = gelu(tl.where((member_h == p)[None, :], v, 0.0), FAST)
                    hidden = tl.where((member_h == p)[None, :], v, hidden)
                    slope = tl.where((member_h == p)[None, :], steep, slope)
                    made = tl.dot(v.to(PRODUCT), W2, input_precision="ieee") + B2[None, :]
                    f = tl.where((member == p)[None, :], made, f)
        f += z
        delta = f - z
        grown = (z + a[None, :] * delta).to(raw.dtype).to(tl.float32)
        fits = tl.abs(f.to(raw.dtype).to(tl.float32)) < inf
        blended = fits & (tl.abs(grown) < inf) & blends[None, :]
        error = tl.where(fits & (tl.abs(delta) < inf) & trains[None, :], delta, 0.0) * at_once
        df = tl.where(blended & (tl.abs(dz) < inf), a[None, :] * dz, error)
        df = tl.where(here, df, 0.0)
        dh = tl.dot(df.to(PRODUCT), W2t, input_precision="ieee") * slope
        dx = tl.dot(dh.to(PRODUCT), W1t, input_precision="ieee")
        if ALONE > 0:
            if tl.sum((~(tl.abs(dx) < inf)).to(tl.int32)) > 0:
                for p in range(ALONE):
                    mine = tl.where((member == p)[None, :], df, 0.0).to(PRODUCT)
                    back = tl.dot(mine, W2t, input_precision="ieee") * slope
                    back = tl.where((member_h == p)[None, :], back, 0.0)
                    dh = tl.where((member_h == p)[None, :], back, dh)
                    made = tl.dot(back.to(PRODUCT), W1t, input_precision="ieee")
                    dx = tl.where((member == p)[None, :], made, dx)
        dx = tl.where(on[None, :], dx, 0.0)
        ggain += dx * hat
        gmore += dx
        dx = dx * gain[None, :]
        along = averages(dx * hat, member, c, PER)
        dx = (dx - averages(dx, member, c, PER) - hat * along) * inverse + df
        sent = tl.abs(dx) < inf
        direct = tl.where(blended, dz - a[None, :] * dz, dz)
        total = direct + tl.where(sent & blends[None, :], dx, 0.0)
        tl.store(where, total.to(came.dtype), mask=here & blends[None, :])
        g1 = tl.dot(tl.trans(x.to(PRODUCT)), dh.to(PRODUCT), g1, input_precision="ieee")
        g2 = tl.dot(tl.trans(hidden.to(PRODUCT)), df.to(PRODUCT), g2, input_precision="ieee")
        gb1 += dh
        gb2 += df
        flags |= tl.where(here & ~sent, 1, 0) | tl.where(here & ~(tl.abs(z) < inf), 2, 0)
    # Of a stack, in the order of stacks: scale, shift, W1, b1, W2, b2. Not a product where nothing
    # is learnt: what is not finite would be 0 x Inf.
    base, row_of = sums + split * P, splits * P  # a place's parts lie together
    last = 1.0
    if DOT == 2:
        last = weight
    times, times_h = tl.where(mode == 2, last, 1.0), tl.where(mode_h == 2, last, 1.0)
    sum1 = tl.where(mode > 0, tl.sum(ggain, 0) * times, 0.0)
    sum2 = tl.where(mode > 0, tl.sum(gmore, 0) * times, 0.0)
    tl.store(base + place * row_of + i % c, sum1, mask=on)
    tl.store(base + place * row_of + c + i % c, sum2, mask=on)
    own1 = place_h[None, :] * row_of + 2 * c + (j % h)[None, :] * c + (i % c)[:, None]
    g1 = tl.where(mode[:, None] > 0, g1 * times[:, None], 0.0)
    tl.store(base + own1, g1, mask=same)
    BEHIND: tl.constexpr = 2 * c + h * c
    sum3 = tl.where(mode_h > 0, tl.sum(gb1, 0) * times_h, 0.0)
    tl.store(base + place_h * row_of + BEHIND + j % h, sum3, mask=on_h)
    own2 = place[None, :] * row_of + BEHIND + h + (i % c)[None, :] * h + (j % h)[:, None]
    g2 = tl.where(mode[None, :] > 0, g2 * times[None, :], 0.0)
    tl.store(base + own2, g2, mask=same_t)
    sum4 = tl.where(mode > 0, tl.sum(gb2, 0) * times, 0.0)
    tl.store(base + place * row_of + BEHIND + h + h * c + i % c, sum4, mask=on)
    no, bad = tl.max(flags & 1, 0).to(tl.float32), tl.max(flags & 2, 0).to(tl.float32)
    blame(base, order, active, no, bad, member, on, True, row_of, PER, P)

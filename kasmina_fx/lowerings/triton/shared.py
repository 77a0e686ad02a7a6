"""What kernels of whole rows share: where a tile lies, what it says, and activations.

A *tile* is ``PER`` neighbouring seeds of a bank's run, ``PER * c`` features of the output; tiles go
on to its left and right until all features are covered, those of other runs as if no seed ran.
"""

import triton
import triton.language as tl


@triton.jit
def columns(
    positions, tile, offset, count, features,
    c: tl.constexpr, PER: tl.constexpr, TILE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Return a tile's features, which of them exist, their seeds, and the places of these or -1."""
    i = tl.arange(0, TILE)
    first = offset + tile * (PER * c)
    if EVEN > 1:  # wide loads
        first = tl.multiple_of(first, EVEN)
    col, seed = first + i, tile * PER + i // c
    there = (i < PER * c) & (col >= 0) & (col < features)
    mine = there & (seed >= 0) & (seed < count)
    return col, there, seed, tl.load(positions + seed, mask=mine, other=-1)


@triton.jit
def say(
    said, positions, tile, split, count, squares, wrong, unsound, member, on,
    PER: tl.constexpr,
):  # fmt: skip
    """Write what a part of the rows says of each seed of a tile that runs: three sums of columns.

    ``said`` is float32 ``(splits, 3, count)``; the kernel ``report`` sums the parts.
    """
    for p in tl.static_range(PER):
        seed = tile * PER + p
        runs = (seed >= 0) & (seed < count)
        runs = runs & (tl.load(positions + seed, mask=runs, other=-1) >= 0)
        mine = (member == p) & on
        to = said + split * 3 * count + seed
        tl.store(to, tl.sum(tl.where(mine, squares, 0.0)), mask=runs)
        tl.store(to + count, tl.sum(tl.where(mine, wrong, 0.0)), mask=runs)
        tl.store(to + 2 * count, tl.sum(tl.where(mine, unsound, 0.0)), mask=runs)


@triton.jit
def blame(
    base, positions, tile, count, no, bad, member, on, row_of,
    PER: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Write at the end of a place's sums if something was refused, or its chunk was not finite.

    ``no`` and ``bad`` are float32, one a column; ``base`` is where the sums of this part begin,
    ``P`` numbers a place, and ``row_of`` how far it is to those of the next place.
    """
    for p in tl.static_range(PER):
        seed = tile * PER + p
        runs = (seed >= 0) & (seed < count)
        place = tl.load(positions + seed, mask=runs, other=-1)
        mine = (member == p) & on
        to = base + place * row_of + P - 2
        tl.store(to, tl.sum(tl.where(mine, no, 0.0)), mask=place >= 0)
        tl.store(to + 1, tl.sum(tl.where(mine, bad, 0.0)), mask=place >= 0)


@triton.jit
def first_left(sound, split, splits, full):
    """Return the first block of a part that is still to do: one that is not full, or all of them.

    Blocks below ``full`` have all their rows, and are done if all is ``sound``.
    """
    return tl.where(sound, full + (splits + split - full % splits) % splits, split)


@triton.jit
def block_of(
    y, block, rows, there, col, features, ROWS: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """Return a block of rows; behind the last one, any others."""
    row = tl.minimum(block * ROWS + tl.arange(0, ROWS), rows - 1).to(tl.int64)
    at = row[:, None] * features + col[None, :]
    if WHOLE:
        raw = tl.load(y + at)
    else:
        raw = tl.load(y + at, mask=(row >= 0)[:, None] & there[None, :], other=0.0)
    return raw


@triton.jit
def hyperbolic_tangent(x):
    """Return tanh of float32, to float32's precision at 0 too."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    q = x * x
    near = x * (1.0 + q * (-0.33333333 + q * (0.13333333 + q * (-0.05396825 + q * 0.02186949))))
    return tl.where(q < 0.04, near, tl.where(x < 0, -far, far))


@triton.jit
def logistic(x):
    """Return the sigmoid; a reciprocal would be several instructions, a root and a square two."""
    r = tl.math.rsqrt(1.0 + tl.exp(-x))
    return r * r


@triton.jit
def normal(x, FAST: tl.constexpr):
    """Return the normal distribution at ``x``, and ``exp(-x * x / 2)``.

    FAST has a relative error of 2e-5 at both ends, which a half type hides, in half as many
    instructions: Mills' ratio as a polynomial of ``1 / (1 + p |x|)``, the form of Hastings'
    approximations (Abramowitz and Stegun 7.1.26), fitted for that.
    """
    if FAST:
        e = tl.math.exp2(x * (x * -0.7213475204444817))
        r = tl.math.rsqrt(1.0 + 0.37 * tl.abs(x))
        k = r * r
        q = 0.07110561430454254 + k * (0.21612152457237244 - k * 0.09302368015050888)
        tail = e * (k * (0.1467253863811493 + k * (0.15906190872192383 + k * q)))
        below = tl.where(x < 0, tail, 1.0 - tail)
    else:
        e = tl.exp(-0.5 * x * x)
        below = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
    return below, e


@triton.jit
def activated(x, THEN: tl.constexpr, FAST: tl.constexpr):
    """Return what follows the blend: the number of an activation, as of ``rows.ACTIVATIONS``."""
    if THEN == 1:
        below, _ = normal(x, FAST)
        x = x * below
    elif THEN == 2:
        # 0.5 (1 + tanh a) is the sigmoid of 2 a.
        x = x * logistic(1.5957691216057308 * x * (1.0 + 0.044715 * (x * x)))
    elif THEN == 3:
        x = tl.where(x <= 0, 0.0, x)
    elif THEN == 4:
        x = x * logistic(x)
    elif THEN == 5:
        x = hyperbolic_tangent(x)
    elif THEN == 6:
        x = logistic(x)
    return x


@triton.jit
def sent_back(d, x, THEN: tl.constexpr, FAST: tl.constexpr):
    """Return the gradient of an activation's input ``x``, ``d`` being that of its output."""
    if THEN == 1:
        below, e = normal(x, FAST)
        d = d * (below + (0.3989422804014327 * x) * e)
    elif THEN == 2:
        q = x * x
        s = logistic(1.5957691216057308 * x * (1.0 + 0.044715 * q))
        d = d * (s + x * s * (1.0 - s) * (1.5957691216057308 + 0.2140644488 * q))
    elif THEN == 3:
        d = tl.where(x <= 0, 0.0, d)
    elif THEN == 4:
        s = logistic(x)
        d = d * (s * (1.0 + x * (1.0 - s)))
    elif THEN == 5:
        t = hyperbolic_tangent(x)
        d = d * (1.0 - t * t)
    elif THEN == 6:
        s = logistic(x)
        d = d * (s * (1.0 - s))
    return d

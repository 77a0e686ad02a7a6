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
    base, positions, tile, count, no, bad, member, on,
    PER: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Write at the end of a place's sums if something was refused, and if its chunk was not finite.

    ``no`` and ``bad`` are float32, one a column; ``base`` is where sums of ``P`` numbers begin.
    """
    for p in tl.static_range(PER):
        seed = tile * PER + p
        runs = (seed >= 0) & (seed < count)
        place = tl.load(positions + seed, mask=runs, other=-1)
        mine = (member == p) & on
        to = base + place * P + P - 2
        tl.store(to, tl.sum(tl.where(mine, no, 0.0)), mask=place >= 0)
        tl.store(to + 1, tl.sum(tl.where(mine, bad, 0.0)), mask=place >= 0)


@triton.jit
def hyperbolic_tangent(x):
    """Return tanh of float32, to float32's precision at 0 too."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    q = x * x
    near = x * (1.0 + q * (-0.33333333 + q * (0.13333333 + q * (-0.05396825 + q * 0.02186949))))
    return tl.where(q < 0.04, near, tl.where(x < 0, -far, far))


@triton.jit
def activated(x, THEN: tl.constexpr):
    """Return what follows the blend: the number of an activation, as of ``rows.ACTIVATIONS``."""
    if THEN == 1:
        x = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif THEN == 2:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        # 0.5 (1 + tanh a) is the sigmoid of 2 a.
        x = x * tl.sigmoid(2.0 * inner)
    elif THEN == 3:
        x = tl.where(x <= 0, 0.0, x)
    elif THEN == 4:
        x = x * tl.sigmoid(x)
    elif THEN == 5:
        x = hyperbolic_tangent(x)
    elif THEN == 6:
        x = tl.sigmoid(x)
    return x


@triton.jit
def sent_back(d, x, THEN: tl.constexpr):
    """Return the gradient of an activation's input ``x``, ``d`` being that of its output."""
    if THEN == 1:
        below = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
        d = d * (below + x * (0.3989422804014327 * tl.exp(-0.5 * x * x)))
    elif THEN == 2:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        s = tl.sigmoid(2.0 * inner)
        slope = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
        d = d * (s + 2.0 * x * s * (1.0 - s) * slope)
    elif THEN == 3:
        d = tl.where(x <= 0, 0.0, d)
    elif THEN == 4:
        s = tl.sigmoid(x)
        d = d * (s * (1.0 + x * (1.0 - s)))
    elif THEN == 5:
        t = hyperbolic_tangent(x)
        d = d * (1.0 - t * t)
    elif THEN == 6:
        s = tl.sigmoid(x)
        d = d * (s * (1.0 - s))
    return d

"""What kernels of active chunks share: whose the columns of a tile are, and what is said of seeds.

A *tile* is the chunks of ``PER`` active seeds, ``PER`` neighbours in ``order``, side by side; they
may lie anywhere in the output.
"""

import triton
import triton.language as tl

#: The bits of 1e30, as an integer: see :func:`most`.
FAR = tl.constexpr(0x7149F2CA)


@triton.jit
def columns(seed, offset, c: tl.constexpr, TILE: tl.constexpr, EVEN: tl.constexpr):
    """Return a tile's features in the output; ``EVEN`` neighbours of them lie together.

    Where that is one, the compiler is told of two: it lays lanes of a warp along a row then, and
    loads nothing wider, since addresses are multiples of one number. Else each load of a warp would
    touch 16 rows. Where it is more, lanes lie along rows already, and a forward that is told so
    loads more at once and takes a sixth longer (H100, Triton 3.6, chunks of 4). Triton 3.6 drops
    what it is told of an argument, so the features are computed here.
    """
    col = offset + seed * c + tl.arange(0, TILE) % c
    if EVEN == 1:
        col = tl.max_contiguous(col, 2)
    return col


@triton.jit
def columns_kept(
    member, c: tl.constexpr, PER: tl.constexpr, TILE: tl.constexpr, EVEN: tl.constexpr
):
    """Return where a tile's columns lie in what is kept: one after the other.

    The compiler sees that in the second form alone: see :func:`columns`.
    """
    i = tl.arange(0, TILE)
    if EVEN > 1:
        at = (tl.program_id(0) * PER + member) * c + i % c
    else:
        at = tl.program_id(0) * PER * c + i
    return at


@triton.jit
def members(
    order, seeds, offset, active,
    c: tl.constexpr, h: tl.constexpr, PER: tl.constexpr, TILE: tl.constexpr, HIDDEN: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Say whose each column of a tile is: member, place or -1, seed, and feature of the output.

    Then member and place of each hidden feature.
    """
    i, j = tl.arange(0, TILE), tl.arange(0, HIDDEN)
    member, member_h = i // c, j // h
    at, at_h = tl.program_id(0) * PER + member, tl.program_id(0) * PER + member_h
    place = tl.load(order + at, mask=(member < PER) & (at < active), other=-1)
    place_h = tl.load(order + at_h, mask=(member_h < PER) & (at_h < active), other=-1)
    seed = tl.load(seeds + place, mask=place >= 0, other=0)
    col = columns(seed, offset, c, TILE, EVEN)
    return member, place, seed, col, member_h, place_h


@triton.jit
def blending(alpha, roles, first_seed, seed, place):
    """Say which columns are somebody's, their alpha, and which of them blend."""
    on = place >= 0
    a = tl.load(alpha + first_seed + seed, mask=on, other=0.0)
    blends = tl.load(roles + first_seed + seed, mask=on, other=0) == 2
    return on, a, blends


@triton.jit
def blocks_of(place, rows, ROWS: tl.constexpr):
    """Return how many blocks of rows there are, whole or not, and how many are whole.

    There is none of a tile that is nobody's, as of an idle bank.
    """
    somebody = tl.max(place, 0) >= 0
    return tl.where(somebody, tl.cdiv(rows, ROWS), 0), tl.where(somebody, rows // ROWS, 0)


@triton.jit
def most(x):
    """Return the bits of the largest magnitude in ``x``: those of NaN and Inf are the largest.

    A warp finds the largest integer in one instruction; a sum of floats takes it ten.
    """
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)


@triton.jit
def say(
    said, order, seeds, active, split, count, squares, wrong, unsound, member, on, ill,
    PER: tl.constexpr,
):  # fmt: skip
    """Write what a part of the rows says of each seed of a tile: three sums of columns.

    ``said`` is float32 ``(splits, 3, count)``; the kernel ``report`` sums the parts. Unless
    something is ``ill``, the last two are zero.
    """
    for p in tl.static_range(PER):
        number = tl.program_id(0) * PER + p
        mine = (member == p) & on
        whose = tl.load(order + number, mask=number < active, other=-1)
        to = said + split * 3 * count + tl.load(seeds + whose, mask=whose >= 0, other=0)
        tl.store(to, tl.sum(tl.where(mine, squares, 0.0)), mask=whose >= 0)
        wrongs, unsounds = 0.0, 0.0
        if ill:
            wrongs = tl.sum(tl.where(mine, wrong, 0.0))
            unsounds = tl.sum(tl.where(mine, unsound, 0.0))
        tl.store(to + count, wrongs, mask=whose >= 0)
        tl.store(to + 2 * count, unsounds, mask=whose >= 0)


@triton.jit
def blame(
    base, order, active, no, bad, member, on, ill, row_of,
    PER: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Write at the end of a place's sums if something was refused, or its chunk was not finite.

    ``no`` and ``bad`` are float32, one a column, and zero unless something is ``ill``; ``base`` is
    where the sums of this part begin, ``P`` numbers a place, and ``row_of`` how far it is to those
    of the next place.
    """
    for p in tl.static_range(PER):
        number = tl.program_id(0) * PER + p
        mine = (member == p) & on
        whose = tl.load(order + number, mask=number < active, other=-1)
        to = base + whose * row_of + P - 2
        noes, bads = 0.0, 0.0
        if ill:
            noes, bads = tl.sum(tl.where(mine, no, 0.0)), tl.sum(tl.where(mine, bad, 0.0))
        tl.store(to, noes, mask=whose >= 0)
        tl.store(to + 1, bads, mask=whose >= 0)

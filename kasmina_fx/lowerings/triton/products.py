"""Blueprints of two products, ``act(x W1 + b1) W2 + b2``, with or without ``x +``, on a tile.

Weights of several seeds stand block-diagonally in registers, so that tensor cores do the products.
"""

import triton
import triton.language as tl


@triton.jit
def weights(
    w1, b1, w2, b2, slot, slot_h, member, member_h, on, on_h,
    c: tl.constexpr, h: tl.constexpr, TILE: tl.constexpr, HIDDEN: tl.constexpr,
    BIAS: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Return a tile's weights and biases, and the columns of seeds that have one not finite.

    Those of such seeds are 0.
    """
    inf = float("inf")
    i, j = tl.arange(0, TILE), tl.arange(0, HIDDEN)
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
    return W1.to(PRODUCT), B1, W2.to(PRODUCT), B2, sick


@triton.jit
def rectified(u, ACT: tl.constexpr):
    """Return ReLU of the hidden layer, NaN for NaN, where the blueprint has one."""
    if ACT == 1:
        u = tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return u


@triton.jit
def made(
    raw, z, W1, B1, W2, B2,
    ACT: tl.constexpr, RESIDUAL: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Return the hidden layer, before its ReLU and as it enters the second product, and the end."""
    ROWS: tl.constexpr = raw.shape[0]
    c1 = tl.broadcast_to(B1[None, :], ROWS, B1.shape[0])
    u = tl.dot(raw.to(PRODUCT), W1, c1, input_precision="ieee")
    hidden = rectified(u, ACT).to(PRODUCT)
    c2 = tl.broadcast_to(B2[None, :], ROWS, B2.shape[0])
    f = tl.dot(hidden, W2, c2, input_precision="ieee")
    if RESIDUAL:
        f += z
    return u, hidden, f


@triton.jit
def made_alone(
    raw, z, W1, B1, W2, B2, member, member_h,
    PER: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Return what :func:`made` does, seed by seed: a zero beside a NaN keeps nothing out."""
    u, hidden, f = made(raw, z, W1, B1, W2, B2, ACT, 0, PRODUCT)
    if PER > 1:
        for p in range(PER):
            x = tl.where((member == p)[None, :], raw, 0.0).to(PRODUCT)
            v = tl.dot(x, W1, input_precision="ieee") + B1[None, :]
            v = tl.where((member_h == p)[None, :], v, 0.0)
            own = rectified(v, ACT).to(PRODUCT)
            end = tl.dot(own, W2, input_precision="ieee") + B2[None, :]
            u = tl.where((member_h == p)[None, :], v, u)
            hidden = tl.where((member_h == p)[None, :], own, hidden)
            f = tl.where((member == p)[None, :], end, f)
    if RESIDUAL:
        f += z
    return u, hidden, f


@triton.jit
def back(df, u, W1t, W2t, ACT: tl.constexpr, PRODUCT: tl.constexpr):
    """Return the gradients of the hidden layer and, but for what is added, of the chunks."""
    dh = tl.dot(df.to(PRODUCT), W2t, input_precision="ieee")
    if ACT == 1:
        dh = tl.where(u > 0, dh, 0.0)
    dh = dh.to(PRODUCT)
    return dh, tl.dot(dh, W1t, input_precision="ieee")


@triton.jit
def back_alone(
    df, u, W1t, W2t, member, member_h,
    PER: tl.constexpr, ACT: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Return what :func:`back` does, seed by seed."""
    dh, dx = back(df, u, W1t, W2t, ACT, PRODUCT)
    if PER > 1:
        for p in range(PER):
            mine = tl.where((member == p)[None, :], df, 0.0)
            own, _ = back(mine, u, W1t, W2t, ACT, PRODUCT)
            own = tl.where((member_h == p)[None, :], own, 0.0).to(PRODUCT)
            dh = tl.where((member_h == p)[None, :], own, dh)
            end = tl.dot(own, W1t, input_precision="ieee")
            dx = tl.where((member == p)[None, :], end, dx)
    return dh, dx

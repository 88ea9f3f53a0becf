"""The Triton kernel of the scan's way back: the gradients of one chunk, from its ends.

Owns the arithmetic of the last pass; the two before it are those of triton_kernels, walked the
other way.
"""

import triton
import triton.language as tl

from mtair.scan.triton_kernels import pixel_at, step_size


@triton.jit
def _compose_before(a1, p1, b1, x1, a2, p2, b2, x2):
    """As _compose, and p·h + x is the state before the last step, free of cancellation."""
    return a1 * a2, a1 * p2, a2 * b1 + b2, p2 * b1 + x2


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def chunk_gradients(
    u, dt, A2, B, C, bias, starts, adjoints, dy, du, ddt, dA, dB, dC, length, height, width,
    channels, states, groups, chunks, rows, CROSS: tl.constexpr, SOFTPLUS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Pass 3 of the way back: gradients of one chunk from the state and the adjoint at its ends.

    Here a whole (short) chunk is one `[steps, channels]` tile, state by state: the adjoint walks
    against the states and needs all of them, and they fit in no other place on the chip.
    du, ddt `[N, L, G, d]`; dA `[N, G, chunks, S, d]`; dB, dC `[blocks of channels, N·L·G, S]`, a
    part for each block so that the sum has a fixed order. rows is N·L·G.
    """
    chunk = tl.program_id(0) % chunks
    task = tl.program_id(0) // chunks
    g = task % groups
    n = (task // groups).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    j = tl.arange(0, CHUNK)
    columns = g * 0
    backwards = g * 0
    if CROSS:
        columns = g % 2
        backwards = g // 2
    count = tl.minimum(CHUNK, length - chunk * CHUNK)
    place = chunk * CHUNK + tl.where(backwards == 1, count - 1 - j, j)
    in_c = c < channels
    in_t = j < count
    inside = in_t[:, None] & in_c[None, :]
    row = n * length + pixel_at(tl.where(in_t, place, 0), columns, height, width)
    pair = row * groups + g
    shared = pair
    if CROSS:
        shared = row
    at = pair[:, None] * channels + c[None, :]
    at_shared = shared[:, None] * channels + c[None, :]
    offset = tl.load(bias + g * channels + c, mask=in_c, other=0.0)[None, :]
    # A step of zero changes nothing: neither a state nor an adjoint that passes through it.
    step = tl.where(inside, step_size(dt, offset, at, inside, SOFTPLUS, ACC), 0.0)
    drive = step * tl.load(u + at_shared, mask=inside, other=0.0).to(ACC)
    o = tl.load(dy + at_shared, mask=inside, other=0.0).to(ACC)
    grad_step = tl.zeros((CHUNK, BLOCK_C), ACC)
    grad_drive = tl.zeros((CHUNK, BLOCK_C), ACC)
    ones = grad_step + 1.0
    zeros = tl.zeros((CHUNK, BLOCK_C), ACC)
    slot = (n * groups + g) * chunks + chunk
    part = tl.program_id(1).to(tl.int64) * rows
    for s in range(states):
        here = (slot * states + s) * channels + c
        a = tl.load(A2 + (g * states + s) * channels + c, mask=in_c, other=0.0)
        before = tl.load(starts + here, mask=in_c, other=0.0)
        after = tl.load(adjoints + here, mask=in_c, other=0.0)
        b = tl.load(B + pair * states + s, mask=in_t, other=0.0).to(ACC)[:, None]
        weight = tl.load(C + pair * states + s, mask=in_t, other=0.0).to(ACC)[:, None]
        decay = tl.exp2(step * a[None, :])
        _a, p, _b, x = tl.associative_scan((decay, ones, drive * b, zeros), 0, _compose_before)
        kept = decay * (x + p * before[None, :])
        _a, p, _b, x = tl.associative_scan(
            (decay, ones, decay * o * weight, zeros), 0, _compose_before, reverse=True
        )
        grad = o * weight + (x + p * after[None, :])
        through = grad * kept
        grad_step += through * a[None, :]
        grad_drive += grad * b
        tl.store(dA + here, tl.sum(through * step, axis=0), mask=in_c)
        to = (part + pair) * states + s
        tl.store(dB + to, tl.sum(grad * drive, axis=1), mask=in_t)
        tl.store(dC + to, tl.sum(o * (kept + drive * b), axis=1), mask=in_t)
    value = tl.load(u + at_shared, mask=inside, other=0.0).to(ACC)
    total = grad_step * 0.6931471805599453 + grad_drive * value
    if SOFTPLUS:
        total *= _sigmoid(tl.load(dt + at, mask=inside, other=0.0).to(ACC) + offset)
    tl.store(ddt + at, total, mask=inside)
    tl.store(du + at, grad_drive * step, mask=inside)

"""The Triton kernels of the selective scan: two passes over chunks, and the carries between them.

Owns the arithmetic on the chip; knows nothing of autograd, devices or block sizes. A map is
`[N, L, …]` in pixel order. A program walks one chunk of one group and keeps a `[states, channels]`
tile in registers: channels are the fast axis, one per lane, so a warp reads whole cache lines in
every direction, a pixel's sum over its states stays inside a lane, and a step needs no exchange.
A scan over a `[steps, channels]` tile (tl.associative_scan) would hold decay and drive of every
step in registers, for each state in turn, and do three multiplications where this does one.
With CROSS the groups are rows, columns, and the two backwards, over one shared map u.
The values exp(dt·A) underflow to 0 or to denormals, which a GPU computes at full speed.
"""

import triton
import triton.language as tl


@triton.jit
def _compose(a1, b1, a2, b2):
    """h → a1·h + b1, then h → a2·h + b2."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _softplus(x):
    """log(1 + e**x) to the last bits for any x: log(1 + e) alone loses those of a small e."""
    e = tl.exp(-tl.abs(x))
    w = 1.0 + e
    lost = e / tl.where(w == 1.0, 1.0, w - 1.0)
    return tl.maximum(x, 0.0) + tl.where(w == 1.0, e, tl.log(w) * lost)


@triton.jit
def pixel_at(place, columns, height, width):
    """The pixel at a place of the walk by rows or, where `columns` is 1, by columns."""
    return tl.where(columns == 1, (place % height) * width + place // height, place)


@triton.jit
def _next(pixel, stride, length):
    """One step on without a division: past an end, go on with the next column."""
    pixel += stride
    pixel = tl.where(pixel >= length, pixel - (length - 1), pixel)
    return tl.where(pixel < 0, pixel + (length - 1), pixel)


@triton.jit
def step_size(dt, bias, at, inside, SOFTPLUS: tl.constexpr, ACC: tl.constexpr):
    raw = tl.load(dt + at, mask=inside, other=0.0).to(ACC) + bias
    if SOFTPLUS:
        raw = _softplus(raw)
    return raw


# Told that channels is a multiple of 16, Triton would load the tile four channels to a lane and
# spread the states over lanes: shuffles, shared memory and barriers at every step.
_LANE_PER_CHANNEL = ["channels"]


@triton.jit(do_not_specialize=_LANE_PER_CHANNEL)
def chunk_ends(
    u, dt, A2, B, bias, ends, totals, length, height, width, channels, states, groups, chunks,
    CROSS: tl.constexpr, SOFTPLUS: tl.constexpr, ADJOINT: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Pass 1: what a chunk alone leaves behind, and its sum of dt, in the slot of the next chunk.

    ends `[N, G, chunks, S, d]`, totals `[N, G, chunks, d]`: exp(A·total) is the chunk's decay. The
    last chunk walked has no next one: it writes the zeros that the first one starts from. With
    ADJOINT the walk is the other way, u is dL/dy, B is C, and the state is dL/dh_t·exp(dt_t A).
    A2 is A·log2(e).
    """
    chunk = tl.program_id(0) % chunks
    task = tl.program_id(0) // chunks
    g = task % groups
    n = (task // groups).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    s = tl.arange(0, BLOCK_S)
    in_c = c < channels
    in_s = s < states
    tile = s[:, None] * channels + c[None, :]
    in_tile = in_s[:, None] & in_c[None, :]
    columns = g * 0
    backwards = g * 0 + ADJOINT
    if CROSS:
        columns = g % 2
        backwards = (g // 2) ^ ADJOINT
    place = chunk * CHUNK
    count = tl.minimum(CHUNK, length - place)
    pixel = pixel_at(place + (count - 1) * backwards, columns, height, width)
    stride = (1 + (width - 1) * columns) * (1 - 2 * backwards)
    slot = (chunk + 1 - 2 * backwards + chunks) % chunks
    first = (chunks - 1) * backwards
    count = tl.where(slot == first, 0, count)

    a = tl.load(A2 + g * states * channels + tile, mask=in_tile, other=0.0)
    offset = tl.load(bias + g * channels + c, mask=in_c, other=0.0)
    h = tl.zeros((BLOCK_S, BLOCK_C), ACC)
    total = tl.zeros((BLOCK_C,), ACC)
    for _ in range(count):
        row = n * length + pixel
        pair = row * groups + g
        step = step_size(dt, offset, pair * channels + c, in_c, SOFTPLUS, ACC)
        shared = pair
        if CROSS:
            shared = row
        x = tl.load(u + shared * channels + c, mask=in_c, other=0.0).to(ACC)
        b = tl.load(B + pair * states + s, mask=in_s, other=0.0).to(ACC)
        decay = tl.exp2(step[None, :] * a)
        if ADJOINT:
            h = decay * (h + x[None, :] * b[:, None])
        else:
            h = decay * h + (step * x)[None, :] * b[:, None]
        total += step
        pixel = _next(pixel, stride, length)
    to = (n * groups + g) * chunks + slot
    tl.store(ends + to * states * channels + tile, h, mask=in_tile)
    tl.store(totals + to * channels + c, total, mask=in_c)


@triton.jit
def chunk_starts(
    ends, totals, A2, channels, states, groups, chunks,
    CROSS: tl.constexpr, ADJOINT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Pass 2, in place: from what every chunk leaves to the state that every chunk starts from.

    BLOCK_K chunks at a time as a parallel scan: one after the other, each would wait for memory.
    """
    task = tl.program_id(0).to(tl.int64)
    g = task % groups
    backwards = g * 0 + ADJOINT
    if CROSS:
        backwards = (g // 2) ^ ADJOINT
    size = states * channels
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    a = tl.load(A2 + g * size + e, mask=e < size, other=0.0)
    state = tl.zeros((BLOCK_E,), ACC)
    for first in range(0, chunks, BLOCK_K):
        j = first + tl.arange(0, BLOCK_K)
        slot = task * chunks + tl.where(backwards == 1, chunks - 1 - j, j)
        inside = (j < chunks)[:, None] & (e < size)[None, :]
        at = ends + slot[:, None] * size + e[None, :]
        total = tl.load(
            totals + slot[:, None] * channels + (e % channels)[None, :], mask=inside, other=0.0
        )
        decay = tl.exp2(total * a[None, :])
        decay, h = tl.associative_scan((decay, tl.load(at, mask=inside, other=0.0)), 0, _compose)
        h += decay * state[None, :]
        tl.store(at, h, mask=inside)
        state = tl.sum(tl.where((j == first + BLOCK_K - 1)[:, None], h, 0.0), axis=0)


@triton.jit
def _walk(
    u, dt, A2, B, C, bias, starts, y, n, g, p, chunk, c, length, height, width, channels, states,
    groups, parts, chunks, BACKWARDS: tl.constexpr, CROSS: tl.constexpr, SOFTPLUS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One chunk of group g: y is written, or on the way backwards added to."""
    s = tl.arange(0, BLOCK_S)
    in_c = c < channels
    in_s = s < states
    tile = s[:, None] * channels + c[None, :]
    in_tile = in_s[:, None] & in_c[None, :]
    columns = g * 0
    if CROSS:
        columns = g % 2
    place = chunk * CHUNK
    count = tl.minimum(CHUNK, length - place)
    stride = 1 + (width - 1) * columns
    if BACKWARDS:
        place += count - 1
        stride = -stride
    pixel = pixel_at(place, columns, height, width)

    a = tl.load(A2 + g * states * channels + tile, mask=in_tile, other=0.0)
    offset = tl.load(bias + g * channels + c, mask=in_c, other=0.0)
    at = ((n * groups + g) * chunks + chunk) * states * channels
    h = tl.load(starts + at + tile, mask=in_tile, other=0.0)
    for _ in range(count):
        row = n * length + pixel
        pair = row * groups + g
        step = step_size(dt, offset, pair * channels + c, in_c, SOFTPLUS, ACC)
        shared = pair
        if CROSS:
            shared = row
        x = tl.load(u + shared * channels + c, mask=in_c, other=0.0).to(ACC)
        b = tl.load(B + pair * states + s, mask=in_s, other=0.0).to(ACC)
        h = tl.exp2(step[None, :] * a) * h + (step * x)[None, :] * b[:, None]
        weight = tl.load(C + pair * states + s, mask=in_s, other=0.0).to(ACC)
        out = tl.sum(h * weight[:, None], axis=0)
        to = y + (row * parts + p) * channels + c
        if BACKWARDS:
            out += tl.load(to, mask=in_c, other=0.0)
        tl.store(to, out, mask=in_c)
        pixel = _next(pixel, stride, length)


@triton.jit(do_not_specialize=_LANE_PER_CHANNEL)
def chunk_outputs(
    u, dt, A2, B, C, bias, starts, y, length, height, width, channels, states, groups, parts,
    chunks, CROSS: tl.constexpr, SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Pass 3: the chunk again from its right start; y `[N, L, parts, d]`.

    With CROSS one program takes a chunk there (group p) and back (group p + 2): the same pixels,
    so x and y of the way back are still in the cache, and each value of y has one owner, which
    adds in a fixed order. Rows and columns write a part each. So the sum is the same at every run,
    which atomic additions are not, and y moves five times: four parts, one per direction, would
    move it nine times, and columns waiting for rows would leave half the chip idle on one image.
    """
    chunk = tl.program_id(0) % chunks
    task = tl.program_id(0) // chunks
    p = task % parts
    n = (task // parts).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    _walk(
        u, dt, A2, B, C, bias, starts, y, n, p, p, chunk, c, length, height, width, channels,
        states, groups, parts, chunks, False, CROSS, SOFTPLUS, CHUNK, BLOCK_S, ACC,
    )  # fmt: skip
    if CROSS:
        # What is added to may have been written by another thread of this program.
        tl.debug_barrier()
        _walk(
            u, dt, A2, B, C, bias, starts, y, n, p + 2, p, chunk, c, length, height, width,
            channels, states, groups, parts, chunks, True, CROSS, SOFTPLUS, CHUNK, BLOCK_S, ACC,
        )  # fmt: skip

"""The scan of an image in four directions as one Numba kernel for the CPU, forward and backward.

Owns the compiled loops and their autograd function. Nothing is laid out four times: each direction
reads the pixels of the one map through strides, makes its step from the low-rank projection, scans,
and adds to the result. The inner dimension is a vector of channels, the recurrence runs along the
pixels, threads take (image, channels, rows or columns).
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit, prange
from torch import Tensor

from mtair.scan.numba_cpu import flat, use_torch_threads
from mtair.scan.simd import (
    LANES,
    exp2,
    float_mode,
    flush_denormals,
    load,
    prefetch,
    softplus,
    spread,
    store,
    total,
)

CHUNK = 32  # pixels between two saved states; the backward pass recomputes inside a chunk


@njit(inline="always")
def _walk(pair: int, back: int, width: int, length: int) -> tuple[int, int]:
    """The first pixel and the stride: pair 0 goes along rows, 1 along columns."""
    stride = width if pair == 1 else 1
    return (length - 1, -stride) if back == 1 else (0, stride)


@njit(inline="always")
def _next(p: int, stride: int, length: int) -> int:
    """The next pixel: past an end of a column, on with the next column."""
    p += stride
    if p >= length:
        return p - (length - 1)
    if p < 0:
        return p + (length - 1)
    return p


@njit
def aligned(size: int, like: Any) -> Any:
    """An empty array of the type of `like`, each of its vectors within one line of the cache."""
    room = np.empty(size + LANES, dtype=like.dtype)
    return room[(-room.ctypes.data % 64) // room.itemsize :]


# All arrays are flat; the shapes are those of `scan`, with d in blocks of LANES:
# W [4, d/LANES, R, LANES], A2 = A·log2(e) [4, d/LANES, S, LANES], skip [2, d] (0 for the columns),
# y and du [2, N, L, d] (rows and columns apart: no two threads add to one place),
# saved [N, 4, d/LANES, chunks, S, LANES].


@njit(parallel=True, cache=True)
def _forward(u, proj, W, A2, bias, skip, n, height, width, d, rank, states, y, saved):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    length = height * width
    blocks = d // LANES
    row = rank + 2 * states
    chunks = (length + CHUNK - 1) // CHUNK
    for task in prange(n * blocks * 2):
        i = task // (blocks * 2)
        k = task // 2 % blocks
        pair = task % 2
        mode = flush_denormals()
        h = aligned(states * LANES, y)
        steps = aligned(CHUNK * LANES, y)
        drives = aligned(CHUNK * LANES, y)
        outs = aligned(CHUNK * LANES, y)
        pixels = np.empty(CHUNK, dtype=np.int64)
        for back in range(2):
            g = pair + 2 * back
            gk = g * blocks + k
            h[:] = 0
            p, stride = _walk(pair, back, width, length)
            for chunk in range(chunks):
                count = min(CHUNK, length - chunk * CHUNK)
                if saved.size > 0:
                    place = ((i * 4 * blocks + gk) * chunks + chunk) * states * LANES
                    for s in range(states):
                        store(saved, place + s * LANES, load(h, s * LANES))
                for j in range(count):  # what does not wait for the pixel before
                    q = ((i * length + p) * 4 + g) * row
                    step = load(bias, gk * LANES)
                    for r in range(rank):
                        step = load(W, (gk * rank + r) * LANES) * spread(proj, q + r) + step
                    step = softplus(step)
                    x = load(u, (i * length + p) * d + k * LANES)
                    store(steps, j * LANES, step)
                    store(drives, j * LANES, step * x)
                    if back == 0:
                        store(outs, j * LANES, load(skip, pair * d + k * LANES) * x)
                    else:
                        at = ((pair * n + i) * length + p) * d + k * LANES
                        store(outs, j * LANES, load(y, at))
                    pixels[j] = p
                    ahead = p + CHUNK * stride
                    if pair == 1 and 0 <= ahead < length:
                        prefetch(u, (i * length + ahead) * d + k * LANES)
                        prefetch(proj, ((i * length + ahead) * 4 + g) * row)
                        prefetch(y, ((pair * n + i) * length + ahead) * d + k * LANES)
                    p = _next(p, stride, length)
                for s in range(states):  # the recurrence, its state in a register
                    a2 = load(A2, (gk * states + s) * LANES)
                    v = load(h, s * LANES)
                    for j in range(count):
                        q = ((i * length + pixels[j]) * 4 + g) * row + rank + s
                        decay = exp2(load(steps, j * LANES) * a2)
                        v = decay * v + load(drives, j * LANES) * spread(proj, q)
                        out = v * spread(proj, q + states) + load(outs, j * LANES)
                        store(outs, j * LANES, out)
                    store(h, s * LANES, v)
                for j in range(count):
                    at = ((pair * n + i) * length + pixels[j]) * d + k * LANES
                    store(y, at, load(outs, j * LANES))
        float_mode(mode)


@njit(parallel=True, cache=True)
def _backward(u, proj, W, A2, bias, skip, n, height, width, d, rank, states, saved, dy,  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
              du, dproj, dW, dA, dbias):  # noqa: ANN001  # fmt: skip
    """Gradients: du as y; dproj, dW, dA, dbias as their inputs, the last three of each image.

    All but du must come in as zeros. dA is with respect to A2·ln 2, that is to A.
    """
    length = height * width
    blocks = d // LANES
    row = rank + 2 * states
    chunks = (length + CHUNK - 1) // CHUNK
    # Constants of the arrays' own type: a float64 literal does not go with a float32 vector.
    ln2 = np.full(1, 0.6931471805599453, dtype=u.dtype)[0]
    minus_log2e = np.full(1, -1.4426950408889634, dtype=u.dtype)[0]
    for task in prange(n * 2):
        i = task // 2
        pair = task % 2
        mode = flush_denormals()
        zeros = np.zeros(LANES, dtype=u.dtype)
        ones = np.ones(LANES, dtype=u.dtype)
        trace = np.empty((CHUNK + 1) * states * LANES, dtype=u.dtype)
        decays = np.empty(CHUNK * states * LANES, dtype=u.dtype)
        steps = np.empty(CHUNK * LANES, dtype=u.dtype)
        pixels = np.empty(CHUNK, dtype=np.int64)
        gh = np.empty(states * LANES, dtype=u.dtype)  # dL/dh_t · exp(dt_t A)
        for task_in in range(2 * blocks):
            back = task_in // blocks
            k = task_in % blocks
            g = pair + 2 * back
            gk = g * blocks + k
            own = i * 4 * blocks + gk
            gh[:] = 0
            end, stride = _walk(pair, 1 - back, width, length)  # from its last pixel backwards
            for chunk in range(chunks - 1, -1, -1):
                count = min(CHUNK, length - chunk * CHUNK)
                for j in range(count - 1, -1, -1):
                    pixels[j] = end
                    end = _next(end, stride, length)
                place = (own * chunks + chunk) * states * LANES
                for s in range(states):
                    store(trace, s * LANES, load(saved, place + s * LANES))
                for j in range(count):
                    p = pixels[j]
                    q = ((i * length + p) * 4 + g) * row
                    step = load(bias, gk * LANES)
                    for r in range(rank):
                        step = load(W, (gk * rank + r) * LANES) * proj[q + r] + step
                    step = softplus(step)
                    store(steps, j * LANES, step)
                    drive = step * load(u, (i * length + p) * d + k * LANES)
                    for s in range(states):
                        decay = exp2(step * load(A2, (gk * states + s) * LANES))
                        store(decays, (j * states + s) * LANES, decay)
                        v = decay * load(trace, (j * states + s) * LANES)
                        v = v + drive * proj[q + rank + s]
                        store(trace, ((j + 1) * states + s) * LANES, v)
                for j in range(count - 1, -1, -1):
                    p = pixels[j]
                    q = ((i * length + p) * 4 + g) * row
                    at = (i * length + p) * d + k * LANES
                    to = ((pair * n + i) * length + p) * d + k * LANES
                    o, x, step = load(dy, at), load(u, at), load(steps, j * LANES)
                    drive = step * x
                    grad_drive, grad_step = load(zeros, 0), load(zeros, 0)
                    for s in range(states):
                        grad = o * proj[q + rank + states + s] + load(gh, s * LANES)
                        old = load(trace, (j * states + s) * LANES)
                        new = load(trace, ((j + 1) * states + s) * LANES)
                        dproj[q + rank + states + s] += total(o * new)
                        dproj[q + rank + s] += total(grad * drive)
                        grad_drive = grad * proj[q + rank + s] + grad_drive
                        through = grad * load(decays, (j * states + s) * LANES)
                        store(gh, s * LANES, through)
                        through = through * old
                        a = (gk * states + s) * LANES
                        grad_step = through * load(A2, a) + grad_step
                        a = (own * states + s) * LANES
                        store(dA, a, through * step + load(dA, a))
                    # softplus'(x) = 1 - exp(-softplus(x))
                    slope = load(ones, 0) - exp2(step * minus_log2e)
                    grad_step = (grad_step * ln2 + grad_drive * x) * slope
                    for r in range(rank):
                        dproj[q + r] += total(grad_step * load(W, (gk * rank + r) * LANES))
                        w = (own * rank + r) * LANES
                        store(dW, w, grad_step * proj[q + r] + load(dW, w))
                    store(dbias, own * LANES, grad_step + load(dbias, own * LANES))
                    if back == 0:
                        store(du, to, grad_drive * step + o * load(skip, pair * d + k * LANES))
                    else:
                        store(du, to, grad_drive * step + load(du, to))
        float_mode(mode)


def _blocks(x: Tensor) -> Tensor:
    """`[4, d, c]` → `[4, d / LANES, c, LANES]`."""
    return x.reshape(4, -1, LANES, x.shape[2]).transpose(2, 3)


def _unblocks(x: Tensor) -> Tensor:
    """The inverse of _blocks, the images in front summed up."""
    return x.sum(0).transpose(2, 3).reshape(4, -1, x.shape[3])


class _CrossScan(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]  # noqa: ANN205
        ctx: Any, x: Tensor, proj: Tensor, W: Tensor, A: Tensor, bias: Tensor, D: Tensor,
        height: int, width: int,
    ):  # fmt: skip
        n, length, d = x.shape
        rank, states = W.shape[2], A.shape[2]
        skip = torch.stack([D.sum(0), torch.zeros_like(D[0])])
        arrays = tuple(
            flat(t) for t in (x, proj, _blocks(W), _blocks(A * math.log2(math.e)), bias, skip)
        )
        sizes = (n, height, width, d, rank, states)
        chunks = -(-length // CHUNK) if any(ctx.needs_input_grad) else 0
        saved = np.empty(n * 4 * d * chunks * states, dtype=arrays[0].dtype)
        y = x.new_empty(2, n, length, d)
        use_torch_threads()
        _forward(*arrays, *sizes, flat(y), saved)
        if chunks:
            ctx.kept = (arrays, sizes, saved)
            ctx.save_for_backward(x)
        return y[0].add_(y[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        arrays, sizes, saved = ctx.kept
        (x,) = ctx.saved_tensors
        n, height, width, d, rank, states = sizes
        blocks = d // LANES
        du = x.new_empty(2, n, height * width, d)
        dproj = x.new_zeros(n, height * width, 4, rank + 2 * states)
        dW = x.new_zeros(n, 4, blocks, rank, LANES)
        dA = x.new_zeros(n, 4, blocks, states, LANES)
        dbias = x.new_zeros(n, 4, d)
        use_torch_threads()
        _backward(*arrays, *sizes, saved, flat(dy), *(flat(t) for t in (du, dproj, dW, dA, dbias)))
        dD = (dy * x).sum((0, 1)).expand(4, d)
        return du[0].add_(du[1]), dproj, _unblocks(dW), _unblocks(dA), dbias.sum(0), dD, None, None


def parts(
    y: Any, u: Any, projection: Any, dt_weight: Tensor, A: Tensor, dt_bias: Tensor, D: Tensor, *,
    n: int, height: int, width: int,
) -> None:  # fmt: skip
    """Scan a flat u without gradients, float32 or (as int16) bfloat16, into y `[2, N, L, d]`.

    y[0] is the sum of the two directions along rows, with the skip, and y[1] of the two along
    columns, float32: their own sum is what `scan` returns. d is a multiple of LANES, projection and
    the parameters float32.
    """
    _, d, rank = dt_weight.shape
    skip = torch.stack([D.sum(0), torch.zeros_like(D[0])])
    weights = (_blocks(dt_weight), _blocks(A * math.log2(math.e)), dt_bias, skip)
    use_torch_threads()
    _forward(
        u, projection, *(flat(t) for t in weights), n, height, width, d, rank, A.shape[2], y,
        np.empty(0, dtype=np.float32),
    )  # fmt: skip


def scan(
    x: Tensor, projection: Tensor, dt_weight: Tensor, A: Tensor, dt_bias: Tensor, D: Tensor, *,
    height: int, width: int,
) -> Tensor:  # fmt: skip
    """`mtair.scan.cross_scan` on the CPU, float32 or float64, all of one dtype."""
    d = x.shape[2]
    if pad := -d % LANES:
        x, dt_bias, D = (F.pad(t, (0, pad)) for t in (x, dt_bias, D))
        dt_weight, A = (F.pad(t, (0, 0, 0, pad)) for t in (dt_weight, A))
    y: Tensor = _CrossScan.apply(x, projection, dt_weight, A, dt_bias, D, height, width)
    return y[..., :d]

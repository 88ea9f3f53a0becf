"""The selective scan of sequences as a Numba kernel for the CPU, forward and backward.

Owns the compiled loops and their autograd function; knows neither modules nor mamba's layouts.
The inner dimension is a vector of channels; the recurrence runs along L; threads take (image,
group, channels). The scan of an image has a kernel of its own, which need not be given every step.
"""

import math
from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from numba import njit, prange
from torch import Tensor

from mtair.scan.simd import (
    LANES,
    exp2,
    float_mode,
    flush_denormals,
    load,
    softplus,
    store,
    total,
)

CHUNK = 32  # steps between two saved states; the backward pass recomputes inside a chunk


# All arrays are flat; the shapes are those of `scan`, with d in blocks of LANES:
# A2 = A·log2(e) [G, d/LANES, S, LANES], saved [N, G, d/LANES, chunks, S, LANES].


@njit(parallel=True, cache=True)
def _forward(u, dt, A2, B, C, bias, soft, n, length, groups, d, states, y, saved):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    blocks = d // LANES
    chunks = (length + CHUNK - 1) // CHUNK
    for task in prange(n * groups * blocks):
        gk = task % (groups * blocks)
        i, g, k = task // (groups * blocks), gk // blocks, gk % blocks
        mode = flush_denormals()
        h = np.zeros(states * LANES, dtype=u.dtype)
        none = np.zeros(LANES, dtype=u.dtype)
        for t in range(length):
            if saved.size > 0 and t % CHUNK == 0:
                place = (task * chunks + t // CHUNK) * states * LANES
                for s in range(states):
                    store(saved, place + s * LANES, load(h, s * LANES))
            at = ((i * length + t) * groups + g) * d + k * LANES
            q = ((i * length + t) * groups + g) * states
            step = load(dt, at) + load(bias, gk * LANES)
            if soft:
                step = softplus(step)
            drive = step * load(u, at)
            out = load(none, 0)
            for s in range(states):
                decay = exp2(step * load(A2, (gk * states + s) * LANES))
                v = decay * load(h, s * LANES) + drive * B[q + s]
                store(h, s * LANES, v)
                out = v * C[q + s] + out
            store(y, at, out)
        float_mode(mode)


@njit(parallel=True, cache=True)
def _backward(u, dt, A2, B, C, bias, soft, n, length, groups, d, states, saved, dy,  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
              du, ddt, dA, dB, dC):  # noqa: ANN001  # fmt: skip
    """Gradients of all inputs; dA of each image, ddt of dt before bias and softplus.

    dA, dB and dC must come in as zeros: the blocks of channels add to dB and dC one by one.
    """
    blocks = d // LANES
    chunks = (length + CHUNK - 1) // CHUNK
    # Constants of the arrays' own type: a float64 literal does not go with a float32 vector.
    ln2 = np.full(1, 0.6931471805599453, dtype=u.dtype)[0]
    minus_log2e = np.full(1, -1.4426950408889634, dtype=u.dtype)[0]
    for task in prange(n * groups):
        i, g = task // groups, task % groups
        mode = flush_denormals()
        zeros = np.zeros(LANES, dtype=u.dtype)
        ones = np.ones(LANES, dtype=u.dtype)
        trace = np.empty((CHUNK + 1) * states * LANES, dtype=u.dtype)
        decays = np.empty(CHUNK * states * LANES, dtype=u.dtype)
        steps = np.empty(CHUNK * LANES, dtype=u.dtype)
        gh = np.empty(states * LANES, dtype=u.dtype)  # dL/dh_t · exp(dt_t A)
        for k in range(blocks):
            gk = g * blocks + k
            own = i * groups * blocks + gk
            gh[:] = 0
            for chunk in range(chunks - 1, -1, -1):
                first = chunk * CHUNK
                count = min(CHUNK, length - first)
                place = (own * chunks + chunk) * states * LANES
                for s in range(states):
                    store(trace, s * LANES, load(saved, place + s * LANES))
                for j in range(count):
                    pixel = (i * length + first + j) * groups + g
                    at = pixel * d + k * LANES
                    step = load(dt, at) + load(bias, gk * LANES)
                    if soft:
                        step = softplus(step)
                    store(steps, j * LANES, step)
                    drive = step * load(u, at)
                    for s in range(states):
                        decay = exp2(step * load(A2, (gk * states + s) * LANES))
                        store(decays, (j * states + s) * LANES, decay)
                        v = decay * load(trace, (j * states + s) * LANES)
                        v = v + drive * B[pixel * states + s]
                        store(trace, ((j + 1) * states + s) * LANES, v)
                for j in range(count - 1, -1, -1):
                    pixel = (i * length + first + j) * groups + g
                    at = pixel * d + k * LANES
                    o, x, step = load(dy, at), load(u, at), load(steps, j * LANES)
                    drive = step * x
                    grad_drive, grad_step = load(zeros, 0), load(zeros, 0)
                    for s in range(states):
                        q = pixel * states + s
                        grad = o * C[q] + load(gh, s * LANES)
                        dC[q] += total(o * load(trace, ((j + 1) * states + s) * LANES))
                        dB[q] += total(grad * drive)
                        grad_drive = grad * B[q] + grad_drive
                        through = grad * load(decays, (j * states + s) * LANES)
                        store(gh, s * LANES, through)
                        through = through * load(trace, (j * states + s) * LANES)
                        grad_step = through * load(A2, (gk * states + s) * LANES) + grad_step
                        a = (own * states + s) * LANES
                        store(dA, a, through * step + load(dA, a))
                    grad_step = grad_step * ln2 + grad_drive * x
                    if soft:  # softplus'(x) = 1 - exp(-softplus(x))
                        grad_step = grad_step * (load(ones, 0) - exp2(step * minus_log2e))
                    store(ddt, at, grad_step)
                    store(du, at, grad_drive * step)
        float_mode(mode)


def flat(x: Tensor) -> Any:
    """All numbers of a tensor, in order, as the kernels take them."""
    return x.detach().contiguous().view(-1).numpy()


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]  # noqa: ANN205
        ctx: Any, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, bias: Tensor, soft: bool
    ):
        n, length, groups, d = u.shape
        states = A.shape[2]
        scaled = (A * math.log2(math.e)).reshape(groups, -1, LANES, states).transpose(2, 3)
        arrays = tuple(flat(t) for t in (u, dt, scaled, B, C, bias))
        sizes = (n, length, groups, d, states)
        chunks = -(-length // CHUNK) if any(ctx.needs_input_grad) else 0
        saved = np.empty(n * groups * d * chunks * states, dtype=arrays[0].dtype)
        y = u.new_empty(u.shape)
        use_torch_threads()
        _forward(*arrays, soft, *sizes, flat(y), saved)
        if chunks:
            ctx.kept = (arrays, soft, sizes, saved)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        arrays, soft, sizes, saved = ctx.kept
        n, length, groups, d, states = sizes
        du, ddt = dy.new_empty(dy.shape), dy.new_empty(dy.shape)
        dA = dy.new_zeros(n, groups, d // LANES, states, LANES)
        dB, dC = dy.new_zeros(n, length, groups, states), dy.new_zeros(n, length, groups, states)
        use_torch_threads()
        _backward(*arrays, soft, *sizes, saved, flat(dy), *(flat(t) for t in (du, ddt, dA, dB, dC)))
        grad_a = dA.sum(0).transpose(2, 3).reshape(groups, d, states)
        return du, ddt, grad_a, dB, dC, ddt.sum((0, 1)), None


def use_torch_threads() -> None:
    """Let Numba's threads be as many as PyTorch's."""
    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, most))
    # Numba's OpenMP pool, when it starts, sets the OpenMP thread count that PyTorch reads.
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, bias: Tensor, softplus: bool
) -> Tensor:
    """Scan every group: y `[N, L, G, d]`.

    u, dt `[N, L, G, d]`, dt before bias `[G, d]` and softplus; A `[G, d, S]`; B, C `[N, L, G, S]`.
    float32 or float64 on the CPU, all of one dtype.
    """
    d = u.shape[3]
    if pad := -d % LANES:
        u, dt, bias = (F.pad(x, (0, pad)) for x in (u, dt, bias))
        A = F.pad(A, (0, 0, 0, pad))
    y: Tensor = _Scan.apply(u, dt, A, B, C, bias, softplus)
    return y[..., :d]

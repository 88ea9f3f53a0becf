"""The selective scan as a Numba kernel for the CPU, forward and backward.

Owns the compiled loops and their autograd function; knows neither modules nor mamba's layouts.
Channels are the inner, vectorised loop; the recurrence runs along L; threads take (image, group).
A group visits pixels in one of four directions, read through the index alone: nothing is permuted.
"""

import math
from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, prange, types
from numba.extending import intrinsic, overload
from torch import Tensor

CHUNK = 32  # steps between two saved states; the backward pass recomputes inside a chunk
# All of fastmath but reassociation: the forward pass must not depend on which copy of a loop,
# vector or scalar, LLVM's run-time checks happen to choose.
_FAST = {"nnan", "ninf", "nsz", "arcp", "contract", "afn"}
LANES = 16  # channels of a block: one AVX-512 register of float32
LOG2E = np.float32(1.4426950408889634)


def _polynomial(function: Any, degree: int) -> tuple[np.float32, ...]:
    """Chebyshev fit on [0, 1], highest power first."""
    fit = np.polynomial.Chebyshev.interpolate(function, degree, domain=[0, 1])
    return tuple(np.float32(c) for c in fit.convert(kind=np.polynomial.Polynomial).coef[::-1])


_P0, _P1, _P2, _P3, _P4, _P5, _P6 = _polynomial(np.exp2, 6)
_Q0, _Q1, _Q2, _Q3, _Q4, _Q5, _Q6, _Q7, _Q8 = _polynomial(
    lambda e: np.where(e < 1e-12, 1.0, np.log1p(e) / np.maximum(e, 1e-300)), 8
)


@intrinsic
def _bits_to_float(typingctx: Any, bits: Any) -> Any:
    """Reinterpret an int32 as a float32."""
    del typingctx, bits

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


def _exp2(x: Any) -> Any:
    """2**x, vectorisable in float32: LLVM has no vector exp without SVML."""
    return 2.0**x


@overload(_exp2, jit_options={"fastmath": True}, inline="always")
def _exp2_typed(x: Any) -> Any:
    if x == types.float64:

        def exact(x: Any) -> Any:
            return math.exp(x * 0.6931471805599453)

        return exact

    def fast(x: Any) -> Any:
        # Below 2**-126 floats are denormal and a scan of them is ten times slower: stop there.
        x = min(max(x, np.float32(-126.0)), np.float32(126.0))
        # math.floor gives an int64, and with it the whole polynomial would be in float64.
        whole = np.floor(x)
        f = x - whole
        p = _P0 * f + _P1
        p = p * f + _P2
        p = p * f + _P3
        p = p * f + _P4
        p = p * f + _P5
        p = p * f + _P6
        bits = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23))
        return p * _bits_to_float(bits)  # type: ignore[call-arg]

    return fast


def _softplus(x: Any) -> Any:
    """log(1 + e**x), vectorisable in float32."""
    return math.log1p(math.exp(x))


@overload(_softplus, jit_options={"fastmath": True}, inline="always")
def _softplus_typed(x: Any) -> Any:
    if x == types.float64:

        def exact(x: Any) -> Any:
            return max(x, 0.0) + math.log1p(math.exp(-abs(x)))

        return exact

    def fast(x: Any) -> Any:
        e = _exp2(-abs(x) * LOG2E)
        q = _Q0 * e + _Q1
        q = q * e + _Q2
        q = q * e + _Q3
        q = q * e + _Q4
        q = q * e + _Q5
        q = q * e + _Q6
        q = q * e + _Q7
        q = q * e + _Q8
        return max(x, np.float32(0.0)) + q * e

    return fast


@njit(inline="always")
def _pixel(t: int, direction: int, height: int, width: int) -> int:
    """The pixel that `direction` visits at step t (see reference.direction_order)."""
    length = height * width
    if direction >= 2:
        t = length - 1 - t
    if direction % 2 == 1:
        return (t % height) * width + t // height
    return t


@njit(parallel=True, fastmath=_FAST, cache=True)
def _forward(u, dt, A2, B, C, directions, height, width, softplus, bias, y, saved):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """y and, where `saved` has room, the state before every chunk. A2 is A·log2(e)."""
    n_images, length, shared, blocks, _ = u.shape
    groups, _, n_states, _ = A2.shape
    for task in prange(n_images * groups * blocks):
        i = task // (groups * blocks)
        g = (task // blocks) % groups
        k = task % blocks
        gu = g % shared
        h = np.zeros((n_states, LANES), dtype=u.dtype)
        a = A2[g, k]
        step = np.empty(LANES, dtype=u.dtype)
        drive = np.empty(LANES, dtype=u.dtype)
        out = np.empty(LANES, dtype=u.dtype)
        forwards = directions[g] < 2
        p = 0 if forwards else length - 1
        stride = width if directions[g] % 2 == 1 else 1
        stride = stride if forwards else -stride
        for t in range(length):
            if saved.shape[2] > 0 and t % CHUNK == 0:
                saved[i, g, t // CHUNK, k] = h
            for c in range(LANES):
                step[c] = dt[i, p, g, k, c] + bias[g, k, c]
            if softplus:
                for c in range(LANES):
                    step[c] = _softplus(step[c])
            for c in range(LANES):
                drive[c] = step[c] * u[i, p, gu, k, c]
                out[c] = 0.0
            for s in range(n_states):
                b_ts = B[i, p, g, s]
                c_ts = C[i, p, g, s]
                for c in range(LANES):
                    v = _exp2(step[c] * a[s, c]) * h[s, c] + drive[c] * b_ts
                    h[s, c] = v
                    out[c] += v * c_ts
            for c in range(LANES):
                y[i, p, g, k, c] = out[c]
            # As _pixel would say, without its divisions: past an end, on with the next column.
            p += stride
            if p >= length:
                p -= length - 1
            elif p < 0:
                p += length - 1


@njit(parallel=True, fastmath=True, cache=True)
def _backward(u, dt, A2, B, C, directions, height, width, softplus, bias, saved, dy,  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
              du, ddt, dA, dB, dC):  # noqa: ANN001  # fmt: skip
    """Gradients of all inputs; dA per image, ddt with respect to dt before bias and softplus.

    dB and dC must come in as zeros: the blocks of channels add to them one after the other.
    """
    n_images, length, shared, blocks, _ = u.shape
    groups, _, n_states, _ = A2.shape
    # Constants of the arrays' own type: a float64 literal would widen the whole loop.
    zero = np.zeros(1, dtype=u.dtype)[0]
    one = np.ones(1, dtype=u.dtype)[0]
    ln2 = np.full(1, 0.6931471805599453, dtype=u.dtype)[0]
    log2e = np.full(1, 1.4426950408889634, dtype=u.dtype)[0]
    for task in prange(n_images * groups):
        i = task // groups
        g = task % groups
        gu = g % shared
        states = np.empty((CHUNK + 1, n_states, LANES), dtype=u.dtype)
        decays = np.empty((CHUNK, n_states, LANES), dtype=u.dtype)
        steps = np.empty((CHUNK, LANES), dtype=u.dtype)
        grad_drive = np.empty(LANES, dtype=u.dtype)
        grad_step = np.empty(LANES, dtype=u.dtype)
        for k in range(blocks):
            a = A2[g, k]
            grad_a = np.zeros((n_states, LANES), dtype=u.dtype)
            gh = np.zeros((n_states, LANES), dtype=u.dtype)  # dL/dh_t · exp(dt_t A)
            for chunk in range((length + CHUNK - 1) // CHUNK - 1, -1, -1):
                first = chunk * CHUNK
                n = min(CHUNK, length - first)
                states[0] = saved[i, g, chunk, k]
                for j in range(n):
                    p = _pixel(first + j, directions[g], height, width)
                    for c in range(LANES):
                        steps[j, c] = dt[i, p, g, k, c] + bias[g, k, c]
                    if softplus:
                        for c in range(LANES):
                            steps[j, c] = _softplus(steps[j, c])
                    for s in range(n_states):
                        b_ts = B[i, p, g, s]
                        for c in range(LANES):
                            w = _exp2(steps[j, c] * a[s, c])
                            decays[j, s, c] = w
                            states[j + 1, s, c] = (
                                w * states[j, s, c] + steps[j, c] * u[i, p, gu, k, c] * b_ts
                            )
                for j in range(n - 1, -1, -1):
                    p = _pixel(first + j, directions[g], height, width)
                    for c in range(LANES):
                        grad_drive[c] = zero
                        grad_step[c] = zero
                    for s in range(n_states):
                        b_ts = B[i, p, g, s]
                        c_ts = C[i, p, g, s]
                        grad_b = zero
                        grad_c = zero
                        for c in range(LANES):
                            o = dy[i, p, g, k, c]
                            grad = gh[s, c] + o * c_ts
                            grad_c += o * states[j + 1, s, c]
                            grad_b += grad * steps[j, c] * u[i, p, gu, k, c]
                            grad_drive[c] += grad * b_ts
                            through = grad * decays[j, s, c]
                            gh[s, c] = through
                            through *= states[j, s, c]
                            grad_step[c] += through * a[s, c]
                            grad_a[s, c] += through * steps[j, c]
                        dB[i, p, g, s] += grad_b
                        dC[i, p, g, s] += grad_c
                    for c in range(LANES):
                        total = grad_step[c] * ln2 + grad_drive[c] * u[i, p, gu, k, c]
                        if softplus:
                            total *= one - _exp2(-steps[j, c] * log2e)
                        ddt[i, p, g, k, c] = total
                        du[i, p, g, k, c] = grad_drive[c] * steps[j, c]
            dA[i, g, k] = grad_a


def _lanes(x: Tensor) -> Any:
    """`[…, d]` → NumPy `[…, d / LANES, LANES]`: the inner loop has a length the compiler knows."""
    return x.numpy().reshape(*x.shape[:-1], x.shape[-1] // LANES, LANES)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]  # noqa: ANN205
        ctx: Any, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, bias: Tensor,
        softplus: bool, directions: tuple[int, ...], height: int, width: int,
    ):  # fmt: skip
        u, dt, B, C, bias = (x.detach().contiguous() for x in (u, dt, B, C, bias))
        scaled = (A.detach() * math.log2(math.e)).transpose(1, 2).contiguous()  # [G, S, d]
        groups, n_states, d = scaled.shape
        order = np.array(directions, dtype=np.int64)
        chunks = -(-dt.shape[1] // CHUNK) if any(ctx.needs_input_grad) else 0
        saved = _lanes(u.new_empty((dt.shape[0], groups, chunks, n_states, d))).swapaxes(3, 4)
        saved = np.ascontiguousarray(saved)  # [N, G, chunks, d / LANES, S, LANES]
        y = torch.empty_like(dt)
        lanes = np.ascontiguousarray(_lanes(scaled).swapaxes(1, 2))  # [G, d / LANES, S, LANES]
        args = (order, height, width, softplus, _lanes(bias))
        _use_torch_threads()
        _forward(_lanes(u), _lanes(dt), lanes, B.numpy(), C.numpy(), *args, _lanes(y), saved)
        ctx.save_for_backward(u, dt, B, C)
        ctx.args = (lanes, args, saved)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        u, dt, B, C = ctx.saved_tensors
        lanes, args, saved = ctx.args
        groups, _, n_states, _ = lanes.shape
        du, ddt = torch.empty_like(dt), torch.empty_like(dt)
        dA = np.empty((u.shape[0], *lanes.shape), dtype=lanes.dtype)
        dB, dC = torch.zeros_like(B), torch.zeros_like(C)
        _use_torch_threads()
        _backward(  # type: ignore[call-arg]
            _lanes(u), _lanes(dt), lanes, B.numpy(), C.numpy(), *args, saved,
            _lanes(dy.contiguous()), _lanes(du), _lanes(ddt), dA, dB.numpy(), dC.numpy(),
        )  # fmt: skip
        if u.shape[2] == 1:
            du = du.sum(2, keepdim=True)
        grad_a = torch.from_numpy(dA.sum(0)).transpose(2, 3).reshape(groups, -1, n_states)
        return du, ddt, grad_a, dB, dC, ddt.sum((0, 1)), None, None, None, None


def _use_torch_threads() -> None:
    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, most))
    # Numba's OpenMP pool, when it starts, sets the OpenMP thread count that PyTorch reads.
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, bias: Tensor, softplus: bool,
    directions: tuple[int, ...], height: int, width: int,
) -> Tensor:  # fmt: skip
    """Scan every group in its own direction: y `[N, L, G, d]`, L = height·width, pixel order.

    u `[N, L, G or 1, d]`; dt `[N, L, G, d]` before bias `[G, d]` and softplus; A `[G, d, S]`;
    B, C `[N, L, G, S]`. float32 or float64 on the CPU, all of one dtype.
    """
    d = u.shape[3]
    if d % LANES:
        pad = LANES - d % LANES
        u, dt, bias = (F.pad(x, (0, pad)) for x in (u, dt, bias))
        A = F.pad(A, (0, 0, 0, pad))
    y: Tensor = _Scan.apply(u, dt, A, B, C, bias, softplus, directions, height, width)  # type: ignore[no-untyped-call]
    return y[..., :d]

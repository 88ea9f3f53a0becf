"""Numba kernels of the fused forward pass on a CPU: what stands between two matrix products.

Owns the compiled loops; knows no module and no tensor. Maps are flat arrays in NHWC order, float32
or (as int16) bfloat16; between reading and writing all is float32. Each kernel takes a map apart
in segments of a row, which stay in the cache from the depth-wise convolution to the result. No
product is fused with a sum: see `_FAST` in scan/simd.py.
"""

import math

import numpy as np
from numba import njit, prange

from mtair.scan.simd import LANES, gelu, load, sigmoid, splat, spread, store, total

SEGMENT = 32  # pixels
SLOTS = SEGMENT + 8  # of a segment's buffer: slot 0 takes what is not wanted; `_products` goes by 8
ZERO, ONE, EPSILON = np.float32(0), np.float32(1), np.float32(1e-5)


@njit(cache=True)
def _moments(x, at, y, channels):
    """Mean and 1 / standard deviation of x + y at `at`, as LayerNorm takes them; y may be empty."""
    share = ONE / np.float32(channels)
    both = y.size > 0
    s = splat(ZERO)
    for k in range(0, channels, LANES):
        v = load(x, at + k)
        if both:
            v = v + load(y, at + k)
        s = s + v
    mean = total(s) * share
    s = splat(ZERO)
    for k in range(0, channels, LANES):
        v = load(x, at + k)
        if both:
            v = v + load(y, at + k)
        v = v - mean
        s = v * v + s
    return mean, ONE / np.float32(math.sqrt(total(s) * share + EPSILON))


@njit(parallel=True, cache=True)
def layer_norm(x, weight, bias, pixels, channels, out):
    """LayerNorm of each pixel: x and out `[pixels, channels]`."""
    nothing = np.empty(0, dtype=np.float32)
    for task in prange((pixels + SEGMENT - 1) // SEGMENT):
        for p in range(task * SEGMENT, min(pixels, task * SEGMENT + SEGMENT)):
            at = p * channels
            mean, scale = _moments(x, at, nothing, channels)
            for k in range(0, channels, LANES):
                v = (load(x, at + k) - mean) * scale
                store(out, at + k, v * load(weight, k) + load(bias, k))


@njit(parallel=True, cache=True)
def norm_gate(
    y, z, gate, gate_row, gate_at, weight, bias, pixels, channels, out, out_row, out_at
):  # fmt: skip
    """`LayerNorm(y + z) · silu(gate)`: y and z `[pixels, channels]`; the others rows of a map."""
    for task in prange((pixels + SEGMENT - 1) // SEGMENT):
        for p in range(task * SEGMENT, min(pixels, task * SEGMENT + SEGMENT)):
            at = p * channels
            mean, scale = _moments(y, at, z, channels)
            for k in range(0, channels, LANES):
                v = (load(y, at + k) + load(z, at + k) - mean) * scale
                g = load(gate, p * gate_row + gate_at + k)
                v = (v * load(weight, k) + load(bias, k)) * (g * sigmoid(g))
                store(out, p * out_row + out_at + k, v)


@njit(cache=True)
def _depthwise(x, row, at, place, taps, taps_row, taps_at, channels, out, out_row, out_at):
    """A 3x3 depth-wise convolution of one segment, into the slots from 1 on of its buffer `out`.

    x `[N, H, W, row]` from column `at`, taps `[9, taps_row]` from column `taps_at`, `place` as
    `_place` gives it. Goes along the row with one unfinished sum in each of two registers.
    """
    image, y, first, count, height, width = place
    middle = (image * height + y) * width
    above = middle - width if y > 0 else middle
    below = middle + width if y + 1 < height else middle
    has_above = ONE if y > 0 else ZERO
    has_below = ONE if y + 1 < height else ZERO
    for k in range(0, channels, LANES):
        t = taps_at + k
        w00 = load(taps, t) * has_above
        w01 = load(taps, taps_row + t) * has_above
        w02 = load(taps, 2 * taps_row + t) * has_above
        w10 = load(taps, 3 * taps_row + t)
        w11 = load(taps, 4 * taps_row + t)
        w12 = load(taps, 5 * taps_row + t)
        w20 = load(taps, 6 * taps_row + t) * has_below
        w21 = load(taps, 7 * taps_row + t) * has_below
        w22 = load(taps, 8 * taps_row + t) * has_below
        here, before = splat(ZERO), splat(ZERO)  # the sums of this pixel and of the one before
        start = first - 1 if first > 0 else first
        stop = min(first + count + 1, width)
        for p in range(start, stop):
            a = load(x, (above + p) * row + at + k)
            b = load(x, (middle + p) * row + at + k)
            c = load(x, (below + p) * row + at + k)
            if p >= first:
                slot = (p - first) * out_row + out_at + k
                store(out, slot, a * w02 + before + (b * w12 + c * w22))
            before = a * w01 + here + (b * w11 + c * w21)
            here = a * w00 + b * w10 + c * w20
        if first + count == width:
            store(out, count * out_row + out_at + k, before)


@njit(cache=True)
def _place(task, height, width):
    """Image, row, first column and length of a segment, and the map's own size."""
    segments = (width + SEGMENT - 1) // SEGMENT
    first = task % segments * SEGMENT
    row = task // segments
    return row // height, row % height, first, min(SEGMENT, width - first), height, width


@njit(parallel=True, cache=True)
def depthwise_gelu_gate(x, taps, n, height, width, hidden, out):
    """`gelu(a)·b` of the depth-wise convolution [a, b] of x `[N, H, W, 2 hidden]`."""
    for row in prange(n * height):
        buffer = np.empty(SLOTS * 2 * LANES, dtype=np.float32)
        segments = (width + SEGMENT - 1) // SEGMENT
        for s in range(segments):
            place = _place(row * segments + s, height, width)
            pixel = row * width + place[2]
            for k in range(0, hidden, LANES):
                for half in range(2):
                    at = half * hidden + k
                    _depthwise(
                        x, 2 * hidden, at, place, taps, 2 * hidden, at, LANES,
                        buffer, 2 * LANES, half * LANES,
                    )  # fmt: skip
                for i in range(place[3]):
                    slot = (i + 1) * 2 * LANES
                    v = gelu(load(buffer, slot)) * load(buffer, slot + LANES)
                    store(out, (pixel + i) * hidden + k, v)


@njit(cache=True)
def _products(x, at, x_i, x_j, y, y_at, y_j, count, out, out_at, out_i):
    """Add to eight vectors `out[out_at + i·out_i]` the sums over j of x[i, j] · vector y[j]."""
    o = out_at
    v0, v1, v2, v3 = (
        load(out, o), load(out, o + out_i), load(out, o + 2 * out_i), load(out, o + 3 * out_i)
    )  # fmt: skip
    o += 4 * out_i
    v4, v5, v6, v7 = (
        load(out, o), load(out, o + out_i), load(out, o + 2 * out_i), load(out, o + 3 * out_i)
    )  # fmt: skip
    for j in range(count):
        y_vector = load(y, y_at + j * y_j)
        p = at + j * x_j
        v0 = spread(x, p) * y_vector + v0
        v1 = spread(x, p + x_i) * y_vector + v1
        v2 = spread(x, p + 2 * x_i) * y_vector + v2
        v3 = spread(x, p + 3 * x_i) * y_vector + v3
        p += 4 * x_i
        v4 = spread(x, p) * y_vector + v4
        v5 = spread(x, p + x_i) * y_vector + v5
        v6 = spread(x, p + 2 * x_i) * y_vector + v6
        v7 = spread(x, p + 3 * x_i) * y_vector + v7
    o = out_at
    store(out, o, v0)
    store(out, o + out_i, v1)
    store(out, o + 2 * out_i, v2)
    store(out, o + 3 * out_i, v3)
    o += 4 * out_i
    store(out, o, v4)
    store(out, o + out_i, v5)
    store(out, o + 2 * out_i, v6)
    store(out, o + 3 * out_i, v7)


@njit(parallel=True, cache=True)
def depthwise_silu_project(
    x, row, at, taps, bias, weight, n, height, width, channels, rows, u, projection
):  # fmt: skip
    """`u = silu(depthwise(x) + bias)` and its product with `weight`, before a selective scan.

    x `[N, H, W, row]` from column `at`; weight `[channels, rows, up to a multiple of LANES]`;
    u `[N, H, W, channels]`; projection `[N, H, W, rows]`.
    """
    wide = (rows + LANES - 1) // LANES * LANES
    for line in prange(n * height):
        buffer = np.zeros(SLOTS * channels, dtype=np.float32)
        product = np.empty(SLOTS * wide, dtype=np.float32)
        segments = (width + SEGMENT - 1) // SEGMENT
        for s in range(segments):
            place = _place(line * segments + s, height, width)
            count = place[3]
            pixel = line * width + place[2]
            _depthwise(x, row, at, place, taps, channels, 0, channels, buffer, channels, 0)
            for i in range(count):
                for k in range(0, channels, LANES):
                    v = load(buffer, (i + 1) * channels + k) + load(bias, k)
                    v = v * sigmoid(v)
                    store(buffer, (i + 1) * channels + k, v)
                    store(u, (pixel + i) * channels + k, v)
            product[:] = 0
            for i in range(0, count, 8):
                for k in range(0, wide, LANES):
                    _products(
                        buffer, (i + 1) * channels, channels, 1, weight, k, wide, channels,
                        product, i * wide + k, wide,
                    )  # fmt: skip
            for i in range(count):
                for k in range(rows):
                    projection[(pixel + i) * rows + k] = product[i * wide + k]


@njit(cache=True)
def _gate_by_match(buffer, slot, channels, heads, temperature, out):
    """`sigmoid(cos(q, k)·temperature)·v` of one pixel, head by head; its q, k, v from `slot` on."""
    c = channels // heads
    floor = np.float32(1e-12)
    for head in range(heads):
        qk, qq, kk = ZERO, ZERO, ZERO
        for i in range(slot + head * c, slot + head * c + c):
            q, k = buffer[i], buffer[i + channels]
            qk += q * k
            qq += q * q
            kk += k * k
        lengths = max(np.float32(math.sqrt(qq)), floor) * max(np.float32(math.sqrt(kk)), floor)
        gate = ONE / (ONE + np.float32(math.exp(-qk / lengths * temperature[head])))
        for i in range(head * c, head * c + c):
            out[i] = buffer[slot + 2 * channels + i] * gate


@njit(parallel=True, cache=True)
def depthwise_attention(
    q, q_row, kv, kv_row, kv_at, taps, n, height, width, channels, heads, temperature, bands,
    scores, lengths, out, out_row,
):  # fmt: skip
    """The depth-wise convolutions of q, k and v, and all of channel attention that needs pixels.

    q in columns from 0 of q `[N, H, W, q_row]`, k and v from `kv_at` on in kv. Writes v to the
    first columns of out `[N, H, W, out_row]` and, where `temperature` is not empty, v gated by the
    match of q and k to the columns behind. Adds, for each band of rows, the products q kᵀ to
    scores `[N, bands, heads, c up to 8s, c up to 16s]` and the squares to lengths
    `[N, bands, 2, channels]`. Bands, not threads: the order of the sums is always the same.
    """
    c = channels // heads
    across = (c + 7) // 8 * 8
    along = (c + LANES - 1) // LANES * LANES
    row = 3 * channels + LANES
    segments = (width + SEGMENT - 1) // SEGMENT
    for task in prange(n * bands):
        image, band = task // bands, task % bands
        buffer = np.zeros(SLOTS * row, dtype=np.float32)
        gated = np.empty(channels, dtype=np.float32)
        for line in range(image * height + band * height // bands,
                          image * height + (band + 1) * height // bands):  # fmt: skip
            for s in range(segments):
                place = _place(line * segments + s, height, width)
                count = place[3]
                _depthwise(q, q_row, 0, place, taps, 3 * channels, 0, channels, buffer, row, 0)
                _depthwise(
                    kv, kv_row, kv_at, place, taps, 3 * channels, channels, 2 * channels,
                    buffer, row, channels,
                )  # fmt: skip
                for i in range(count):
                    slot = (i + 1) * row
                    to = (line * width + place[2] + i) * out_row
                    for k in range(0, channels, LANES):
                        store(out, to + k, load(buffer, slot + 2 * channels + k))
                    if temperature.size > 0:
                        _gate_by_match(buffer, slot, channels, heads, temperature, gated)
                        for k in range(0, channels, LANES):
                            store(out, to + channels + k, load(gated, k))
                for k in range(0, 2 * channels, LANES):
                    length = task * 2 * channels + k
                    v = load(lengths, length)
                    for i in range(count):
                        x = load(buffer, (i + 1) * row + k)
                        v = x * x + v
                    store(lengths, length, v)
                for head in range(heads):
                    for i in range(0, across, 8):
                        for k in range(0, along, LANES):
                            _products(
                                buffer, row + head * c + i, 1, row,
                                buffer, row + channels + head * c + k, row, count,
                                scores, ((task * heads + head) * across + i) * along + k, along,
                            )  # fmt: skip

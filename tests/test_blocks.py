"""The blocks of the network: their counts, and each in float64 against its equations."""

import math

import numpy as np
import pytest
import torch
from networks import on_meta, parameters

from mtair import blocks
from mtair.blocks import GDFN, MDTA, MTDN, SS2D, LayerNorm, PromptGenBlock, TransformerBlock

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("width", "plain", "dual"),
    [
        (48, 31_279, 72_367),
        (96, 117_871, 241_519),
        (192, 456_349, 869_533),
        (384, 1_796_299, 3_286_219),
    ],
)
def test_parameters_of_a_block(width, plain, dual):
    assert parameters(on_meta(lambda: TransformerBlock(width, 1, 2.66))) == plain
    assert parameters(on_meta(lambda: MTDN(width, 1, 2.66, 16, 2.0, "concat"))) == dual


@pytest.mark.parametrize(
    ("width", "count"), [(48, 36_480), (96, 105_216), (192, 339_456), (384, 1_195_008)]
)
def test_parameters_of_the_spatial_branch(width, count):
    assert parameters(on_meta(lambda: SS2D(width, 16, 2.0))) == count


# Blocks, in float64, against the equations


def random_block(block, seed=0):
    """The block in float64 with every parameter random, temperatures and norms too."""
    generator = torch.Generator().manual_seed(seed)
    for p in block.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5
    return block.double().eval()


def weights(module):
    return {name: p.detach().numpy() for name, p in module.named_parameters()}


def map_of(n, c, h, w):
    return np.random.default_rng(3).standard_normal((n, c, h, w))


def conv1x1(x, w):
    return np.einsum("oi,nihw->nohw", w[:, :, 0, 0], x)


def depthwise3x3(x, w):
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    out = np.zeros(x.shape)
    for c, i, j in np.ndindex(x.shape[1:]):
        out[:, c, i, j] = (padded[:, c, i : i + 3, j : j + 3] * w[c, 0]).sum((1, 2))
    return out


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def layer_norm(x, weight, bias, axis):
    shape = [-1 if a == axis else 1 for a in range(x.ndim)]
    centred = x - x.mean(axis, keepdims=True)
    unit = centred / np.sqrt((centred**2).mean(axis, keepdims=True) + 1e-5)
    return unit * weight.reshape(shape) + bias.reshape(shape)


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@torch.inference_mode()
def assert_block_is(block, x, want):
    got = block(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-11 * np.abs(want).max())


def test_layer_norm_is_over_the_channels_of_a_pixel():
    block, x = random_block(LayerNorm(6)), map_of(2, 6, 3, 5)
    assert_block_is(block, x, layer_norm(x, *weights(block).values(), axis=1))


def test_mdta_is_attention_between_channels():
    heads, block, x = 2, random_block(MDTA(8, 2)), map_of(2, 8, 3, 5)
    p = weights(block)
    q, k, v = np.split(depthwise3x3(conv1x1(x, p["qkv.weight"]), p["qkv_dwconv.weight"]), 3, axis=1)
    out = np.zeros(x.shape)
    for n, head in np.ndindex(2, heads):
        mine = slice(head * 4, head * 4 + 4)
        a, b, c = (t[n, mine].reshape(4, -1) for t in (q, k, v))
        a /= np.linalg.norm(a, axis=1, keepdims=True)
        b /= np.linalg.norm(b, axis=1, keepdims=True)
        attention = softmax(a @ b.T * p["temperature"][head])
        out[n, mine] = (attention @ c).reshape(4, 3, 5)
    assert_block_is(block, x, conv1x1(out, p["project_out.weight"]))


def test_gdfn_gates_one_half_by_the_other():
    block, x = random_block(GDFN(8, 2.66)), map_of(2, 8, 3, 5)
    p = weights(block)
    assert p["project_out.weight"].shape[1] == 21  # int(8 · 2.66)
    a, b = np.split(depthwise3x3(conv1x1(x, p["project_in.weight"]), p["dwconv.weight"]), 2, axis=1)
    assert_block_is(block, x, conv1x1(gelu(a) * b, p["project_out.weight"]))


def directional_scan(x, dt, A, B, C):
    """`h = exp(dt A) h + dt B x`, `y = C h` of `[L, d]` sequences, step by step."""
    h, y = np.zeros(A.shape), np.zeros(x.shape)
    for t in range(len(x)):
        h = np.exp(dt[t, :, None] * A) * h + (dt[t] * x[t])[:, None] * B[t]
        y[t] = h @ C[t]
    return y


def naive_ss2d(p, x, rank, states):
    """One image `[C, H, W]` through MambaIR's equations."""
    h, w = x.shape[1:]
    inner, gate = np.split(np.einsum("oc,chw->ohw", p["in_proj.weight"], x), 2)
    inner = depthwise3x3(inner[None], p["conv2d.weight"])[0] + p["conv2d.bias"][:, None, None]
    inner = inner * sigmoid(inner)
    rows = [(i, j) for i in range(h) for j in range(w)]
    columns = [(i, j) for j in range(w) for i in range(h)]
    A, D = -np.exp(p["A_logs"]), p["Ds"]
    d = len(inner)
    y = np.zeros(inner.shape)
    for k, path in enumerate([rows, columns, rows[::-1], columns[::-1]]):
        sequence = np.array([inner[:, i, j] for i, j in path])
        low = sequence @ p["x_proj_weight"][k].T
        dt = low[:, :rank] @ p["dt_projs_weight"][k].T + p["dt_projs_bias"][k]
        B, C = low[:, rank : rank + states], low[:, rank + states :]
        own = slice(k * d, k * d + d)
        out = directional_scan(sequence, np.log1p(np.exp(dt)), A[own], B, C) + D[own] * sequence
        for (i, j), value in zip(path, out, strict=True):
            y[:, i, j] += value
    y = layer_norm(y, p["out_norm.weight"], p["out_norm.bias"], axis=0)
    return np.einsum("oc,chw->ohw", p["out_proj.weight"], y * gate * sigmoid(gate))


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_ss2d_scans_in_four_directions(backend):
    block, x = random_block(SS2D(20, 3, 1.5)), map_of(2, 20, 3, 4)
    block.scan_backend = backend
    p = weights(block)
    assert_block_is(block, x, np.stack([naive_ss2d(p, one, rank=2, states=3) for one in x]))


def test_blocks_add_their_branches_to_their_input():
    x = torch.from_numpy(map_of(1, 8, 4, 4))
    for fuse in ("concat", "sum"):
        block = random_block(MTDN(8, 2, 2.0, 2, 1.0, fuse))
        n = block.norm1(x)
        channel, spatial = block.attn(n), block.ssm(n)
        if fuse == "concat":
            left, right = block.fuse.weight[:, :, 0, 0].split(8, dim=1)
            channel = torch.einsum("oc,nchw->nohw", left, channel)
            spatial = torch.einsum("oc,nchw->nohw", right, spatial)
        middle = x + channel + spatial
        torch.testing.assert_close(block(x), middle + block.ffn(block.norm2(middle)))


def naive_prompt(p, x, heads):
    """S-C PB on a map of the bank's own size, so that nothing is resized."""
    n, c, h, w = x.shape
    share = softmax(x.mean((2, 3)) @ p["linear_layer.weight"].T + p["linear_layer.bias"])
    prompt = np.einsum("nl,ldhw->ndhw", share, p["prompt_param"][0])
    padded = np.pad(prompt, ((0, 0), (0, 0), (1, 1), (1, 1)))
    near = np.stack([padded[:, :, i : i + h, j : j + w] for i in range(3) for j in range(3)])
    kernel = p["conv3x3.weight"].reshape(*p["conv3x3.weight"].shape[:2], 9)
    prompt = conv1x1(np.einsum("oik,knihw->nohw", kernel, near), p["align.weight"])
    nx = layer_norm(x, p["norm_x.body.weight"], p["norm_x.body.bias"], axis=1)
    np_ = layer_norm(prompt, p["norm_p.body.weight"], p["norm_p.body.bias"], axis=1)
    q = depthwise3x3(conv1x1(nx, p["q.weight"]), p["q_dwconv.weight"])
    k, v = np.split(depthwise3x3(conv1x1(np_, p["kv.weight"]), p["kv_dwconv.weight"]), 2, axis=1)
    q, k, v = (t.reshape(n, heads, c // heads, h * w) for t in (q, k, v))

    def unit(t, axis):
        return t / np.linalg.norm(t, axis=axis, keepdims=True)

    scores = unit(q, 3) @ unit(k, 3).swapaxes(2, 3)
    channel = softmax(scores * p["temperature_channel"]) @ v
    match = (unit(q, 2) * unit(k, 2)).sum(2, keepdims=True)
    spatial = sigmoid(match * p["temperature_spatial"]) * v
    both = np.concatenate([channel.reshape(n, c, h, w), spatial.reshape(n, c, h, w)], axis=1)
    return x + conv1x1(both, p["project_out.weight"])


def test_prompt_block_crosses_feature_and_prompt():
    block, x = random_block(PromptGenBlock(6, 3, 5, 8, 2, 2.0)), map_of(2, 8, 5, 5)
    middle = naive_prompt(weights(block), x, heads=2)
    with torch.inference_mode():
        t = torch.from_numpy(middle)
        want = (t + block.ffn(block.norm2(t))).numpy()
    assert_block_is(block, x, want)


def test_resampling_blocks_have_the_published_widths():
    x = torch.rand(1, 48, 8, 8)
    assert blocks.Downsample(48, 96)(x).shape == (1, 96, 4, 4)
    assert blocks.Upsample(48, 24, kernel=1)(x).shape == (1, 24, 16, 16)
    assert parameters(blocks.Downsample(48, 96)) == 48 * 24 * 9
    assert parameters(blocks.Upsample(96, 48, kernel=3)) == 96 * 192 * 9

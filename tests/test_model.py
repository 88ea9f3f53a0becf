"""The network: its counts, its shapes, its blocks against the equations."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

import mtair
from mtair import MTAIR, Dimensions, blocks
from mtair.blocks import GDFN, MDTA, MTDN, SS2D, LayerNorm, PromptGenBlock, TransformerBlock
from mtair.model import Stage

CONFIGS = Path(__file__).parents[1] / "configs/models"
BASE = {
    "widths": (48, 96, 192, 384), "depths": (4, 6, 6, 8), "refinement": 4, "heads": (1, 2, 4, 8),
    "ffn_expansion": 2.66, "prompt_dims": (64, 128, 320, 320), "prompt_sizes": (128, 64, 32, 16),
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def dimensions(name):
    return Dimensions.from_dict(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def on_meta(build):
    with torch.device("meta"):
        return build()


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(1)
    return MTAIR(dimensions("tiny")).eval()


def image(n, h, w, seed=0):
    return torch.rand(n, 3, h, w, generator=torch.Generator().manual_seed(seed))


# Counts


def test_base_is_the_published_shape():
    assert parameters(on_meta(lambda: MTAIR(dimensions("base")))) == 43_011_610
    assert dimensions("base") == Dimensions(**BASE)


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


def test_parameters_of_the_prompt_blocks():
    net = on_meta(lambda: MTAIR(Dimensions(**BASE)))
    millions = [
        round(parameters(p) / 1e6, 3) for p in (net.prompt1, net.prompt2, net.prompt3, net.prompt4)
    ]
    assert millions == [5.317, 2.909, 3.116, 3.401]


@pytest.mark.parametrize(
    ("change", "millions"),
    [
        ({"mamba_stages": ()}, 40.869),
        ({"mamba_stages": ("enc3", "latent", "dec3", "refinement")}, 58.241),
        ({"mamba_stages": get_args(Stage)}, 60.384),
        ({"fuse": "sum"}, 42.699),
        ({"prompt_len": 0}, 28.269),
    ],
)
def test_parameters_of_the_variants(change, millions):
    net = on_meta(lambda: MTAIR(Dimensions(**BASE | change)))
    assert parameters(net) / 1e6 == pytest.approx(millions, abs=0.0011)


def test_base_has_two_branches_where_resolution_is_high():
    net = on_meta(lambda: MTAIR(Dimensions(**BASE)))
    stages = {
        "encoder_level1": (MTDN, 4), "encoder_level2": (MTDN, 6),
        "encoder_level3": (TransformerBlock, 6), "latent": (TransformerBlock, 8),
        "decoder_level3": (TransformerBlock, 6), "decoder_level2": (MTDN, 6),
        "decoder_level1": (MTDN, 4), "refinement": (TransformerBlock, 4),
    }  # fmt: skip
    for name, (kind, depth) in stages.items():
        assert [type(block) for block in getattr(net, name)] == [kind] * depth, name


def multiply_accumulates(name, monkeypatch):
    """GMAC at 256x256: what PyTorch counts, the scan's steps, and 4.5 for each state element."""
    states = steps = 0

    def count(x, projection, dt_weight, A, dt_bias, D, *, height, width, backend):
        nonlocal states, steps
        states += x.numel() * 4 * A.shape[-1]
        steps += x.numel() * 4 * dt_weight.shape[-1]
        return torch.zeros_like(x)

    monkeypatch.setattr(blocks, "cross_scan", count)
    net = on_meta(lambda: MTAIR(dimensions(name)))
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 3, 256, 256, device="meta"))
    assert states > 0
    return counter.get_total_flops() / 2e9 + (4.5 * states + steps) / 1e9


@pytest.mark.parametrize(
    ("name", "least", "budget"),
    [
        ("tiny", 1.0, 2.0),
        ("small", 4.0, 16.0),
        ("base", 250.0, 265.45),
    ],
)
def test_cost_of_a_256_pixel_square_keeps_to_the_budget(name, least, budget, monkeypatch):
    assert least < multiply_accumulates(name, monkeypatch) <= budget


# The whole network


@pytest.mark.parametrize(("h", "w"), [(1, 1), (8, 8), (17, 23), (32, 32), (24, 40)])
@torch.inference_mode()
def test_any_size_comes_out_as_it_went_in(tiny, h, w):
    out = tiny(image(2, h, w))
    assert out.shape == (2, 3, h, w)
    assert out.isfinite().all()
    assert not torch.equal(out, image(2, h, w))


def test_gradients_reach_every_parameter():
    torch.manual_seed(2)
    net = MTAIR(dimensions("tiny"))
    (net(image(2, 32, 48)) - image(2, 32, 48, seed=1)).abs().mean().backward()
    silent = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@torch.inference_mode()
def test_layout_of_the_input_does_not_matter(tiny):
    x = image(2, 32, 48)
    got = tiny(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(got, tiny(x), atol=1e-6, rtol=0)


@torch.inference_mode()
def test_an_image_does_not_depend_on_its_batch(tiny):
    x = image(2, 32, 48)
    torch.testing.assert_close(tiny(x), torch.cat([tiny(x[:1]), tiny(x[1:])]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("h", "w", "mode"), [(17, 23, "reflect"), (5, 40, "edge"), (1, 1, "edge")])
@torch.inference_mode()
def test_odd_sizes_are_padded_right_and_below_and_cropped(tiny, h, w, mode):
    x = image(1, h, w)
    pad = ((0, 0), (0, 0), (0, -h % 16), (0, -w % 16))
    padded = torch.from_numpy(np.pad(x.numpy(), pad, mode=mode))
    torch.testing.assert_close(tiny(x), tiny(padded)[:, :, :h, :w], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("h", "w"), [(1, 1), (17, 23), (32, 32)])
@torch.inference_mode()
def test_without_a_residual_the_image_is_untouched(h, w):
    net = MTAIR(dimensions("tiny")).eval()
    net.output.weight.zero_()
    assert torch.equal(net(image(1, h, w)), image(1, h, w))


@torch.inference_mode()
def test_the_stride_is_the_size_that_needs_no_padding(tiny, monkeypatch):
    assert tiny.stride == 16
    assert on_meta(lambda: MTAIR(Dimensions(**BASE))).stride == 8
    without_pad = SimpleNamespace(**{**vars(torch.nn.functional), "pad": None})
    monkeypatch.setattr("mtair.model.F", without_pad)
    assert tiny(image(1, 16, 32)).shape == (1, 3, 16, 32)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["tiny", "small"])
def test_the_shipped_networks_stay_near_float32_in_float16(name):
    """Which holds numbers up to 65504 alone: many pixels may not be summed in it."""
    x = torch.rand(1, 3, 128, 192, generator=torch.Generator().manual_seed(1))
    wide, low = mtair.load_model(name).float(), mtair.load_model(name).half()
    with torch.inference_mode():
        assert (low(x).float() - wide(x)).abs().max() < 5e-3


def test_bfloat16_stays_near_float32(tiny):
    low = MTAIR(tiny.dims).eval()
    low.load_state_dict(tiny.state_dict())
    x = image(1, 32, 32)
    residual, got = tiny(x) - x, low.bfloat16()(x.bfloat16()) - x
    assert (got - residual).abs().max() < 0.05 * residual.abs().max() + 1 / 128


# Dimensions


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"widths": (48, 96, 192)}, "widths"),
        ({"widths": (50, 96, 192, 384)}, "widths"),
        ({"widths": (48, 96, 192, 0)}, "widths"),
        ({"widths": 48}, "widths"),
        ({"depths": (4, 6, 6, 8, 1)}, "depths"),
        ({"depths": (4, 6, 6, -1)}, "depths"),
        ({"depths": (4, 6, 6, 1.5)}, "depths"),
        ({"refinement": -1}, "refinement"),
        ({"heads": (1, 2, 4, 0)}, "heads"),
        ({"heads": (1, 2, 5, 8)}, "heads"),
        ({"heads": ("1", "2", "4", "8")}, "heads"),
        ({"prompt_dims": (64,)}, "prompt_dims"),
        ({"prompt_sizes": (128, 64, 32, 0)}, "prompt_sizes"),
        ({"prompt_len": -1}, "prompt_len"),
        ({"prompt_heads": 5}, "prompt_heads"),
        ({"prompt_heads": 0}, "prompt_heads"),
        ({"d_state": 0}, "d_state"),
        ({"expand": 0}, "expand"),
        ({"expand": "2"}, "expand"),
        ({"ffn_expansion": math.nan}, "ffn_expansion"),
        ({"prompt_ffn_expansion": -1.0}, "prompt_ffn_expansion"),
        ({"stem": 3}, "stem"),
        ({"fuse": "gate"}, "fuse"),
        ({"mamba_stages": ("enc1", "enc9")}, "mamba_stages.*enc9"),
        ({"width": 48}, "width"),
    ],
)
def test_a_dimension_that_does_not_fit_is_named(change, field):
    with pytest.raises(ValueError, match=field):
        Dimensions.from_dict(BASE | change)


@pytest.mark.parametrize("field", BASE)
def test_a_dimension_that_is_missing_is_named(field):
    with pytest.raises(ValueError, match=field):
        Dimensions.from_dict({k: v for k, v in BASE.items() if k != field})


def test_dimensions_survive_yaml():
    dims = Dimensions(**BASE, mamba_stages=("enc1",), fuse="sum", stem=2)
    as_lists = {k: list(v) if isinstance(v, tuple) else v for k, v in dims.to_dict().items()}
    assert Dimensions.from_dict(yaml.safe_load(yaml.safe_dump(as_lists))) == dims


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

"""The network: its counts, its shapes, its dimensions."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
import yaml
from networks import on_meta, parameters
from torch.utils.flop_counter import FlopCounterMode

import mtair
from mtair import MTAIR, Dimensions, blocks
from mtair.blocks import MTDN, TransformerBlock
from mtair.model import Stage

CONFIGS = Path(__file__).parents[1] / "configs/models"
BASE = {
    "widths": (48, 96, 192, 384), "depths": (4, 6, 6, 8), "refinement": 4, "heads": (1, 2, 4, 8),
    "ffn_expansion": 2.66, "prompt_dims": (64, 128, 320, 320), "prompt_sizes": (128, 64, 32, 16),
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def dimensions(name):
    return Dimensions.from_dict(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))


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

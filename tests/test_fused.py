"""The fused pass on a CPU: every block, and the network, against the plain pass that trains."""

import copy
import secrets
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import mtair
from mtair import MTAIR, Dimensions, fused
from mtair.blocks import MTDN, PromptGenBlock, TransformerBlock, Upsample
from mtair.evaluate import psnr

CONFIGS = Path(__file__).parents[1] / "configs/models"
SIZES = ((1, 1), (1, 40), (33, 2), (5, 7), (3, 70), (12, 64), (40, 33))
BLOCKS = {
    "plain": lambda: TransformerBlock(48, 2, 2.66),
    "heads of 12": lambda: TransformerBlock(48, 4, 2.0),
    "dual": lambda: MTDN(32, 1, 2.0, 2, 1.0, "concat"),
    "dual, summed, 16 states": lambda: MTDN(48, 2, 2.0, 16, 2.0, "sum"),
    "prompt": lambda: PromptGenBlock(16, 5, 8, 32, 4, 1.0),
    "prompt, odd hidden width": lambda: PromptGenBlock(12, 3, 4, 48, 4, 2.66),
}
SMALL_BASE = {  # the published shape in small: 3x3 upsampling, no stem, a wide decoder
    "widths": (16, 32, 48, 64), "depths": (1, 2, 1, 1), "refinement": 1, "heads": (1, 2, 3, 4),
    "ffn_expansion": 2.66, "prompt_dims": (8, 8, 8, 8), "prompt_sizes": (8, 8, 4, 4), "d_state": 4,
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def seed() -> int:
    """Fresh inputs at every run; the assertions name the seed that failed."""
    return secrets.randbelow(2**31)


def perturbed(module, seed):
    """Weights away from their start: temperatures, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return module.eval()


def feature_map(seed, n, c, h, w, dtype=torch.float32):
    x = torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def plainly(module, *inputs):
    """The pass that trains: with gradients, nothing is fused."""
    with torch.enable_grad():
        return module(*inputs).detach()


def relative(got, want):
    return float((got.float() - want).abs().max() / want.abs().max())


def channels(block):
    return block.norm2.body.weight.numel()


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(("h", "w"), SIZES)
@torch.no_grad()
def test_a_fused_block_equals_the_plain_one(name, h, w, seed):
    torch.manual_seed(seed)
    block = perturbed(BLOCKS[name](), seed)
    x = feature_map(seed, 2, channels(block), h, w)
    assert fused.runs_on(x)
    assert relative(block(x), plainly(block, x)) < 1e-5, f"seed {seed}"


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_a_fused_block_in_bfloat16_errs_no_more_than_the_plain_one(name, seed):
    torch.manual_seed(seed)
    block = perturbed(BLOCKS[name](), seed)
    low = copy.deepcopy(block).bfloat16()
    x = feature_map(seed, 2, channels(block), 24, 40, torch.bfloat16)
    want = plainly(block, x.float())
    got, plain = (y.float() - want for y in (low(x), plainly(low, x)))
    assert got.square().mean() < 1.2 * plain.square().mean(), f"seed {seed}"


@torch.no_grad()
def test_a_block_leaves_its_input_alone(seed):
    for build in BLOCKS.values():
        block = perturbed(build(), seed)
        x = feature_map(seed, 1, channels(block), 9, 9)
        kept = x.clone()
        block(x)
        assert torch.equal(x, kept)


def test_gradients_take_the_plain_pass(seed):
    block = BLOCKS["dual"]()
    x = feature_map(seed, 1, 32, 6, 6)
    assert not fused.runs_on(x)
    block(x).sum().backward()
    assert all(p.grad is not None for p in block.parameters())


@torch.no_grad()
def test_autocast_takes_the_plain_pass():
    x = feature_map(0, 1, 32, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert not fused.runs_on(x)


@torch.no_grad()
def test_a_width_that_fills_no_vector_takes_the_plain_pass():
    assert not fused.runs_on(torch.zeros(1, 40, 8, 8))
    block = MTDN(32, 1, 2.0, 2, 1.25, "concat").eval()  # 40 channels in the scan
    x = feature_map(0, 1, 32, 8, 8)
    assert torch.equal(block(x), plainly(block, x))


@torch.no_grad()
def test_a_scan_that_was_asked_for_is_taken():
    block = perturbed(BLOCKS["dual"](), 0)
    block.ssm.scan_backend = "reference"
    x = feature_map(0, 1, 32, 8, 8)
    assert torch.equal(block(x), plainly(block, x))


@pytest.mark.parametrize("kernel", [1, 3])
@torch.no_grad()
def test_joining_needs_no_concatenation(kernel, seed):
    torch.manual_seed(seed)
    up, reduce = Upsample(64, 32, kernel), torch.nn.Conv2d(64, 32, 1, bias=False)
    x, skip = feature_map(seed, 2, 64, 5, 3), feature_map(seed, 2, 32, 10, 6)
    want = reduce(torch.cat([up(x), skip], dim=1))
    assert relative(fused.join(up, reduce, x, skip), want) < 1e-5, f"seed {seed}"


@torch.no_grad()
def test_numbers_that_are_not_finite_stay_so():
    """The worker looks for them in the output, to do the tile again in float32."""
    for build in BLOCKS.values():
        block = build().eval()
        for bad in (torch.nan, torch.inf):
            x = feature_map(0, 1, channels(block), 4, 4)
            x[0, 3, 2, 2] = bad
            assert not block(x).isfinite().all()
            assert not block.bfloat16()(x.bfloat16()).isfinite().all()
            block.float()


def test_the_result_does_not_depend_on_threads_or_mode(seed):
    block = perturbed(BLOCKS["dual"](), seed)
    x = feature_map(seed, 1, 32, 40, 33)
    with torch.inference_mode():
        alone = block(x)

    def run(_):
        with torch.no_grad():
            return block(x)

    torch.set_num_threads(2)  # the fixture sets it back
    with ThreadPoolExecutor(3) as pool:
        for y in pool.map(run, range(9)):
            torch.testing.assert_close(y, alone, rtol=0, atol=1e-6)


# The whole network


def networks():
    yield "tiny", mtair.load_model("tiny")
    torch.manual_seed(3)
    small = yaml.safe_load((CONFIGS / "small.yaml").read_text())
    yield "small", perturbed(MTAIR(Dimensions.from_dict(small)), 1)
    yield "base in small", perturbed(MTAIR(Dimensions(**SMALL_BASE)), 2)


def noisy_picture(height, width, seed=0):
    """A picture with edges and slopes, and the same with noise: `[1, 3, H, W]` in 0..1."""
    y, x = np.mgrid[:height, :width]
    clean = np.stack([0.5 + 0.4 * np.sin(x / (5 + c)) * (y % 29 < 20 - c) for c in range(3)])
    noise = np.random.default_rng(seed).normal(0, 25 / 255, clean.shape)
    return (torch.from_numpy(a.astype(np.float32))[None] for a in (clean, clean + noise))


@torch.no_grad()
def test_the_network_restores_as_the_float32_reference_does():
    clean, noisy = noisy_picture(75, 118)
    for name, net in networks():
        target = clean if name == "tiny" else noisy  # the others were never trained
        want = plainly(net, noisy)
        got = net(noisy)
        assert relative(got - noisy, want - noisy) < 1e-4, name
        reference = psnr(want.numpy(), target.numpy())
        assert abs(psnr(got.numpy(), target.numpy()) - reference) < 1e-3, name
        low = psnr(net.bfloat16()(noisy).numpy(), target.numpy())
        assert abs(low - reference) < 0.02, name

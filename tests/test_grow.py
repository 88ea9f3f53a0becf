"""A grown network starts as the one that it was grown from, and what is new learns."""

import json
from dataclasses import replace

import pytest
import torch

from mtair import checkpoint
from mtair.grow import grow
from mtair.model import MTAIR, Dimensions
from mtair.schedule import TrainConfig
from mtair.train import Trainer

SMALL = Dimensions(
    widths=(16, 16, 32, 32), depths=(1, 1, 0, 1), refinement=0, heads=(1, 1, 2, 2),
    ffn_expansion=2.0, prompt_dims=(8, 8, 8, 8), prompt_sizes=(8, 4, 4, 2), d_state=2, expand=1.0,
    stem=2, wide_dec1=False, up_kernel=1,
)  # fmt: skip
LARGER = replace(SMALL, depths=(2, 1, 2, 3), refinement=1, d_state=5)


def trained(dims: Dimensions) -> MTAIR:
    """A network none of whose parameters is what it was initialised with."""
    torch.manual_seed(1)
    net = MTAIR(dims).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return net


@pytest.mark.parametrize("fuse", ["concat", "sum"])
@torch.inference_mode()
def test_a_grown_network_gives_what_the_small_one_gives(fuse):
    small = trained(replace(SMALL, fuse=fuse))
    grown = grow(small, replace(LARGER, fuse=fuse)).eval()
    image = torch.rand(2, 3, 40, 56)
    # In float64, where the paths of both are the plain ones: what differs is not rounding.
    expected, got = small.double()(image.double()), grown.double()(image.double())
    assert (expected - image).abs().max() > 0.01
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


def test_from_the_second_step_on_all_that_is_new_learns():
    grown = grow(trained(SMALL), LARGER).train()
    optimiser = torch.optim.SGD(grown.parameters(), lr=1.0)
    image = torch.rand(2, 3, 32, 32)
    for _ in range(2):  # the first moves the projections of zero and reaches nothing behind them
        optimiser.step()
        optimiser.zero_grad()
        (grown(image) - image.flip(3)).abs().mean().backward()
    still = [name for name, p in grown.named_parameters() if not p.grad.any()]
    states = [p.grad for name, p in grown.named_parameters() if name.endswith("A_logs")]
    assert not still
    assert all(grad.any(0).all() for grad in states)


def test_the_same_dimensions_give_the_same_network():
    small = trained(SMALL)
    grown = grow(small, SMALL)
    torch.testing.assert_close(grown.state_dict(), small.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": (1, 1, 0, 0)}, "depths: .* is less than"),
        ({"d_state": 1}, "d_state: 1 is less than 2"),
        ({"widths": (32, 32, 32, 32)}, "widths: .* only depths, refinement, d_state can be grown"),
        ({"up_kernel": 3}, "up_kernel: 3 instead of 1"),
    ],
)
def test_what_cannot_be_grown_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        grow(trained(SMALL), replace(SMALL, **change))


def test_a_run_starts_from_smaller_weights(tmp_path):
    weights = tmp_path / "small.safetensors"
    small = trained(SMALL)
    checkpoint.save(small, weights, {})
    shape = tmp_path / "larger.yaml"
    shape.write_text(json.dumps(LARGER.to_dict()))  # YAML as well
    config = TrainConfig(
        model=str(shape), seed=1, steps=1, stages=[(1.0, 32, 1)], learning_rate=1e-3,
        warmup_steps=1, final_learning_rate=1e-6, weight_decay=0.0, clip_norm=1.0, ema_decay=0.9,
        mixture={"noise": 1.0}, wide_share=0.0,
    )  # fmt: skip
    trainer = Trainer(config, tmp_path)
    trainer.start_from(str(weights))
    image = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        expected = small(image)
        for net in (trainer.model, trainer.average):
            torch.testing.assert_close(net(image), expected, rtol=0, atol=1e-4)
    assert trainer.started_from["sha256"] == checkpoint.describe(str(weights)).sha256

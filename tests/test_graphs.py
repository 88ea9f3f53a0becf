"""CUDA graphs give what the network gives, for the shapes that have one and for the others."""

import pytest
import torch

import mtair
from mtair.graphs import SHAPES, Graphed

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]


def network():
    return mtair.load_model("tiny", "cuda:0").to(torch.bfloat16)


def images(side, n=3):
    generator = torch.Generator().manual_seed(side)
    for _ in range(n):
        image = torch.rand(1, 3, side, side, generator=generator).to("cuda:0")
        yield image.contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def test_each_image_comes_out_as_from_the_network(caplog):
    model = network()
    graphed = Graphed(model)
    with torch.cuda.stream(torch.cuda.Stream()):
        for side in (64, 96, 64):
            for image in images(side):
                torch.testing.assert_close(graphed(image), model(image), rtol=0, atol=1 / 512)
    assert not caplog.records  # nothing was left to go without
    assert len(graphed._passes) == 2


@torch.inference_mode()
def test_more_shapes_than_are_kept_go_without():
    model = network()
    graphed = Graphed(model)
    with torch.cuda.stream(torch.cuda.Stream()):
        for side in range(64, 64 + 16 * (SHAPES + 2), 16):
            for image in images(side):
                torch.testing.assert_close(graphed(image), model(image), rtol=0, atol=1 / 512)
    assert len(graphed._passes) == SHAPES


class Waits(torch.nn.Module):
    """Asks the GPU for a number in the middle, which no graph can hold."""

    def forward(self, image):
        return image * (2 if image.sum().item() > 0 else 3)


@torch.inference_mode()
def test_what_cannot_be_captured_is_said_and_goes_on_without(caplog):
    graphed = Graphed(Waits())
    with torch.cuda.stream(torch.cuda.Stream()):
        for image in images(32):
            torch.testing.assert_close(graphed(image), 2 * image)
            torch.testing.assert_close(graphed(-image), -3 * image)
    assert sum("No CUDA graph" in r.getMessage() for r in caplog.records) == 1

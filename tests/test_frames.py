import dataclasses

import numpy as np
import pytest

from pipeline.frames import Frame, PixelFormat


def pixel_format(w, h, depth=8, n_planes=3):
    return PixelFormat("any", n_planes, w, h, depth, "bt709", False, "left")


@pytest.mark.parametrize(
    ("log2", "size", "chroma"),
    [
        ((0, 0), (64, 48), (48, 64)),
        ((1, 1), (64, 48), (24, 32)),
        ((1, 1), (65, 49), (25, 33)),
        ((1, 0), (65, 49), (49, 33)),
        ((0, 1), (65, 49), (25, 65)),
        ((2, 0), (66, 10), (10, 17)),
        ((2, 2), (1, 1), (1, 1)),
    ],
)
def test_chroma_planes_are_rounded_up(log2, size, chroma):
    width, height = size
    shapes = pixel_format(*log2).plane_shapes(width, height)
    assert shapes == ((height, width), chroma, chroma)


def test_gray_has_one_plane():
    assert pixel_format(0, 0, n_planes=1).plane_shapes(5, 3) == ((3, 5),)


@pytest.mark.parametrize(("depth", "dtype"), [(8, np.uint8), (9, np.uint16), (16, np.uint16)])
def test_samples_above_eight_bits_take_two_bytes(depth, dtype):
    assert pixel_format(1, 1, depth).dtype is dtype


def test_a_frame_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Frame(0, 0, ()).pts = 1

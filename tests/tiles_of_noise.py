"""Batches of tiles for workers: random ones, and ones that say something; compared bit for bit."""

import numpy as np

from workers import PlaneSpec, WorkerSpec

YUV420 = PlaneSpec(3, 1, 1, 8, "bt709", False, "left")


def tiles(seed, n=2, size=32):
    rng = np.random.default_rng(seed)
    shapes = [(n, size, size)] + 2 * [(n, size // 2, size // 2)]
    return tuple(rng.integers(16, 236, shape, np.uint8) for shape in shapes)


def saying(number):
    return (np.full((1, 2, 2), number, np.uint8),)


def spec_of(checkpoint, **kwargs):
    return WorkerSpec(checkpoint, YUV420, precision="fp32", threads=1, **kwargs)


def assert_equal(got, expected):
    assert len(got) == len(expected)
    for plane, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(plane, other, strict=True)

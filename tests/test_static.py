"""What stands still is restored once; what moves, however small, is restored again."""

from concurrent.futures import Future

import numpy as np
import pytest

from pipeline.frames import Frame
from pipeline.restore import restore_frames
from pipeline.static import StaticTiles
from pipeline.tiles import TileGrid


def grid(batch_size=1, size=(64, 32)):
    return TileGrid.plan(
        *size, log2_chroma_w=1, log2_chroma_h=1, n_planes=3, tile=(32, 32), overlap=8,
        batch_size=batch_size,
    )  # fmt: skip


def picture(seed, size=(64, 32), dtype=np.uint8):
    w, h = size
    rng = np.random.default_rng(seed)
    return tuple(rng.integers(0, 200, s).astype(dtype) for s in ((h, w), *[(h // 2, w // 2)] * 2))


def changed(planes, plane, y, x, by=1):
    planes = [p.copy() for p in planes]
    planes[plane][y, x] += by
    return tuple(planes)


class Network:
    """Brighter by 1, and counts its tiles; its result depends on how many tiles come together."""

    def __init__(self):
        self.n_tiles = 0

    def __call__(self, batch):
        self.n_tiles += len(batch[0])
        future = Future()
        future.set_result(tuple(plane + len(batch[0]) for plane in batch))
        return future


def restore(pictures, tiles, submit, window=3):
    frames = (Frame(index, 10 * index, planes) for index, planes in enumerate(pictures))
    return list(restore_frames(frames, tiles, submit, window))


def clip():
    """Still, a change in one tile's luma, one in chroma, a duplicate, a cut, and back again."""
    a, b = picture(1), picture(2)
    return [a, a, changed(a, 0, 5, 60), changed(a, 2, 3, 2), changed(a, 2, 3, 2), b, b, a, a]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 4])
def test_the_output_is_the_same_with_and_without(batch_size, window):
    tiles, network = grid(batch_size), Network()
    static = StaticTiles(network, tiles.n_batches)
    with_reuse = restore(clip(), tiles, static, window)
    without = restore(clip(), tiles, Network(), window)
    for a, b in zip(with_reuse, without, strict=True):
        assert (a.index, a.pts) == (b.index, b.pts)
        assert all(np.array_equal(p, q) for p, q in zip(a.planes, b.planes, strict=True))
    assert static.n_tiles == 9 * tiles.n_tiles
    assert network.n_tiles == static.n_tiles - static.n_reused
    assert static.n_reused >= 4 * tiles.n_tiles


def test_only_the_tile_that_changed_is_restored_again():
    tiles, network = grid(), Network()
    assert tiles.n_tiles == 3
    static = StaticTiles(network, tiles.n_batches)
    a = picture(1)
    restore([a, a, changed(a, 1, 0, 0), changed(a, 1, 0, 0)], tiles, static)
    assert (network.n_tiles, static.n_reused) == (3 + 0 + 1 + 0, 3 + 2 + 3)


def test_a_failed_or_cancelled_result_is_not_reused():
    work = []

    def submit(batch):
        work.append(Future())
        return work[-1]

    static, batch = StaticTiles(submit, 1), picture(1)
    batch = tuple(plane[None] for plane in batch)
    assert static(batch) is static(batch) is work[0]
    work[0].set_exception(RuntimeError("the device is gone"))
    assert static(batch) is work[1]
    work[1].cancel()
    assert static(batch) is work[2]
    work[2].set_result(batch)
    assert static(batch) is work[2]
    assert (static.n_tiles, static.n_reused) == (5, 2)


def test_after_a_reset_everything_is_restored_again():
    network = Network()
    static, batch = StaticTiles(network, 2), tuple(plane[None] for plane in picture(1))
    static(batch)
    static.reset()
    static(batch)
    static(batch)
    assert (network.n_tiles, static.n_reused) == (3, 0)
    static(batch)
    assert static.n_reused == 1


def noisy(planes, seed, sigma=4):
    rng = np.random.default_rng([99, seed])
    return tuple(
        np.clip(np.rint(p + rng.normal(0, sigma, p.shape)), 0, 255).astype(p.dtype) for p in planes
    )


def test_noise_below_the_threshold_is_not_restored_again_and_above_it_is():
    still = tuple(np.full_like(plane, 100) for plane in picture(0))
    tiles = grid()
    for threshold, share in [(0, 0), (2, 0), (12, 9 / 10)]:
        static = StaticTiles(Network(), tiles.n_batches, threshold)
        restore([noisy(still, i) for i in range(10)], tiles, static)
        assert static.n_reused == share * static.n_tiles


def test_a_small_thing_that_moves_is_seen_although_the_mean_hardly_changes():
    size = (256, 256)
    still = tuple(np.full_like(plane, 100) for plane in picture(0, size))
    tiles = TileGrid.plan(
        *size, log2_chroma_w=1, log2_chroma_h=1, n_planes=3, tile=None, overlap=8, batch_size=1
    )
    pictures = []
    for number in range(6):
        planes = noisy(still, number)
        planes[0][100:110, 40 * number : 40 * number + 10] = 200
        pictures.append(planes)
    static = StaticTiles(Network(), 1, 12)
    restore(pictures, tiles, static)
    assert static.n_reused == 0


def test_slow_drift_is_followed_because_the_restored_tile_is_what_is_compared():
    tiles = grid()
    start = tuple(np.full_like(plane, 50) for plane in picture(0))
    pictures = [tuple(plane + i for plane in start) for i in range(60)]
    static = StaticTiles(Network(), tiles.n_batches, 5)
    restored = restore(pictures, tiles, static)
    for frame, source in zip(restored, pictures, strict=True):
        assert abs(int(frame.planes[0][0, 0]) - 1 - int(source[0][0, 0])) < 5
    assert static.n_reused == static.n_tiles * 4 / 5


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("size", [(1, 1), (3, 17), (16, 16)])
def test_tiny_tiles_are_compared_too(size, dtype):
    a = (np.full((1, *size), 100, dtype),)
    b = (a[0] + dtype(3),)
    for threshold, reused in [(3, 0), (4, 1)]:
        static = StaticTiles(Network(), 1, threshold)
        static(a), static(b)
        assert static.n_reused == reused

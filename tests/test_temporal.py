"""Calmer, never ghosts, never different from run to run, and nothing where nothing was restored."""

import cv2
import numpy as np
import pytest

from pipeline.frames import Frame
from pipeline.temporal import TemporalFilter

SIZE = (192, 128)


def texture(seed, size=SIZE, top=255, dtype=np.uint8):
    """Smooth 4:2:0 planes with something to hold on to."""
    w, h = size
    rng = np.random.default_rng(seed)
    planes = []
    for shape in ((h, w), (h // 2, w // 2), (h // 2, w // 2)):
        coarse = rng.uniform(0.2, 0.8, (shape[0] // 8 + 2, shape[1] // 8 + 2)).astype(np.float32)
        plane = cv2.resize(coarse, shape[::-1], interpolation=cv2.INTER_CUBIC) * top
        planes.append(np.clip(np.rint(plane), 0, top).astype(dtype))
    return tuple(planes)


def noisy(planes, sigma, seed, top=255):
    rng = np.random.default_rng([7, seed])
    return tuple(
        np.clip(np.rint(p + rng.normal(0, sigma, p.shape)), 0, top).astype(p.dtype) for p in planes
    )


def panned(wide, number, by=4):
    """A window that moves `by` pixels a frame over a wide picture."""
    x, w = by * number, SIZE[0]
    return wide[0][:, x : x + w], *(p[:, x // 2 : x // 2 + w // 2] for p in wide[1:])


def sequence(clean, source_sigma=25, sigma=8, top=255):
    """(source, restored) Frames: the network took most of the noise away, not all."""
    return [
        (
            Frame(i, 10 * i, noisy(planes, source_sigma, 2 * i, top), 10),
            Frame(i, 10 * i, noisy(planes, sigma, 2 * i + 1, top), 10),
        )
        for i, planes in enumerate(clean)
    ]


def run(pairs, strength=0.6, bit_depth=8):
    temporal = TemporalFilter(strength, bit_depth)
    return [temporal(*pair) for pair in pairs], temporal


def error(frames, clean):
    return np.concatenate([
        np.stack([f.planes[i].astype(float) - c[i] for f, c in zip(frames, clean, strict=True)])
        .reshape(len(frames), -1) for i in range(3)
    ], axis=1)  # fmt: skip


def flicker(frames, clean):
    return np.abs(np.diff(error(frames, clean), axis=0)).mean()


def rmse(frames, clean):
    return np.sqrt(np.square(error(frames, clean)).mean())


def same(a, b):
    return all(np.array_equal(p, q) for p, q in zip(a.planes, b.planes, strict=True))


@pytest.mark.parametrize("by", [0, 4])
def test_still_and_moving_pictures_become_calmer_and_closer_to_the_clean_ones(by):
    wide = texture(1, (SIZE[0] + 64, SIZE[1]))
    clean = [panned(wide, i, by) for i in range(10)]
    pairs = sequence(clean)
    restored = [after for _, after in pairs]
    calm, temporal = run(pairs)
    assert flicker(calm, clean) < 0.7 * flicker(restored, clean)
    assert rmse(calm, clean) < 0.85 * rmse(restored, clean)
    assert temporal.n_cuts == 0


def test_frames_keep_number_pts_duration_and_are_read_only():
    pairs = sequence([texture(1)] * 4)
    for (_, before), after in zip(pairs, run(pairs)[0], strict=True):
        assert (after.index, after.pts, after.duration) == (before.index, before.pts, 10)
    assert not after.planes[0].flags.writeable
    assert [p.dtype for p in after.planes] == [np.uint8] * 3


def test_a_cut_starts_afresh_and_is_counted():
    pairs = sequence([texture(1)] * 3 + [texture(2)] * 3)
    calm, temporal = run(pairs)
    assert temporal.n_cuts == 1
    assert same(calm[3], pairs[3][1])
    assert not same(calm[4], pairs[4][1])


def test_something_that_appears_leaves_no_ghost_of_what_was_there():
    still = texture(3)
    appears = [p.copy() for p in still]
    appears[0][40:80, 60:120] = 255 - still[0][40:80, 60:120] // 4
    clean = [still] * 4 + [tuple(appears)]
    pairs = sequence(clean, sigma=2)
    calm, temporal = run(pairs, strength=1)
    inside = np.s_[44:76, 64:116]
    off = calm[4].planes[0][inside].astype(float) - clean[4][0][inside]
    assert np.abs(off).mean() < 3
    assert temporal.n_cuts == 0


def test_strength_0_and_a_clean_source_leave_every_frame_as_it_is():
    pairs = sequence([texture(1)] * 4)
    assert all(same(a, pair[1]) for a, pair in zip(run(pairs, 0)[0], pairs, strict=True))
    wide = texture(1, (SIZE[0] + 64, SIZE[1]))
    clean = [Frame(i, i, panned(wide, i, 2)) for i in range(4)]
    calm, _ = run([(frame, frame) for frame in clean], 1)
    assert all(same(a, b) for a, b in zip(calm, clean, strict=True))


def test_the_same_frames_after_a_reset_give_the_same_output_on_any_number_of_threads():
    pairs = sequence([panned(texture(1, (SIZE[0] + 64, SIZE[1])), i) for i in range(5)])
    whole, temporal = run(pairs)
    temporal.reset()
    again = [temporal(*pair) for pair in pairs]
    threads = cv2.getNumThreads()
    try:
        cv2.setNumThreads(1 if threads > 1 else 2)
        other = run(pairs)[0]
    finally:
        cv2.setNumThreads(threads)
    for frames in (again, other):
        assert all(same(a, b) for a, b in zip(whole, frames, strict=True))


def test_after_a_reset_a_frame_does_not_depend_on_those_before():
    pairs = sequence([texture(1)] * 6)
    _, temporal = run(pairs[:3])
    temporal.reset()
    assert all(
        same(temporal(*pair), alone)
        for pair, alone in zip(pairs[3:], run(pairs[3:])[0], strict=True)
    )


def test_ten_bit_is_filtered_like_eight_and_keeps_its_top():
    clean = [texture(1, top=1023, dtype=np.uint16)] * 8
    pairs = sequence(clean, 100, 32, 1023)
    calm, _ = run(pairs, bit_depth=10)
    assert flicker(calm, clean) < 0.7 * flicker([after for _, after in pairs], clean)
    assert calm[-1].planes[0].dtype == np.uint16
    white = [tuple(np.full(p.shape, 1023, np.uint16) for p in clean[0])] * 4
    calm, _ = run(sequence(white, 100, 32, 1023), 1, 10)
    assert all(plane.max() <= 1023 for frame in calm for plane in frame.planes)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (31, 200), (32, 32), (33, 47), (65, 35)])
@pytest.mark.parametrize("n_planes", [1, 3])
def test_small_odd_and_gray_pictures_come_through(size, n_planes):
    w, h = size
    shapes = [(h, w), (-(-h // 2), -(-w // 2)), (-(-h // 2), -(-w // 2))][:n_planes]
    pairs = sequence([tuple(np.full(s, 100, np.uint8) for s in shapes)] * 3)
    calm, _ = run(pairs)
    assert [p.shape for p in calm[2].planes] == shapes
    assert same(calm[2], pairs[2][1]) == (min(size) < 32)


@pytest.mark.parametrize("size", [(1536, 48), (2600, 40), (48, 4000)])
def test_a_board_too_slender_for_the_flow_is_left_as_it_is(size):
    pairs = sequence([texture(1, size)] * 3)
    frames, _ = run(pairs)
    for frame, (_, restored) in zip(frames, pairs, strict=True):
        np.testing.assert_array_equal(frame.planes[0], restored.planes[0])

"""The degradations: what each does to an image, measured."""

import cv2
import numpy as np
import pytest

from mtair import degrade


def through_420(image):
    return degrade.from_420(*degrade.to_420(image))


ALL = {
    "noise": lambda image, rng: degrade.gaussian_noise(image, 25, rng),
    "sensor_noise": lambda image, rng: degrade.sensor_noise(image, 200, 2, rng),
    "plane_noise": lambda image, rng: degrade.plane_noise(image, 20, 15, rng),
    "video_noise": lambda image, rng: degrade.video_noise(image, 20, 70, rng),
    "rain": degrade.rain,
    "haze": lambda image, rng: degrade.haze(
        image, degrade.smooth_depth(*image.shape[:2], rng), rng.uniform(0.4, 1.8), 0.9
    ),
    "jpeg": lambda image, rng: degrade.jpeg(image, 50),
    "chroma": lambda image, rng: through_420(image),
}
EVERY_LEVEL = np.arange(256, dtype=np.float32) / np.float32(255)


def scene(h=64, w=80):
    """A smooth picture of 8-bit values with an edge, well inside 0..1."""
    ys, xs = np.mgrid[0:h, 0:w].astype(np.float32)
    planes = [0.2 + 0.5 * xs / w, 0.3 + 0.3 * ys / h, 0.4 + 0.1 * (xs > w / 2)]
    return degrade.quantise(np.stack(planes, axis=-1).astype(np.float32))


@pytest.mark.parametrize("kind", ALL)
def test_chance_comes_from_the_generator_alone(kind):
    first, again = (ALL[kind](scene(), np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    if kind not in ("jpeg", "chroma"):
        assert not np.array_equal(first, ALL[kind](scene(), np.random.default_rng(6)))


@pytest.mark.parametrize("size", [(64, 80), (33, 47), (8, 8)])
@pytest.mark.parametrize("kind", ALL)
def test_images_stay_images(kind, size):
    for number in range(5):
        image = scene(*size)
        before = image.copy()
        out = ALL[kind](image, np.random.default_rng(number))
        assert (out.dtype, out.shape) == (np.float32, image.shape)
        assert 0 <= out.min() <= out.max() <= 1
        assert size == (8, 8) or not np.array_equal(out, before)
        np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("kind", [k for k in ALL if k != "chroma"])
def test_what_a_file_would_hold_has_8_bits(kind):
    levels = ALL[kind](scene(), np.random.default_rng(1)).astype(np.float64) * 255
    np.testing.assert_allclose(levels, levels.round(), atol=1e-4)


def test_quantise_truncates_and_keeps_the_levels():
    np.testing.assert_array_equal(degrade.quantise(EVERY_LEVEL), EVERY_LEVEL)
    between = (np.arange(255, dtype=np.float32) + np.float32(0.9)) / np.float32(255)
    np.testing.assert_array_equal(degrade.quantise(between), EVERY_LEVEL[:255])
    outside = np.array([-1, -1e-9, 1.001, 7], dtype=np.float32)
    np.testing.assert_array_equal(degrade.quantise(outside), [0, 0, 1, 1])


@pytest.mark.parametrize("sigma", [5, 15, 25, 50])
def test_noise_has_the_deviation_asked_for(sigma):
    grey = np.full((256, 256, 3), 0.5, dtype=np.float32)
    noise = degrade.gaussian_noise(grey, sigma, np.random.default_rng(sigma)) * 255 - 127.5
    # Truncation to 8 bit adds a variance of 1/12 and a mean of -1/2.
    clipped_at = 127.5 / sigma
    if clipped_at > 3:
        assert noise.std() == pytest.approx(np.hypot(sigma, 12**-0.5), rel=0.01)
    assert noise.mean() == pytest.approx(-0.5, abs=5 * sigma / 443)
    assert abs(np.corrcoef(noise[:, :-1].ravel(), noise[:, 1:].ravel())[0, 1]) < 0.02


def test_noise_follows_the_published_protocol():
    """`clip(x + N(0,1)·sigma, 0, 255).astype(uint8)`, of 8-bit values."""
    image = scene()
    noise = np.random.default_rng(9).standard_normal(image.shape, dtype=np.float32)
    want = np.clip(image.astype(np.float64) * 255 + noise * 50.0, 0, 255).astype(np.uint8)
    got = degrade.gaussian_noise(image, 50, np.random.default_rng(9)) * np.float32(255)
    assert np.mean(got.round() != want) < 1e-3


def test_no_noise_leaves_every_level():
    image = np.repeat(EVERY_LEVEL, 3).reshape(16, 16, 3)
    np.testing.assert_array_equal(degrade.gaussian_noise(image, 0, np.random.default_rng(0)), image)


def error(a, b):
    return float(np.square(a - b).mean())


def test_jpeg_is_worse_at_lower_quality():
    image = degrade.gaussian_noise(scene(), 10, np.random.default_rng(0))
    errors = [error(degrade.jpeg(image, quality), image) for quality in (10, 50, 95)]
    assert errors[0] > errors[1] > errors[2] > 0


def test_jpeg_keeps_the_order_of_the_colours():
    colour = np.broadcast_to(np.float32([0.8, 0.4, 0.1]), (32, 32, 3))
    assert np.abs(degrade.jpeg(colour, 95) - colour).max() < 0.02


def red_and_grey_stripes():
    """Columns of equal luma, alternately red and grey: all the detail is chroma."""
    red = np.float32([0.8, 0.2, 0.2])
    grey = np.full(3, red @ np.float32([0.299, 0.587, 0.114]), dtype=np.float32)
    return np.ascontiguousarray(np.tile(np.stack([red, grey]), (32, 16, 1)))


@pytest.mark.parametrize(
    "halve", [through_420, lambda image: degrade.jpeg(image, 100)], ids=["420", "jpeg"]
)
def test_chroma_is_halved_and_luma_is_not(halve):
    stripes = red_and_grey_stripes()
    out = halve(stripes)
    weights = np.float32([0.299, 0.587, 0.114])
    assert np.abs(out @ weights - stripes @ weights).max() < 0.01
    assert np.ptp(stripes[..., 0] - stripes[..., 1]) > 0.5
    inside = (out[..., 0] - out[..., 1])[:, 4:-4]
    assert np.ptp(inside) < 0.1
    checks = scene()
    checks[...] = (np.indices(checks.shape[:2]).sum(0) % 2)[..., None] * 0.5
    np.testing.assert_allclose(through_420(checks), checks, atol=1e-3)


def streaks(angle, seed=0, **change):
    settings = {"length": 31, "thickness": 0.7, "density": 2e-4, "brightness": 0.5} | change
    rng = np.random.default_rng(seed)
    return degrade.rain_streaks(200, 200, rng, angle=angle, **settings)


def direction_of(layer):
    """Degrees from the vertical of the strongest structure, by the structure tensor."""
    gx, gy = (cv2.Sobel(layer, cv2.CV_32F, dx, 1 - dx) for dx in (1, 0))
    across = 0.5 * np.arctan2(2 * (gx * gy).sum(), (gx * gx - gy * gy).sum())
    return -np.degrees(across)


@pytest.mark.parametrize("angle", [-40, -15, 0, 25, 45])
def test_rain_falls_along_its_angle(angle):
    assert direction_of(streaks(angle)) == pytest.approx(angle, abs=4)


@pytest.mark.parametrize("length", [8, 20, 47])
def test_rain_streaks_are_light(length):
    for seed in range(10):
        layer = streaks(20, seed, length=length, thickness=1.1, density=0.001)
        assert layer.shape == (200, 200)
        assert layer.min() >= 0
        assert layer.max() > 0.1


def test_rain_streaks_are_as_long_and_bright_as_asked():
    def one(length):
        layer = streaks(0, length=length, density=5e-5)
        labels, _, boxes, _ = cv2.connectedComponentsWithStats((layer > 0.05).astype(np.uint8))
        inside = [b[3] for b in boxes[1:labels] if b[1] > 0 and b[1] + b[3] < 200]
        return np.median(inside)

    assert one(40) == pytest.approx(40, abs=3)
    assert one(12) == pytest.approx(12, abs=3)
    dim, bright = streaks(0, brightness=0.2), streaks(0, brightness=0.4)
    np.testing.assert_allclose(bright, 2 * dim, atol=1e-6)


def test_rain_only_brightens():
    """Mist is at least 0.6 bright, so nothing darker than that may lose light."""
    dark = np.broadcast_to(EVERY_LEVEL[:152, None, None], (152, 64, 3)).copy()
    for seed in range(30):
        out = degrade.rain(dark, np.random.default_rng(seed))
        assert (out >= dark).all(), f"seed {seed}: {(dark - out).max() * 255:.1f} levels darker"
        assert out.mean() > dark.mean()


def test_rain_has_no_colour():
    grey = np.full((64, 64, 3), 0.25, dtype=np.float32)
    out = degrade.rain(grey, np.random.default_rng(3))
    assert np.ptp(out, axis=2).max() == 0


def test_haze_is_the_scattering_equation():
    image, depth = scene(), np.random.default_rng(2).random((64, 80)).astype(np.float32)
    got = degrade.haze(image, depth, beta=1.3, airlight=0.85)
    for y, x in [(0, 0), (10, 70), (63, 79)]:
        t = np.exp(-1.3 * depth[y, x])
        want = image[y, x] * t + 0.85 * (1 - t)
        assert np.all((want - 1 / 255 - 1e-6 <= got[y, x]) & (got[y, x] <= want + 1e-6))


def deviations(electrons, read):
    """Of linear light at a tenth and at a half of white, over many samples."""
    found = []
    for level in (0.1, 0.5):
        flat = np.full((256, 256, 3), level ** (1 / 2.2), dtype=np.float32)
        noisy = degrade.sensor_noise(flat, electrons, read, np.random.default_rng(3))
        assert np.mean(noisy**2.2) == pytest.approx(level, rel=0.03)
        found.append(float(np.std(noisy**2.2)))
    return found


def test_photons_are_counted_so_light_is_noisier_by_its_root():
    dark, light = deviations(1000, 0)
    assert dark == pytest.approx(np.sqrt(0.1 / 1000), rel=0.05)
    assert light == pytest.approx(np.sqrt(0.5 / 1000), rel=0.05)


def test_reading_out_adds_the_same_everywhere():
    dark, light = deviations(1000, 8)
    assert dark == pytest.approx(np.hypot(np.sqrt(0.1 / 1000), 8 / 1000), rel=0.05)
    assert light == pytest.approx(np.hypot(np.sqrt(0.5 / 1000), 8 / 1000), rel=0.05)


def test_haze_grows_with_depth_and_vanishes_at_none():
    image = scene()
    zero = np.zeros((64, 80), dtype=np.float32)
    np.testing.assert_array_equal(degrade.haze(image, zero, 1.5, 0.9), image)
    far = degrade.haze(image, zero + 1, 30, 0.9)
    assert np.abs(far - 0.9).max() < 1.1 / 255


def test_depth_is_far_at_the_top():
    maps = [degrade.smooth_depth(60, 90, np.random.default_rng(seed)) for seed in range(50)]
    for depth in maps:
        assert (depth.shape, depth.dtype) == ((60, 90), np.float32)
        assert 0 <= depth.min() < depth.max() <= 1
        assert np.abs(np.diff(depth, axis=0)).max() < 0.1
    mean = np.mean(maps, axis=0)
    assert mean[:10].mean() > mean[-10:].mean() + 0.1


def test_depth_comes_back_from_a_hazy_pair():
    """Except where the scene is as bright as the airlight, haze tells how far away it is."""
    clean = scene(96, 96)
    depth = np.linspace(6, 1, 96, dtype=np.float32)[:, None].repeat(96, axis=1)
    hazy = degrade.haze(clean, depth, beta=0.12, airlight=0.95)
    found = degrade.depth_of_pair(hazy, clean, airlight=0.95, beta=0.12)
    assert found.shape == depth.shape
    assert np.abs(found - depth).mean() < 0.15
    again = degrade.haze(clean, found, beta=0.12, airlight=0.95)
    assert np.abs(again - hazy).mean() < 2 / 255


def test_rain_is_mostly_as_strong_as_published_light_rain():
    """Rain100L's inputs are published at 26.9 dB of luma, some 25.5 dB of RGB."""
    clean = scene(160, 160)
    decibels = []
    for number in range(60):
        rainy = degrade.rain(clean, np.random.default_rng(number))
        decibels.append(-10 * np.log10(np.mean((rainy - clean) ** 2)))
    assert 24 < np.median(decibels) < 27
    assert np.percentile(decibels, 2) < 21


def test_rain_seldom_leaves_a_veil():
    """Rain100L has streaks and nothing between them; a veil cannot be told from a pale scene."""
    grey = np.full((96, 96, 3), 0.3, np.float32)
    rainy = [degrade.rain(grey, np.random.default_rng(number)) for number in range(200)]
    veiled = sum(np.percentile(picture, 2) > 0.3 + 2 / 255 for picture in rainy)
    assert 2 <= veiled <= 20

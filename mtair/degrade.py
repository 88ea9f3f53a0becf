"""Degradations of clean images: noise, rain, haze, compression. Each is a pure function.

Images are float32 RGB `[H, W, 3]` in 0..1, in and out; all chance comes from the generator given.
Knows nothing of data sets and of the network.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]


def quantise(image: Image) -> Image:
    """Clip to 0..1 and truncate to 8 bit, as the published test protocol does."""
    levels: Image = np.floor(np.clip(image, 0, 1) * np.float32(255))
    return levels / np.float32(255)


def gaussian_noise(image: Image, sigma: float, rng: np.random.Generator) -> Image:
    """White Gaussian noise of standard deviation `sigma` (of 255), then 8 bit."""
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    return quantise(image + noise * np.float32(sigma / 255))


def sensor_noise(image: Image, electrons: float, read: float, rng: np.random.Generator) -> Image:
    """Poisson-Gaussian: photons counted in linear light (gamma 2.2) and read out, then 8 bit.

    electrons counted where the picture is white, fewer in worse light; `read` is the standard
    deviation of the read-out in electrons, which shows in the dark.
    """
    counted = rng.poisson(np.clip(image, 0, 1) ** 2.2 * electrons) + rng.normal(
        0, read, image.shape
    )
    return quantise((np.clip(counted / electrons, 0, 1) ** (1 / 2.2)).astype(np.float32))


def jpeg(image: Image, quality: int) -> Image:
    """Through a JPEG encoder at `quality` 1..100, with 4:2:0 chroma."""
    bgr = (np.clip(image, 0, 1)[..., ::-1] * 255 + 0.5).astype(np.uint8)
    _, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
    assert decoded is not None
    return decoded[..., ::-1].astype(np.float32) / np.float32(255)


def to_420(image: Image) -> tuple[Image, Image]:
    """Luma `[H, W]` and chroma `[ceil(H/2), ceil(W/2), 2]` around 0.5: BT.601, averaged down."""
    ycc = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2YCrCb)
    h, w = image.shape[:2]
    chroma = cv2.resize(ycc[..., 1:], (-(-w // 2), -(-h // 2)), interpolation=cv2.INTER_AREA)
    half = chroma.reshape(-(-h // 2), -(-w // 2), 2)  # OpenCV drops a width of one
    return ycc[..., 0].astype(np.float32), half.astype(np.float32)


def from_420(luma: Image, chroma: Image) -> Image:
    """The RGB image of such planes, the chroma brought up bilinearly."""
    h, w = luma.shape
    full = cv2.resize(chroma, (w, h), interpolation=cv2.INTER_LINEAR).reshape(h, w, 2)
    return np.clip(cv2.cvtColor(np.dstack([luma, full]), cv2.COLOR_YCrCb2RGB), 0, 1)


def video_noise(image: Image, sigma: float, quality: int, rng: np.random.Generator) -> Image:
    """Sensor noise as a viewer meets it: added to RGB, stored as 4:2:0 and compressed."""
    return jpeg(from_420(*to_420(gaussian_noise(image, sigma, rng))), quality)


def plane_noise(image: Image, sigma: float, chroma_sigma: float, rng: np.random.Generator) -> Image:
    """Noise in the stored 4:2:0 samples, sigmas of 255: coarse in colour, as from cheap sensors."""
    luma, chroma = to_420(image)
    luma = luma + rng.standard_normal(luma.shape, dtype=np.float32) * np.float32(sigma / 255)
    scale = np.float32(chroma_sigma / 255)
    chroma = chroma + rng.standard_normal(chroma.shape, dtype=np.float32) * scale
    return quantise(from_420(luma, chroma))


def rain_streaks(
    height: int, width: int, rng: np.random.Generator, *, angle: float, length: int,
    thickness: float, density: float, brightness: float, softness: float = 1.0,
) -> NDArray[np.float32]:  # fmt: skip
    """One layer of falling rain, `[H, W]` ≥ 0: sparse drops drawn out along `angle`.

    angle in degrees from the vertical; length in pixels; thickness the Gaussian sigma across;
    density in drops per pixel; brightness of a single streak's core;
    softness the pixels over which its ends fade.
    """
    pad = length
    drops = (rng.random((height + 2 * pad, width + 2 * pad), dtype=np.float32) < density).astype(
        np.float32
    )
    drops *= rng.uniform(0.4, 1.0, drops.shape).astype(np.float32)
    size = 2 * (length // 2) + 1 + 2 * int(np.ceil(3 * thickness))
    axis = np.arange(size, dtype=np.float32) - size // 2
    xs, ys = np.meshgrid(axis, axis)
    theta = np.deg2rad(angle)
    along = xs * np.sin(theta) + ys * np.cos(theta)
    across = xs * np.cos(theta) - ys * np.sin(theta)
    fade = np.clip((length / 2 - np.abs(along)) / softness + 0.5, 0, 1)
    kernel = fade * np.exp(-0.5 * (across / max(thickness, 0.35)) ** 2)
    streaks = cv2.filter2D(drops, cv2.CV_32F, kernel.astype(np.float32)) * np.float32(brightness)
    # filter2D may go through an FFT, which leaves tiny negatives.
    light: NDArray[np.float32] = np.maximum(streaks[pad : pad + height, pad : pad + width], 0)
    return light


def rain(image: Image, rng: np.random.Generator) -> Image:
    """Rain of random strength, added as light, then 8 bit.

    Mostly one kind of streak in one direction, as in Rain100L (Yang et al. 2017, whose inputs are
    published at 26.9 dB of luma, 25.5 of RGB); else up to three layers, the nearer ones longer and
    thicker, to the heavy rain of Rain1200 (Zhang & Patel 2018: 14 to 35 dB), a fifth of it behind a
    thin mist. Lengths and brightness vary within a layer.
    """
    h, w = image.shape[:2]
    light = rng.random() < 0.65
    wind = rng.uniform(-50, 50)
    streaks = np.zeros((h, w), dtype=np.float32)
    for _ in range(1 if light else int(rng.integers(1, 4))):
        thickness = rng.uniform(0.3, 1.0 if light else 1.4)
        length, density = rng.uniform(8, 40), rng.uniform(0.05, 0.3)
        spread = rng.uniform(0.5, 2.0)  # between the shortest and the longest of a layer
        softness = rng.choice([1.0, rng.uniform(1, max(2.0, length / 2))])  # sharp lines or blur
        for part in rng.uniform(1, 1 + spread, 3):
            streaks += rain_streaks(
                h, w, rng, angle=wind + rng.normal(0, 2), length=max(5, round(length * part / 2)),
                thickness=thickness, density=density / 3 / length, brightness=1.0,
                softness=softness,
            )  # fmt: skip
    # Scaled to the strength wanted, but no streak brighter than white light adds.
    # That and clipping take off light: N(24.5, 2.5) gives what is published.
    decibels = rng.normal(24.5, 2.5) if light else rng.uniform(15, 33)
    strength = 10 ** (-decibels / 20) / max(float(np.sqrt(np.mean(streaks**2))), 1e-6)
    brightest = max(float(streaks.max()), 1e-6)
    streaks = (streaks * min(strength, rng.uniform(0.5, 1.0) / brightest))[..., None]
    if not light and rng.random() < 0.2:
        mist = np.float32(rng.uniform(0, 0.15))
        image = image * (1 - mist) + mist * np.float32(rng.uniform(0.6, 1.0))
    if rng.random() < 0.3:  # screen blend: bright places show less of a streak
        streaks = (1 - image) * np.minimum(streaks, 1)
    return quantise(image + streaks.astype(np.float32))


def haze(image: Image, depth: NDArray[np.float32], beta: float, airlight: float) -> Image:
    """Atmospheric scattering (Koschmieder): `I = J t + A (1 - t)`, `t = exp(-beta depth)`.

    depth `[H, W]` ≥ 0 in the unit that makes beta·depth dimensionless; then 8 bit.
    """
    t = np.exp(-np.float32(beta) * depth)[..., None]
    return quantise(image * t + np.float32(airlight) * (1 - t))


def depth_of_pair(hazy: Image, clean: Image, airlight: float, beta: float) -> NDArray[np.float32]:
    """Depth `[H, W]` ≥ 0 of a synthetic haze pair whose airlight and beta are known.

    `t = (I - A) / (J - A)` in the least squares of a small neighbourhood, in which the brighter
    differences count more; `depth = -ln t / beta`.
    """
    air = np.float32(airlight)
    above, below = ((hazy - air) * (clean - air)).sum(2), np.square(clean - air).sum(2)
    above, below = (cv2.GaussianBlur(x, (0, 0), 2.0) for x in (above, below))
    t = np.clip(above / np.maximum(below, 1e-3), 0.02, 1)
    depth: NDArray[np.float32] = (-np.log(t) / np.float32(beta)).astype(np.float32)
    return depth


def smooth_depth(height: int, width: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """A plausible depth map `[H, W]` in 0..1: far at the top, with smooth random relief."""
    relief = cv2.resize(
        rng.random((4, 4), dtype=np.float32), (width, height), interpolation=cv2.INTER_CUBIC
    )
    slope = np.linspace(rng.uniform(0.3, 1.0), rng.uniform(0.0, 0.5), height, dtype=np.float32)
    depth: NDArray[np.float32] = np.clip(0.6 * slope[:, None] + 0.6 * relief, 0, 1)
    return depth

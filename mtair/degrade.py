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
    thickness: float, density: float, brightness: float,
) -> NDArray[np.float32]:  # fmt: skip
    """One layer of falling rain, `[H, W]` ≥ 0: sparse drops drawn out along `angle`.

    angle in degrees from the vertical; length in pixels; thickness the Gaussian sigma across;
    density in drops per pixel; brightness of a single streak's core.
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
    fade = np.clip(length / 2 - np.abs(along) + 0.5, 0, 1)
    kernel = fade * np.exp(-0.5 * (across / max(thickness, 0.35)) ** 2)
    streaks = cv2.filter2D(drops, cv2.CV_32F, kernel.astype(np.float32)) * np.float32(brightness)
    # filter2D may go through an FFT, which leaves tiny negatives.
    light: NDArray[np.float32] = np.maximum(streaks[pad : pad + height, pad : pad + width], 0)
    return light


def rain(image: Image, rng: np.random.Generator) -> Image:
    """Rain of random strength: one to three layers of one wind, added as light, then 8 bit.

    A layer nearer to the camera has longer, thicker and fewer streaks. A third of the pictures
    carries a thin mist as well. The ranges follow the synthesis that the deraining literature
    describes (Yang et al. 2017: one dominant direction; Zhang & Patel 2018: light to heavy).
    """
    h, w = image.shape[:2]
    wind = rng.uniform(-45, 45)
    streaks = np.zeros((h, w), dtype=np.float32)
    for _ in range(rng.integers(1, 4)):
        length = int(rng.integers(8, 48))
        streaks += rain_streaks(
            h, w, rng, angle=wind + rng.normal(0, 3), length=length,
            thickness=rng.uniform(0.35, 1.1),
            density=rng.uniform(0.01, 0.12) / length,
            brightness=rng.uniform(0.08, 0.65),
        )  # fmt: skip
    streaks = np.minimum(streaks, rng.uniform(0.4, 1.0))[..., None]
    if rng.random() < 0.3:
        mist = np.float32(rng.uniform(0, 0.15))
        image = image * (1 - mist) + mist * np.float32(rng.uniform(0.6, 1.0))
    if rng.random() < 0.5:  # screen blend: bright places show less of a streak
        streaks = (1 - image) * np.minimum(streaks, 1)
    return quantise(image + streaks)


def haze(image: Image, depth: NDArray[np.float32], beta: float, airlight: float) -> Image:
    """Atmospheric scattering (Koschmieder): `I = J t + A (1 - t)`, `t = exp(-beta depth)`.

    depth `[H, W]` in 0..1, then 8 bit.
    """
    t = np.exp(-np.float32(beta) * depth)[..., None]
    return quantise(image * t + np.float32(airlight) * (1 - t))


def smooth_depth(height: int, width: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """A plausible depth map `[H, W]` in 0..1: far at the top, with smooth random relief."""
    relief = cv2.resize(
        rng.random((4, 4), dtype=np.float32), (width, height), interpolation=cv2.INTER_CUBIC
    )
    slope = np.linspace(rng.uniform(0.3, 1.0), rng.uniform(0.0, 0.5), height, dtype=np.float32)
    depth: NDArray[np.float32] = np.clip(0.6 * slope[:, None] + 0.6 * relief, 0, 1)
    return depth

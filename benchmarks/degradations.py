"""The pictures of docs/degradations.md: each degradation of the training mixture on one image.

    python benchmarks/degradations.py [docs/degradations]

The image is scikit-image's astronaut (NASA, public domain); every picture has its seed.
"""

import sys
from fractions import Fraction
from pathlib import Path

import cv2
import h264_pairs
import numpy as np
from skimage import data
from video_quality import through_x264

from mtair import degrade
from pipeline.frames import StreamInfo

SIDE = 224
PICTURES = {
    "clean": lambda image, rng: image,
    "gaussian_noise": lambda image, rng: degrade.gaussian_noise(image, 25, rng),
    "sensor_noise": lambda image, rng: degrade.sensor_noise(image, 60, 2, rng),
    "plane_noise": lambda image, rng: degrade.plane_noise(image, 20, 15, rng),
    "jpeg": lambda image, rng: degrade.jpeg(image, 15),
    "video_noise": lambda image, rng: degrade.video_noise(image, 25, 60, rng),
    "h264": lambda image, rng: h264(image, 38),
    "rain_light": lambda image, _: degrade.rain(image, np.random.default_rng(1)),
    "rain_heavy": lambda image, _: degrade.rain(image, np.random.default_rng(5)),
    "haze": lambda image, rng: degrade.haze(
        image, degrade.smooth_depth(*image.shape[:2], rng), 1.2, 0.9
    ),
}
SEED = 4


def h264(image: np.ndarray, crf: float) -> np.ndarray:
    """A frame of a clip that drifts over `image`, through x264, as in h264_pairs.py."""
    pixels = np.rint(image * 255).astype(np.uint8)
    clip = [h264_pairs.planes_of(np.roll(pixels, number - 7, axis=1)) for number in range(12)]
    height, width = pixels.shape[:2]
    info = StreamInfo(width, height, Fraction(1, 25), Fraction(25), h264_pairs.FORMAT)
    return h264_pairs.rgb_of(through_x264(clip, info, crf)[7]).astype(np.float32) / 255


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/degradations")
    folder.mkdir(parents=True, exist_ok=True)
    picture = data.astronaut()[20 : 20 + 2 * SIDE, 60 : 60 + 2 * SIDE]
    small = cv2.resize(picture, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    image = small.astype(np.float32) / np.float32(255)
    for name, worsen in PICTURES.items():
        out = np.rint(worsen(image, np.random.default_rng(SEED))[..., ::-1] * 255)
        path = folder / f"{name}.jpg"
        cv2.imwrite(str(path), out.astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 88])
        print(f"{path} {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()

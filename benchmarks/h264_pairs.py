"""Training pairs that went through a real H.264 encoder: `train: mixture: h264` reads them.

    python benchmarks/h264_pairs.py DATA/train/clean_bsd DATA/train/h264 [--seed 0]

Each image becomes a short clip, a window that drifts over it; noise of sigma 0 to 25 on half of the
clips, then x264 at a CRF of 20 to 38. A frame in the middle, predicted from others, is kept as PNG
in OUT/degraded, and what it was before in OUT/clean. Images named `val_` are left out: they are
held out in training. OpenCV's wheel has no H.264 encoder, and `mtair` knows none: hence a script.
"""

import argparse
from fractions import Fraction
from pathlib import Path

import clips
import cv2
import numpy as np
from video_quality import through_x264

from pipeline.frames import PixelFormat, Planes, StreamInfo

FRAMES, KEPT, MARGIN = 12, 7, 24
FORMAT = PixelFormat("yuv420p", 3, 1, 1, 8, "bt601", False, "left")


def planes_of(rgb: np.ndarray) -> Planes:
    """BT.601 4:2:0 planes of an RGB image with even sides."""
    h, w = rgb.shape[:2]
    luma, u, v = np.split(
        cv2.cvtColor(rgb, cv2.COLOR_RGB2YUV_I420).ravel(), [h * w, h * w * 5 // 4]
    )
    return luma.reshape(h, w), u.reshape(h // 2, w // 2), v.reshape(h // 2, w // 2)


def rgb_of(planes: Planes) -> np.ndarray:
    h, w = planes[0].shape
    i420 = np.concatenate([plane.ravel() for plane in planes]).reshape(h * 3 // 2, w)
    return cv2.cvtColor(i420, cv2.COLOR_YUV2RGB_I420)


def pair(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(degraded, clean) windows of an RGB image."""
    h, w = (side - MARGIN & ~1 for side in image.shape[:2])
    step = rng.integers(-2, 3, 2)  # pixels a frame
    places = MARGIN // 2 + (np.arange(FRAMES) - KEPT)[:, None] * step
    windows = [image[y : y + h, x : x + w] for y, x in np.clip(places, 0, MARGIN)]
    clip = [planes_of(np.ascontiguousarray(window)) for window in windows]
    if rng.random() < 0.5:
        sigma, first = rng.uniform(0, 25), int(rng.integers(1 << 30))
        clip = [clips.add_noise(planes, sigma, first + n) for n, planes in enumerate(clip)]
    info = StreamInfo(w, h, Fraction(1, 25), Fraction(25), FORMAT)
    return rgb_of(through_x264(clip, info, float(rng.uniform(20, 38)))[KEPT]), windows[KEPT]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()
    for name in ("degraded", "clean"):
        (args.out / name).mkdir(parents=True, exist_ok=True)
    paths = sorted(p for p in args.images.glob("*.[jp][pn]g") if not p.name.startswith("val_"))
    for number, path in enumerate(paths[: args.limit]):
        image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        sides = pair(image, np.random.default_rng([args.seed, number]))
        for name, rgb in zip(("degraded", "clean"), sides, strict=True):
            target = args.out / name / f"{path.stem}.png"
            cv2.imwrite(str(target), cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
    print(f"{len(paths[: args.limit])} pairs in {args.out}")


if __name__ == "__main__":
    main()

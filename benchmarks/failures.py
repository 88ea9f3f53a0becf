"""The pictures of docs/weights: what shipped weights fail on, degraded | restored | clean.

    python benchmarks/failures.py [--model tiny] [--out docs/weights]

The images are scikit-image's astronaut and rocket (NASA, public domain); every picture has its
seed. Whole images are restored, and the PSNR of the part shown is printed before and after.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch
from skimage import data

import mtair
from mtair import degrade
from mtair.evaluate import psnr

WIDTH, HEIGHT = 240, 200


def pictures() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """name → (degraded, clean), float RGB in 0..1."""
    astronaut, rocket = (
        image.astype(np.float32) / np.float32(255)
        for image in (data.astronaut()[:200, 100:340], data.rocket()[200:400, 200:440])
    )
    depth = degrade.smooth_depth(HEIGHT, WIDTH, np.random.default_rng(2))
    dark = rocket * np.float32(0.35)
    return {
        "heavy_rain": (degrade.rain(astronaut, np.random.default_rng(10)), astronaut),
        "dense_haze": (degrade.haze(astronaut, depth, 2.0, 0.95), astronaut),
        "noise_in_the_dark": (degrade.gaussian_noise(dark, 50, np.random.default_rng(3)), dark),
        "what_looks_like_haze": (rocket, rocket),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--out", type=Path, default=Path("docs/weights"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = mtair.load_model(args.model)
    for name, (degraded, clean) in pictures().items():
        batch = torch.from_numpy(np.ascontiguousarray(degraded)).permute(2, 0, 1)[None]
        with torch.no_grad():
            restored = model(batch)[0].permute(1, 2, 0).clamp(0, 1).numpy()
        shown = np.rint(np.hstack([degraded, restored, clean])[..., ::-1] * 255).astype(np.uint8)
        path = args.out / f"{Path(args.model).stem}_{name}.jpg"
        cv2.imwrite(str(path), shown, [cv2.IMWRITE_JPEG_QUALITY, 90])
        before, after = psnr(degraded, clean), psnr(restored, clean)
        print(f"{path}: {before:.2f} -> {after:.2f} dB, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()

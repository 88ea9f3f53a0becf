"""What a run tells of itself while it trains: the held-out PSNR, pictures, and its log on disk."""

import json
from pathlib import Path

import cv2
import numpy as np

from mtair import degrade
from mtair.data import TrainingData, make_pair
from mtair.evaluate import psnr, restore_image
from mtair.model import MTAIR
from mtair.schedule import TrainConfig

HELD_OUT_SIGMA = 25


def held_out_psnr(model: MTAIR, data: TrainingData) -> float:
    """Mean PSNR in dB of the held-out images at sigma 25: progress, not a result."""
    total = 0.0
    for number, image in enumerate(data.held_out):
        clean = image.astype(np.float32) / np.float32(255)
        noisy = degrade.gaussian_noise(clean, HELD_OUT_SIGMA, np.random.default_rng([7, number]))
        total += psnr(restore_image(model, noisy), clean)
    return total / len(data.held_out)


def save_samples(model: MTAIR, data: TrainingData, config: TrainConfig, path: Path) -> None:
    """A PNG with a row of degraded, restored and clean for each kind; the same ones every time."""
    rows = []
    for kind in config.mixture:
        rng = np.random.default_rng(config.seed)
        degraded, clean = make_pair(data, kind, config.stages[-1][1], rng)
        rows.append(np.hstack([degraded, restore_image(model, degraded), clean]))
    pixels = np.rint(np.vstack(rows)[..., ::-1] * 255).astype(np.uint8)
    path.parent.mkdir(exist_ok=True)
    if not cv2.imwrite(str(path), pixels):
        raise OSError(f"{path}: the samples could not be written")


def forget_lines_after(step: int, path: Path) -> None:
    """What was logged after the state that a run is resumed from comes again."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines):
        if not line.endswith("\n") or json.loads(line).get("step", 0) > step:
            path.write_text("".join(lines[:number]))
            return

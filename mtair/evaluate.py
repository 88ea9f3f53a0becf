"""Evaluation by the published protocol: PSNR and SSIM on noise, rain and haze, image by image.

Owns the protocol (arXiv 2412.15845's released test code, restated in docs/evaluation.md) and the
table; knows nothing of training. Noise is seeded per (image, sigma), so that a figure repeats.
"""

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mtair import degrade
from mtair.images import read_image
from mtair.model import MTAIR

SIGMAS = (15, 25, 50)

Pair = tuple[str, degrade.Image, degrade.Image]  # name, degraded, clean


@dataclass(frozen=True, slots=True)
class Score:
    """One restored image. PSNR in dB, infinite where the two are equal."""

    task: str
    image: str
    psnr_input: float
    psnr: float
    ssim_input: float
    ssim: float


def crop_to_16(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Drop H % 16 rows and W % 16 columns, half of them (floored) before, as the released code."""
    h, w = image.shape[:2]
    top, left = (h % 16) // 2, (w % 16) // 2
    return image[top : top + h - h % 16, left : left + w - w % 16]


def psnr(a: degrade.Image, b: degrade.Image) -> float:
    """Peak signal-to-noise ratio in dB of two `[H, W, 3]` images in 0..1, over all samples."""
    error = float(np.mean(np.square(a.astype(np.float64) - b)))
    return -10 * math.log10(error) if error else math.inf


def ssim(a: degrade.Image, b: degrade.Image) -> float:
    """SSIM with scikit-image's defaults: 7x7 uniform window, mean over the channels."""
    from skimage.metrics import structural_similarity  # training does without it

    return float(structural_similarity(a, b, data_range=1.0, channel_axis=2))  # type: ignore[no-untyped-call]


def _load(path: Path) -> degrade.Image:
    return crop_to_16(read_image(path)).astype(np.float32) / np.float32(255)


_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def _images(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES)
    if not found:
        raise FileNotFoundError(f"{folder}: no images there")
    return found


def _ground_truth(folder: Path, degraded: Path) -> Path:
    """The clean image of a pair: the same name, `norain-N` for `rain-N`, or `ID` for `ID_A_B`."""
    stem = degraded.stem
    for name in (stem, f"no{stem}", stem.split("_")[0]):
        for suffix in (degraded.suffix, *_SUFFIXES):
            if (path := folder / f"{name}{suffix}").is_file():
                return path
    raise FileNotFoundError(f"{folder}: no clean image for {degraded.name}")


def noise_task(folder: Path, sigma: int) -> Iterator[Pair]:
    """(name, noisy, clean) of every image of `folder`; sigma 0 gives the clean image itself."""
    for number, path in enumerate(_images(folder)):
        clean = _load(path)
        rng = np.random.default_rng([sigma, number])
        noisy = degrade.gaussian_noise(clean, sigma, rng) if sigma else clean
        yield path.name, noisy, clean


def pair_task(degraded: Path, clean: Path) -> Iterator[Pair]:
    """(name, degraded, clean) of two folders with matching names."""
    for path in _images(degraded):
        yield path.name, _load(path), _load(_ground_truth(clean, path))


@torch.inference_mode()
def restore_image(model: MTAIR, image: degrade.Image) -> degrade.Image:
    """Whole image, no tiling, no self-ensemble; clipped to 0..1 and not rounded to 8 bit."""
    device = next(model.parameters()).device
    batch = torch.from_numpy(image).permute(2, 0, 1)[None].to(device)
    out = model(batch).clamp(0, 1)[0].permute(1, 2, 0).cpu().numpy()
    return np.ascontiguousarray(out, dtype=np.float32)


def evaluate(
    model: MTAIR, root: Path, *, limit: int | None = None, tasks: list[str] | None = None
) -> Iterator[Score]:
    """Score every image of `root` (laid out as docs/evaluation.md has it), task by task.

    `limit` takes the first images of each task only: a quick look, not a result.
    """
    sources: dict[str, Iterator[Pair]] = {
        f"CBSD68 {s}": noise_task(root / "CBSD68", s) for s in SIGMAS
    }
    sources["Rain100L"] = pair_task(root / "Rain100L/rain", root / "Rain100L/gt")
    sources["SOTS val"] = pair_task(root / "SOTS_outdoor/hazy", root / "SOTS_outdoor/gt")
    sources["CBSD68 clean"] = noise_task(root / "CBSD68", 0)
    if unknown := set(tasks or ()) - set(sources):
        raise ValueError(f"no task {sorted(unknown)}; there are {list(sources)}")
    for task, source in sources.items():
        if not tasks or task in tasks:
            yield from scores(model, task, source, limit=limit)


def scores(
    model: MTAIR, task: str, source: Iterator[Pair], *, limit: int | None = None
) -> Iterator[Score]:
    """Restore and score each pair of `source`."""
    for name, degraded, clean in islice(source, limit):
        if degraded.shape != clean.shape:
            sizes = " and ".join(f"{x.shape[1]}x{x.shape[0]}" for x in (degraded, clean))
            raise ValueError(f"{name}: degraded and clean are of different sizes, {sizes}")
        out = restore_image(model, degraded)
        yield Score(
            task, name, psnr(degraded, clean), psnr(out, clean), ssim(degraded, clean),
            ssim(out, clean),
        )  # fmt: skip


def table(rows: list[Score]) -> str:
    """A Markdown table: the mean over the images of each task."""
    lines = [
        "| task | images | PSNR in | PSNR out | SSIM in | SSIM out |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for task in dict.fromkeys(s.task for s in rows):
        its = [s for s in rows if s.task == task]
        means = [
            float(np.mean([getattr(s, field) for s in its]))
            for field in ("psnr_input", "psnr", "ssim_input", "ssim")
        ]
        lines.append(
            f"| {task} | {len(its)} | {means[0]:.2f} | {means[1]:.2f} | "
            f"{means[2]:.4f} | {means[3]:.4f} |"
        )
    return "\n".join(lines)


def write_csv(rows: list[Score], path: Path) -> None:
    """One line an image."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Score.__dataclass_fields__)
        writer.writerows([getattr(s, f) for f in Score.__dataclass_fields__] for s in rows)

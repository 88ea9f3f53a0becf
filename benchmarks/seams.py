"""What tiling costs: restored tiles against the restored whole frame, by overlap.

    python benchmarks/seams.py DATA/val [--model tiny] [--tile 128]

For every overlap a cut of the same noisy images is restored whole and in 3x2 tiles, in float32.
Printed: the mean absolute difference to the whole-frame result (of 255) in the band of 4 pixels
on both sides of each tile border, everywhere else,
their ratio, and the PSNR against the clean image.
"""

import argparse
import math
from pathlib import Path

import cv2
import numpy as np
import torch
from machine import machine

from mtair import degrade, load_model
from pipeline.tiles import TileGrid

BAND = 4


def noisy_and_clean(path: Path, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    bgr = cv2.imread(str(path), cv2.IMREAD_COLOR)
    h, w = (side // 16 * 16 for side in bgr.shape[:2])
    clean = np.ascontiguousarray(bgr[:h, :w, ::-1]).astype(np.float32) / np.float32(255)
    return degrade.gaussian_noise(clean, sigma, np.random.default_rng([int(sigma), 1])), clean


@torch.inference_mode()
def restore(model: torch.nn.Module, image: np.ndarray) -> np.ndarray:
    out = model(torch.from_numpy(image).permute(2, 0, 1)[None])
    return out.clamp(0, 1)[0].permute(1, 2, 0).numpy()


def restore_tiled(
    model: torch.nn.Module, image: np.ndarray, tile: int, overlap: int
) -> tuple[np.ndarray, np.ndarray]:
    """The tiled result and the mask of the bands along the tile borders."""
    h, w = image.shape[:2]
    grid = TileGrid.plan(
        w, h, log2_chroma_w=0, log2_chroma_h=0, n_planes=3, tile=(tile, tile), overlap=overlap,
        batch_size=1, align=16,
    )  # fmt: skip
    planes = tuple(np.ascontiguousarray(image[..., c]) for c in range(3))
    batches = []
    for batch in grid.split(planes):
        out = restore(model, np.stack([plane[0] for plane in batch], axis=-1))
        batches.append(tuple(np.ascontiguousarray(out[None, ..., c]) for c in range(3)))
    assert grid.n_tiles == 6
    assert (grid.tile_width, grid.tile_height) == (tile, tile)
    mask = np.zeros((h, w), dtype=bool)
    for span in grid.columns[1:]:
        x = span.start + span.keep_from
        mask[:, max(0, x - BAND) : x + BAND] = True
    for span in grid.rows[1:]:
        y = span.start + span.keep_from
        mask[max(0, y - BAND) : y + BAND] = True
    return np.stack(grid.merge(batches), axis=-1), mask


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return -10 * math.log10(float(np.mean(np.square(a - b))))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tile", type=int, default=128)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--sigma", type=float, default=25)
    args = parser.parse_args()
    model = load_model(args.model)
    pairs = [noisy_and_clean(p, args.sigma) for p in sorted((args.data / "CBSD68").glob("*.jpg"))]
    pairs = [p for p in pairs if p[0].shape[0] >= 2 * args.tile <= p[0].shape[1] * 2 / 3]
    pairs = pairs[: args.images]
    print(
        f"{args.model}, {len(pairs)} images of CBSD68 at sigma {args.sigma:g}, 3x2 tiles of "
        f"{args.tile}, float32; {machine()}\n"
    )
    print("| overlap | near borders | elsewhere | ratio | PSNR tiled | PSNR whole |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for overlap in (0, 8, 16, 32, 64):
        rows = [measure(model, pair, args.tile, overlap) for pair in pairs]
        near, far, tiled, whole = np.mean(rows, axis=0)
        print(
            f"| {overlap} | {near:.3f} | {far:.3f} | {near / far:.2f} | {tiled:.3f} "
            f"| {whole:.3f} |",
            flush=True,
        )


def measure(
    model: torch.nn.Module, pair: tuple[np.ndarray, np.ndarray], tile: int, overlap: int
) -> tuple[float, float, float, float]:
    """One image, cut so that 3x2 tiles with exactly this overlap cover it."""
    height, width = 2 * tile - overlap, 3 * tile - 2 * overlap
    noisy, clean = (np.ascontiguousarray(image[:height, :width]) for image in pair)
    whole = restore(model, noisy)
    tiled, mask = restore_tiled(model, noisy, tile, overlap)
    error = np.abs(tiled - whole).mean(-1) * 255
    return (
        float(error[mask].mean()), float(error[~mask].mean()), psnr(tiled, clean),
        psnr(whole, clean),
    )  # fmt: skip


if __name__ == "__main__":
    main()

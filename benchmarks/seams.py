"""What tiling costs: restored tiles against the restored whole frame, by overlap.

    python benchmarks/seams.py DATA/val [--model tiny] [--tile 128]

For every overlap the same noisy images are restored whole and in tiles of one size, in float32.
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
    pairs = [
        noisy_and_clean(p, args.sigma)
        for p in sorted((args.data / "CBSD68").glob("*.jpg"))[: args.images]
    ]
    wholes = [restore(model, noisy) for noisy, _ in pairs]
    print(
        f"{args.model}, {len(pairs)} images of CBSD68 at sigma {args.sigma:g}, tiles up to "
        f"{args.tile}, float32; {machine()}\n"
    )
    print("| overlap | near borders | elsewhere | ratio | PSNR tiled | PSNR whole | compute |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    whole_psnr = np.mean([psnr(w, c) for w, (_, c) in zip(wholes, pairs, strict=True)])
    for overlap in (0, 8, 16, 32, 64):
        near, far, quality, pixels = [], [], [], []
        for (noisy, clean), whole in zip(pairs, wholes, strict=True):
            tiled, mask = restore_tiled(model, noisy, args.tile, overlap)
            error = np.abs(tiled - whole).mean(-1) * 255
            near.append(error[mask].mean())
            far.append(error[~mask].mean())
            quality.append(psnr(tiled, clean))
            grid = TileGrid.plan(
                noisy.shape[1], noisy.shape[0], log2_chroma_w=0, log2_chroma_h=0, n_planes=3,
                tile=(args.tile, args.tile), overlap=overlap, batch_size=1, align=16,
            )  # fmt: skip
            area = grid.n_tiles * grid.tile_width * grid.tile_height
            pixels.append(area / (noisy.shape[0] * noisy.shape[1]))
        print(
            f"| {overlap} | {np.mean(near):.3f} | {np.mean(far):.3f} | "
            f"{np.mean(near) / np.mean(far):.2f} | {np.mean(quality):.3f} | {whole_psnr:.3f} | "
            f"{np.mean(pixels):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

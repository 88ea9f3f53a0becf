"""What --static-threshold saves and costs: share of tiles reused, PSNR and flicker.

    python benchmarks/static.py CLIP [--frames 24] [--size 320x192]

Two clips with noise of sigma 5 and 25 in RGB, 8-bit 4:2:0: a static camera, which is one frame of
CLIP before which a small square moves, and CLIP itself. Restored in tiles of 128 with an overlap of
32, through the window, as a job does it. Thresholds are in 8-bit code values.
"""

import argparse
from itertools import islice
from pathlib import Path

import clips
import numpy as np
from machine import machine

from pipeline.config import RestoreConfig
from pipeline.decode import VideoSource
from pipeline.derived import plan_grid, static_tiles
from pipeline.frames import Frame, Planes, StreamInfo
from pipeline.pools import open_pool
from pipeline.restore import restore_frames
from workers import RestorerPool

THRESHOLDS = {5: (0, 4, 6, 8, 12), 25: (0, 16, 20, 24, 32)}
SQUARE = 24


def static_camera(still: Planes, n_frames: int) -> list[Planes]:
    """A square that is brighter by 40 moves 6 pixels a frame through the lower left corner."""
    frames = []
    for number in range(n_frames):
        luma = still[0].astype(np.int16)
        x, y = 6 * number, luma.shape[0] - 2 * SQUARE
        luma[y : y + SQUARE, x : x + SQUARE] += 40
        frames.append((np.clip(luma, 0, 255).astype(np.uint8), *still[1:]))
    return frames


def measure(
    name: str, clean: list[Planes], sigma: int, info: StreamInfo, pool: RestorerPool
) -> None:
    noisy = [clips.add_noise(planes, sigma, number) for number, planes in enumerate(clean)]
    for threshold in THRESHOLDS[sigma]:
        config = settings(threshold)
        grid = plan_grid(info, config, "cpu", 16)
        tiles = static_tiles(pool.submit, info, grid, config)
        frames = (Frame(number, number, planes) for number, planes in enumerate(noisy))
        after = [frame.planes for frame in restore_frames(frames, grid, tiles, 2)]
        print(
            f"| {name}, noise {sigma} | {threshold} | {tiles.n_reused / tiles.n_tiles:.0%} "
            f"| {clips.psnr(after, clean):.2f} | {clips.flicker(after, clean):.2f} |",
            flush=True,
        )


def settings(threshold: float) -> RestoreConfig:
    return RestoreConfig.load(
        overrides={"tile.size": 128, "tile.overlap": 32, "tile.static_threshold": threshold}
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("clip", type=Path)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--size", default="320x192")
    args = parser.parse_args()
    size = tuple(map(int, args.size.split("x")))
    with VideoSource(args.clip) as source:
        moving = [clips.crop(frame.planes, size) for frame in islice(source.frames(), args.frames)]
        info = clips.cropped(source.info, moving[0])
    print(f"{args.clip.name}, {args.frames} frames, {args.size} pixels, tiny; {machine()}\n")
    print("| clip | threshold | tiles reused | PSNR | flicker |")
    print("| --- | ---: | ---: | ---: | ---: |")
    with open_pool(info.pixel_format, settings(0), "cpu") as pool:
        for sigma in THRESHOLDS:
            still = static_camera(moving[0], args.frames)
            measure("static camera", still, sigma, info, pool)
            measure(args.clip.stem, moving, sigma, info, pool)


if __name__ == "__main__":
    main()

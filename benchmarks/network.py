"""Milliseconds of one 1280x720 4:2:0 frame through tiles, colour and network, by tile size.

    python benchmarks/network.py [--model tiny] [--precision auto] [--tiles 256 384 512 0]
    python benchmarks/network.py --batch 8   # so many tiles to a worker at once, which chooses

Split, planes to RGB, network, residual to planes and merge: all that a worker and the grid do.
"""

import argparse
import logging
import time

import numpy as np
from machine import machine

from pipeline.tiles import TileGrid
from workers import PlaneSpec, WorkerSpec, describe_weights
from workers.worker import TileWorker

PLANES = PlaneSpec(3, 1, 1, 8, "bt709", False, "left")


def frame(width: int, height: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """A smooth picture with noise, 4:2:0."""
    rng = np.random.default_rng(seed)
    shapes = ((height, width), (height // 2, width // 2), (height // 2, width // 2))
    return tuple(
        np.clip(128 + 60 * np.sin(np.arange(w) / 40) + rng.normal(0, 10, (h, w)), 16, 235).astype(
            np.uint8
        )
        for h, w in shapes
    )


def measure(worker: TileWorker, grid: TileGrid, planes: tuple[np.ndarray, ...], runs: int) -> float:
    """Median seconds of a frame."""
    times = []
    for run in range(runs + 1):
        start = time.perf_counter()
        grid.merge([worker(batch) for batch in grid.split(planes)])
        if run:
            times.append(time.perf_counter() - start)
    return float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--precision", nargs="+", default=["auto", "fp32"])
    parser.add_argument("--tiles", nargs="+", default=["256", "320", "384", "512", "0"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--overlap", type=int, default=32)
    parser.add_argument("--size", default="1280x720")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    logging.basicConfig(format="%(message)s")
    logging.getLogger("workers.batching").setLevel("INFO")
    stride = describe_weights(args.model).stride
    print(
        f"{args.model} at {args.size}, overlap {args.overlap}, median of {args.runs}; {machine()}\n"
    )
    print("| precision | tile asked | tiles | ms a frame |\n| --- | --- | --- | ---: |")
    for precision in args.precision:
        for tile in args.tiles:
            worker = TileWorker(WorkerSpec(args.model, PLANES, args.device, precision))
            w, _, h = tile.partition("x")
            size = (int(w), int(h or w)) if int(w) else None
            grid = TileGrid.plan(
                width, height, log2_chroma_w=1, log2_chroma_h=1, n_planes=3, tile=size,
                overlap=args.overlap, batch_size=args.batch, align=stride,
            )  # fmt: skip
            worker.warm_up(next(iter(grid.split(frame(width, height)))))
            seconds = measure(worker, grid, frame(width, height), args.runs)
            shape = f"{grid.n_tiles} of {grid.tile_width}x{grid.tile_height}"
            print(f"| {precision} | {tile} | {shape} | {seconds * 1e3:.0f} |", flush=True)


if __name__ == "__main__":
    main()

"""PSNR of every fast path against the plain float32 path, on images of CBSD68.

    python benchmarks/fast_paths.py DATA/val [--model tiny] [--images 4] [--device cuda:0]

The paths are those of `mtair bench`; fails where one differs by 0.02 dB or more.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch

from mtair import bench
from mtair.evaluate import noise_task, psnr
from mtair.machine import machine

LIMIT_DB = 0.02


def restored(model: torch.nn.Module, image: np.ndarray, eager: bool) -> np.ndarray:
    device = next(model.parameters()).device
    batch = torch.from_numpy(image).permute(2, 0, 1)[None].to(device)
    with torch.set_grad_enabled(eager):  # with gradients on nothing is fused
        out = model(batch).clamp(0, 1)
    return out[0].permute(1, 2, 0).cpu().numpy()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path, help="the folder that holds CBSD68")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--sigmas", type=int, nargs="+", default=[15, 25, 50])
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    print(f"{args.model}, {args.images} images of CBSD68; {machine(device)}\n")
    print("| sigma | path | PSNR | largest difference, dB |\n| --- | --- | ---: | ---: |")
    worst = 0.0
    for sigma in args.sigmas:
        images = list(itertools.islice(noise_task(args.data / "CBSD68", sigma), args.images))
        reference: list[float] = []
        for way in bench.paths(device):
            model = bench.prepared(args.model, way, device)
            got = [psnr(restored(model, noisy, way.eager), clean) for _, noisy, clean in images]
            reference = reference or got
            difference = max(abs(a - b) for a, b in zip(got, reference, strict=True))
            worst = max(worst, difference)
            print(f"| {sigma} | {way.label} | {np.mean(got):.3f} | {difference:.5f} |", flush=True)
    if worst >= LIMIT_DB:
        raise SystemExit(f"a path differs by {worst:.4f} dB")


if __name__ == "__main__":
    main()

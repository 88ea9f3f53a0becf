"""torch.compile of the network against the eager and the fused pass, on a CPU in bfloat16.

    python benchmarks/compiled.py [--model tiny] [--size 1280x720]

The three take turns, so that what else the machine does is the same for all. The scan stays the
Numba kernel everywhere: a graph ends before it and another begins behind.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the commands have it; before torch

import torch
from torch import Tensor

from mtair import bench, blocks
from mtair.machine import machine


def seconds(run: Callable[[Tensor], Tensor], image: Tensor, eager: bool) -> float:
    start = time.perf_counter()
    with torch.set_grad_enabled(eager):  # with gradients on nothing is fused
        run(image)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--size", default="1280x720")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    image = torch.rand(1, 3, height, width)
    blocks.cross_scan = torch.compiler.disable(blocks.cross_scan)
    model = bench.network(args.model).bfloat16().requires_grad_(False)
    ways = {"eager": (model, True), "torch.compile": (torch.compile(model), True),
            "fused": (model, False)}  # fmt: skip
    first = {name: seconds(run, image, eager) for name, (run, eager) in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.runs):
        for name, (run, eager) in ways.items():
            times[name].append(seconds(run, image, eager))
    print(f"{args.model} at {args.size}, bf16, median of {args.runs} in turns; ", end="")
    print(f"{machine(torch.device('cpu'))}\n")
    print("| pass | ms | times eager | first pass, s |\n| --- | ---: | ---: | ---: |")
    eager_ms = 1e3 * statistics.median(times["eager"])
    for name, measured in times.items():
        ms = 1e3 * statistics.median(measured)
        print(f"| {name} | {ms:.0f} | {eager_ms / ms:.2f} | {first[name]:.1f} |")


if __name__ == "__main__":
    main()

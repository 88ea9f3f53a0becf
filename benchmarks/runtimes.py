"""ONNX Runtime and OpenVINO against the fused pass, on all of the network but the scan.

    pip install onnx onnxscript onnxruntime openvino
    python benchmarks/runtimes.py [--model tiny] [--size 1280x720]

What is exported has a sum in the place of the scan: the same shapes in and out, hardly any time.
The fused pass runs with its scan, whose time is taken by itself and subtracted. A runtime's figure
for the whole network is its own time and the scan's: what a hand-over between the two would cost
is not in it. All take turns in one run.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the commands have it; before torch

import torch
from machine import machine
from torch import Tensor

from mtair import bench
from mtair.scan import numba_cross

PACKAGES = ("onnx", "onnxscript", "onnxruntime", "openvino")
Run = Callable[[], Any]
Times = dict[str, list[tuple[float, float]]]
"""Seconds of each pass, and those of its scans."""


def without_scan(x: Tensor, projection: Tensor, *_: Tensor, **__: object) -> Tensor:
    """Uses what the scan is given, so that a runtime cannot leave its making out."""
    return x + projection.sum((2, 3)).unsqueeze(2)


def export(model: torch.nn.Module, image: Tensor, path: Path) -> Tensor:
    """The plain pass without the scan as ONNX, float32, at this size alone; returns its result."""
    import mtair.blocks as blocks

    kept, blocks.cross_scan = blocks.cross_scan, without_scan
    try:
        with torch.enable_grad():  # without gradients the fused pass would be exported
            torch.onnx.export(model, (image,), path, dynamo=True, optimize=True, verbose=False)
            return model(image)
    finally:
        blocks.cross_scan = kept


def onnx_runtime(path: Path, image: np.ndarray, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: image})[0]


def open_vino(path: Path, image: np.ndarray, threads: int, precision: str) -> Run:
    import openvino

    model = openvino.Core().compile_model(
        path, "CPU",
        {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads,
         "PERFORMANCE_HINT": "LATENCY"},
    )  # fmt: skip
    request = model.create_infer_request()
    return lambda: request.infer([image], share_inputs=True, share_outputs=True)[0]


def difference(work: Run, image: np.ndarray, want: np.ndarray) -> float:
    """The root of the mean squared difference of the correction, of that of the correction."""
    got = np.asarray(work()) - image
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


class Scans:
    """Times the fused pass's scans, wherever they are called."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._parts = numba_cross.parts
        numba_cross.parts = self

    def __call__(self, *args: object, **kwargs: object) -> None:
        start = time.perf_counter()
        self._parts(*args, **kwargs)
        self.seconds += time.perf_counter() - start


def in_turns(works: dict[str, Run], scans: Scans, runs: int) -> Times:
    """`runs` rounds after one to warm up. The second of two passes counts: the first has to bring
    back what the others have pushed out of the caches, and buffers of another precision."""
    times: Times = {name: [] for name in works}
    for round_ in range(runs + 1):
        for name, work in works.items():
            work()
            scans.seconds = 0.0
            start = time.perf_counter()
            work()
            total = time.perf_counter() - start
            if round_:
                times[name].append((total, scans.seconds))
    return times


def table(times: Times) -> str:
    rest = {name: statistics.median(a - b for a, b in taken) for name, taken in times.items()}
    scan = {name: statistics.median(b for _, b in taken) for name, taken in times.items()}
    ours = scan["fused, bf16"]
    whole = {name: rest[name] + (scan[name] or ours) for name in times}
    lines = ["| pass | without the scan, ms | whole, ms | whole, of fused bf16 |",
             "| --- | ---: | ---: | ---: |"]  # fmt: skip
    lines += [
        f"| {name} | {1e3 * rest[name]:.0f} | {1e3 * whole[name]:.0f} | "
        f"{whole[name] / whole['fused, bf16']:.2f} |"
        for name in times
    ]
    return "\n".join(lines)


@torch.inference_mode()
def fused(model: torch.nn.Module, image: Tensor) -> Tensor:
    return model(image)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--size", default="1280x720")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    if missing := [name for name in PACKAGES if not importlib.util.find_spec(name)]:
        raise SystemExit(f"no {' and no '.join(missing)} here: pip install {' '.join(PACKAGES)}")
    width, height = map(int, args.size.split("x"))
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    threads, scans = torch.get_num_threads(), Scans()
    model = bench.network(args.model).requires_grad_(False)
    low = bench.network(args.model).bfloat16().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "without_scan.onnx"
        want = export(model, image, path).numpy() - image.numpy()
        works: dict[str, Run] = {
            "fused, bf16": lambda: fused(low, image),
            "fused, fp32": lambda: fused(model, image),
            "ONNX Runtime, fp32": onnx_runtime(path, image.numpy(), threads),
            "OpenVINO, fp32": open_vino(path, image.numpy(), threads, "f32"),
            "OpenVINO, bf16": open_vino(path, image.numpy(), threads, "bf16"),
        }
        off = {name: difference(work, image.numpy(), want) for name, work in works.items()}
        times = in_turns(works, scans, args.runs)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    print(f"{args.model} at {args.size}, median of {args.runs} in turns; {machine()}, {versions}\n")
    print(table(times))
    exported = (f"{name} {off[name]:.1e}" for name in list(works)[2:])
    print(f"\nRelative difference of the correction from PyTorch's: {'; '.join(exported)}")


if __name__ == "__main__":
    main()

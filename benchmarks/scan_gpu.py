"""The four-direction scan on a GPU: the fused Triton kernel against one scan per direction.

    python benchmarks/scan_gpu.py

Beside it runs mamba_ssm's selective scan over four copied sequences and their merge or, where that
is not installed, the plain PyTorch loop, once. The share of the peak is of what a copy from device
memory to device memory reaches in the same run.
"""

import math
import statistics
from collections.abc import Callable

import torch
from machine import machine

from mtair.scan import Backend, choose, cross_scan, explain

SIZES = ((1, 128, 128, 96, 16), (8, 256, 256, 96, 16))  # images, height, width, channels, states
DTYPES = (torch.float32, torch.bfloat16)  # the network scans in float32
CUDA = torch.device("cuda")
Inputs = tuple[torch.Tensor, ...]


def inputs(n: int, height: int, width: int, d: int, states: int, dtype: torch.dtype) -> Inputs:
    """x, projection, dt_weight, A, dt_bias, D, with steps as a trained network has them."""
    torch.manual_seed(0)
    length, rank = height * width, math.ceil(d / 16)
    x = torch.randn(n, length, d, device=CUDA, dtype=dtype)
    projection = torch.randn(n, length, 4, rank + 2 * states, device=CUDA, dtype=dtype)
    dt_weight = torch.randn(4, d, rank, device=CUDA, dtype=dtype) / rank**0.5
    A = -torch.rand(4, d, states, device=CUDA) * states
    dt_bias, D = torch.randn(4, d, device=CUDA) - 3, torch.randn(4, d, device=CUDA)
    return x, projection, dt_weight, A, dt_bias, D


def milliseconds(work: Callable[[], object], runs: int, warm_up: int = 3) -> float:
    """The median of `runs`, by the device's own clock, the L2 cache emptied before each."""
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device=CUDA)
    for _ in range(warm_up):
        work()
    times = []
    for _ in range(runs):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def least_bytes(n: int, height: int, width: int, d: int, states: int, item: int) -> int:
    """What any scan must move: each input read once, y written once.

    Per pixel: x is d numbers, the projection 4·(d/16 + 2·S), all of `item` bytes; y is d float32.
    The weights are small. The kernel itself is given the steps in full, 4·d float32 more, and reads
    them, B and C twice: the share of the peak counts none of that, so it says how far the whole is
    from a perfect pass.
    """
    rank = math.ceil(d / 16)
    return n * height * width * (item * (d + 4 * (rank + 2 * states)) + 4 * d)


def peak_bytes_per_second() -> float:
    """A copy of 1 GiB: it reads and writes every byte."""
    source = torch.ones(2**30, dtype=torch.uint8, device=CUDA)
    target = torch.empty_like(source)
    return 2 * source.numel() / (milliseconds(lambda: target.copy_(source), 30) / 1e3)


def difference(data: Inputs, height: int, width: int, other: Backend) -> float:
    """The largest difference from the other backend, of its largest value."""
    got, want = (
        cross_scan(*data, height=height, width=width, backend=backend).double()
        for backend in ("triton", other)
    )
    return float((got - want).abs().max() / want.abs().max())


def row(size: tuple[int, int, int, int, int], dtype: torch.dtype, peak: float) -> str:
    data = inputs(*size, dtype)
    other: Backend = next(
        found.backend for found in explain(CUDA) if found.available and found.backend != "triton"
    )

    def scan(backend: Backend) -> Callable[[], object]:
        return lambda: cross_scan(*data, height=size[1], width=size[2], backend=backend)

    fused = milliseconds(scan("triton"), 50)
    share = least_bytes(*size, data[0].element_size()) / (fused / 1e3) / peak
    off = difference(data, *size[1:3], other)
    left = f"| {'x'.join(map(str, size))} | {dtype} | {fused:.3f} | {share:.0%} | {off:.1e} |"
    if dtype != torch.float32:  # the others would first widen their inputs: no fair race
        return f"{left} | |"
    plain = milliseconds(scan(other), 20 if other == "mamba_ssm" else 1, warm_up=1)
    return f"{left} {other} {plain:.3f} | {plain / fused:.2f} |"


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs an NVIDIA GPU, and there is none here")
    choose("triton", CUDA)
    peak = peak_bytes_per_second()
    print(f"{torch.cuda.get_device_name()}; {machine()}; copy {peak / 1e9:.0f} GB/s\n")
    for found in explain(CUDA):
        if found.backend == "mamba_ssm" and not found.available:
            print(f"Not compared with mamba_ssm, but with the plain loop: {found.why}\n")
    print(
        "| size | inputs | triton ms | of peak bandwidth | other ms | other/triton | difference |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    with torch.inference_mode():
        for size in SIZES:
            for dtype in DTYPES:
                print(row(size, dtype, peak), flush=True)


if __name__ == "__main__":
    main()

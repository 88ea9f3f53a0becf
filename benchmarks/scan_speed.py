"""The Numba scans against the plain PyTorch loop, this project's first kernel, and the memory.

    python benchmarks/scan_speed.py

Four directions over an image of 64x64 (4,096 steps), 96 channels, 16 states, steps of rank 6. The
first kernel comes from the history of this repository (skipped where there is none); it is given
the same work, with the projection of the steps, the sum of the four directions and the skip.
"""

import importlib.util
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from machine import machine

from mtair.scan import cross_scan, numba_cpu

SIDE, CHANNELS, RANK, STATES = 64, 96, 6, 16
LENGTH = SIDE * SIDE
FIRST = "7a018df:mtair/scan/numba_cpu.py"


def image_inputs() -> tuple[torch.Tensor, ...]:
    """x, projection, dt_weight, A, dt_bias, D."""
    torch.manual_seed(0)
    return (
        torch.randn(1, LENGTH, CHANNELS), torch.randn(1, LENGTH, 4, RANK + 2 * STATES),
        torch.randn(4, CHANNELS, RANK) / RANK**0.5, -torch.rand(4, CHANNELS, STATES) * 4,
        torch.randn(4, CHANNELS) - 2, torch.randn(4, CHANNELS),
    )  # fmt: skip


def best(works: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """The least seconds of each in `runs` rounds after one to warm up, taken in turns."""
    times = {name: [] for name in works}
    for round_ in range(runs + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if round_:
                times[name].append(time.perf_counter() - start)
    return {name: min(taken) for name, taken in times.items()}


def first_kernel() -> ModuleType | None:
    """The module as it was when this project had its first Numba scan."""
    shown = subprocess.run(
        ["git", "show", FIRST], cwd=Path(__file__).parent, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if shown.returncode:
        return None
    path = Path(tempfile.mkdtemp()) / "first_kernel.py"
    path.write_text(shown.stdout)
    spec = importlib.util.spec_from_file_location("first_kernel", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_first_kernel(module: ModuleType) -> torch.Tensor:
    x, projection, dt_weight, A, dt_bias, D = image_inputs()
    low, B, C = projection.split([RANK, STATES, STATES], dim=3)
    steps = torch.block_diag(*dt_weight)

    def work() -> torch.Tensor:
        dt = F.linear(low.reshape(1, LENGTH, 4 * RANK), steps).view(1, LENGTH, 4, CHANNELS)
        y = module.scan(
            x.unsqueeze(2), dt, A, B, C, bias=dt_bias, softplus=True, directions=(0, 1, 2, 3),
            height=SIDE, width=SIDE,
        )  # fmt: skip
        return y.sum(2) + x * D.sum(0)

    return work


def sequences(states: int) -> Callable[[], object]:
    """The kernel of selective_scan on four sequences, with every step given."""
    shape = (1, LENGTH, 4, CHANNELS)
    u, dt = torch.randn(shape), torch.randn(shape) - 2
    A, bias = -torch.rand(4, CHANNELS, states) * 4, torch.randn(4, CHANNELS)
    B, C = torch.randn(2, 1, LENGTH, 4, states)
    return lambda: numba_cpu.scan(u, dt, A, B, C, bias=bias, softplus=True)


@torch.inference_mode()
def main() -> None:
    print(f"{SIDE}x{SIDE}, four directions, {CHANNELS} channels, float32; {machine()}\n")
    inputs = image_inputs()

    def scan(backend: str) -> Callable[[], object]:
        return lambda: cross_scan(*inputs, height=SIDE, width=SIDE, backend=backend)

    updates = LENGTH * 4 * CHANNELS
    works = {"image, 16 states": scan("numba")}
    if (first := first_kernel()) is not None:
        works["image, 16 states, first kernel"] = with_first_kernel(first)
    works |= {"sequences, 16 states": sequences(16), "sequences, 1 state": sequences(1)}
    # u, dt, y of each channel; B and C
    bytes_ = {16: 4 * (3 * updates + LENGTH * 8 * 16), 1: 4 * (3 * updates + LENGTH * 8)}
    source = torch.randn(bytes_[1] // 8)
    target = torch.empty_like(source)
    works["copy of the bytes of 1 state"] = lambda: target.copy_(source)
    seconds = best(works, 30) | best({"image, 16 states, reference": scan("reference")}, 2)
    print("| what | ms | G updates/s |\n| --- | ---: | ---: |")
    for name, time_ in seconds.items():
        states = 1 if "1 state" in name else 16
        rate = "" if "copy" in name else f"{updates * states / time_ / 1e9:.2f}"
        print(f"| {name} | {time_ * 1e3:.2f} | {rate} |")
    ours = seconds["image, 16 states"]
    print(f"\nreference / numba: {seconds['image, 16 states, reference'] / ours:.0f}")
    if first is not None:
        print(f"first kernel / numba: {seconds['image, 16 states, first kernel'] / ours:.2f}")
    rates = {states: bytes_[states] / seconds[f"sequences, {states} state{'s' * (states > 1)}"]
             for states in (1, 16)}  # fmt: skip
    print(f"bytes per second, 1 state / 16 states: {rates[1] / rates[16]:.2f}")


if __name__ == "__main__":
    main()

"""The Numba scan against the plain PyTorch loop, and against the machine's memory.

    python benchmarks/scan_speed.py

Four directions over an image of 64x64 (4,096 steps), 96 channels: 16 states against the loop, and
1 state, where little is computed, against a copy of the same bytes.
"""

import time
from collections.abc import Callable

import torch
from machine import machine

from mtair.scan import Backend, cross_scan

SIDE, CHANNELS = 64, 96


def inputs(states: int) -> tuple[torch.Tensor, ...]:
    """x, dt, A, B, C, bias."""
    torch.manual_seed(0)
    n = SIDE * SIDE
    return (
        torch.randn(1, n, CHANNELS), torch.randn(1, n, 4, CHANNELS) - 2,
        -torch.rand(4, CHANNELS, states) * 4, torch.randn(1, n, 4, states),
        torch.randn(1, n, 4, states), torch.randn(4, CHANNELS),
    )  # fmt: skip


def seconds(work: Callable[[], object], runs: int) -> float:
    """The best of `runs` after one to warm up."""
    work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def scan_seconds(states: int, backend: Backend, runs: int) -> float:
    data = inputs(states)
    with torch.inference_mode():
        return seconds(lambda: cross_scan(*data, height=SIDE, width=SIDE, backend=backend), runs)


def main() -> None:
    print(f"{SIDE}x{SIDE}, four directions, {CHANNELS} channels, float32; {machine()}\n")
    updates = SIDE * SIDE * 4 * CHANNELS
    reference, compiled = scan_seconds(16, "reference", 3), scan_seconds(16, "numba", 20)
    one = scan_seconds(1, "numba", 20)
    print("| what | ms | G updates/s | GB/s |\n| --- | ---: | ---: | ---: |")
    # read x and dt, B and C; write y: floats of 4 bytes
    for name, states, time_ in (
        ("reference, 16 states", 16, reference),
        ("numba, 16 states", 16, compiled),
        ("numba, 1 state", 1, one),
    ):
        moved = 4 * (2 * updates + SIDE * SIDE * (CHANNELS + 8 * states))
        print(
            f"| {name} | {time_ * 1e3:.2f} | {updates * states / time_ / 1e9:.3f} "
            f"| {moved / time_ / 1e9:.2f} |"
        )
    moved = 2 * updates + SIDE * SIDE * (CHANNELS + 8)
    source = torch.randn(moved // 2)
    target = torch.empty_like(source)
    copy = seconds(lambda: target.copy_(source), 50)
    print(f"| copy of the bytes of 1 state | {copy * 1e3:.2f} | | {4 * moved / copy / 1e9:.2f} |")
    print(f"\nnumba / reference at 16 states: {reference / compiled:.0f} times faster")
    print(f"bytes per second, 1 state / 16 states: {compiled / one:.2f} (same maps of dt and y)")
    print(f"time, 1 state / copy of the same bytes: {one / copy:.2f}")


if __name__ == "__main__":
    main()

"""The curve of a training run, from its log.jsonl, as an SVG.

    python benchmarks/curve.py runs/tiny docs/weights/tiny_curve.svg

Grey: the loss, averaged over 500 steps. Blue: PSNR of the held-out images at sigma 25, in dB.
"""

import json
import sys
from pathlib import Path

import numpy as np

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 260, 60, 40


def polyline(xs: np.ndarray, ys: np.ndarray, low: float, high: float, colour: str) -> str:
    """`ys` between `low` and `high` over `xs` in 0..1."""
    across = LEFT + xs * (WIDTH - 2 * LEFT)
    up = HEIGHT - BOTTOM - (ys - low) / (high - low) * (HEIGHT - 2 * BOTTOM)
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, up, strict=True))
    return f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{points}"/>'


def text(x: float, y: float, words: str, colour: str = "#444", anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" fill="{colour}" text-anchor="{anchor}">{words}</text>'


def draw(log: list[dict[str, float]]) -> str:
    """Loss and PSNR over the steps, each with its own range at its own side."""
    steps = np.array([line["step"] for line in log], float)
    loss = np.array([line["loss"] for line in log])
    span = max(1, round(500 / (steps[1] - steps[0])))
    smooth = np.convolve(loss, np.ones(span) / span, "valid")
    checks = [line for line in log if "held_out_psnr_25" in line]
    psnr = np.array([line["held_out_psnr_25"] for line in checks])
    at = np.array([line["step"] for line in checks], float)
    ends = f"{smooth.min():.4f}", f"{smooth.max():.4f}", f"{psnr.min():.2f}", f"{psnr.max():.2f}"
    top, bottom, right = BOTTOM + 4, HEIGHT - BOTTOM + 4, WIDTH - LEFT + 6
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        polyline(steps[span - 1:] / steps[-1], smooth, smooth.min(), smooth.max(), "#999"),
        polyline(at / steps[-1], psnr, psnr.min(), psnr.max(), "#1565c0"),
        text(LEFT - 6, bottom, ends[0], "#777", "end"), text(LEFT - 6, top, ends[1], "#777", "end"),
        text(right, bottom, ends[2], "#1565c0", "start"),
        text(right, top, ends[3], "#1565c0", "start"),
        text(LEFT, HEIGHT - 12, "0"), text(WIDTH - LEFT, HEIGHT - 12, f"{steps[-1]:.0f} steps"),
        text(LEFT, 18, "loss (L1)", "#777"),
        text(WIDTH - LEFT, 18, "held-out PSNR, sigma 25, dB", "#1565c0", "end"),
        "</svg>\n",
    ])  # fmt: skip


def main() -> None:
    run, out = Path(sys.argv[1]), Path(sys.argv[2])
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(draw(log))
    print(out)


if __name__ == "__main__":
    main()

"""What --temporal gains and costs: PSNR and flicker of restored noisy and clean clips, offline.

    python benchmarks/temporal.py DATA/val/video [--sigma 25] [--crf 23] [--frames 24] [--size WxH]

Flicker is the mean absolute change, from frame to frame, of restored minus clean, in 8-bit code
values. The clips are restored once and kept in the system's folder for temporary files. Two other
ways are shown beside the one that is used: averaging residuals instead of restored frames, and a
check of the flow by the flow in the other direction.
"""

import argparse
import time
from pathlib import Path

import clips
import cv2
import numpy as np
from machine import machine

from pipeline.decode import VideoSource
from pipeline.frames import Frame, Planes
from pipeline.temporal import TemporalFilter, _maps, _moved

STRENGTHS = (0.25, 0.5, 0.75, 1.0)


class OfResiduals(TemporalFilter):
    """The same weights on restored minus source, added to the source."""

    def __call__(self, source: Frame, restored: Frame) -> Frame:
        self._source = [plane.astype(np.float32) for plane in source.planes]
        return super().__call__(source, restored)

    def _afresh(self, restored: Frame) -> Frame:
        self._residual = self._difference(restored.planes)
        return super()._afresh(restored)

    def _blended(self, planes: Planes, flow: np.ndarray, weight: np.ndarray) -> Planes:
        self._past = self._residual
        self._residual = super()._blended(self._difference(planes), flow, weight)
        return tuple(s + r for s, r in zip(self._source, self._residual, strict=True))

    def _difference(self, planes: Planes) -> Planes:
        return tuple(plane - source for plane, source in zip(planes, self._source, strict=True))


class BothWays(TemporalFilter):
    """Nothing is averaged where the flow there and back does not return to within a pixel."""

    def __call__(self, source: Frame, restored: Frame) -> Frame:
        self._before = self._luma
        return super().__call__(source, restored)

    def _blended(self, planes: Planes, flow: np.ndarray, weight: np.ndarray) -> Planes:
        ahead = self._flow.calc(self._before, self._luma, None)
        back = flow + _moved(ahead, *_maps(flow, weight.shape), cv2.INTER_LINEAR)
        return super()._blended(planes, flow, weight * (np.square(back).sum(-1) < 1))


def filtered(clip: clips.Clip, temporal: TemporalFilter) -> list[Planes]:
    pairs = zip(clip.noisy, clip.restored, strict=True)
    return [temporal(Frame(i, i, a), Frame(i, i, b)).planes for i, (a, b) in enumerate(pairs)]


def row(name: str, results: list[tuple[float, float]]) -> None:
    cells = " | ".join(f"{quality:.2f} | {flicker:.2f}" for quality, flicker in results)
    print(f"| {name} | {cells} |", flush=True)


def table(loaded: list[clips.Clip], kinds: dict[str, tuple[type[TemporalFilter], float]]) -> None:
    for name, (kind, strength) in kinds.items():
        results = []
        for clip in loaded:
            after = filtered(clip, kind(strength, 8))
            results.append((clips.psnr(after, clip.clean), clips.flicker(after, clip.clean)))
        row(name, results)


def head(title: str, names: list[str]) -> None:
    print(f"\n| {title} | " + " | ".join(f"{name} PSNR | flicker" for name in names) + " |")
    print("| --- |" + " ---: |" * (2 * len(names)))


def milliseconds(path: Path) -> float:
    """Median over frames of 1280x720; noise and a blur stand for source and restored."""
    temporal, times = TemporalFilter(0.5, 8), []
    with VideoSource(path) as source:
        for frame, _ in zip(source.frames(), range(12), strict=False):
            planes = tuple(
                cv2.resize(p, (1280 >> bool(i), 720 >> bool(i))) for i, p in enumerate(frame.planes)
            )
            noisy = Frame(frame.index, frame.pts, clips.add_noise(planes, 25, frame.index))
            restored = Frame(frame.index, frame.pts, planes)
            began = time.perf_counter()
            temporal(noisy, restored)
            times.append(time.perf_counter() - began)
    return float(np.median(times[1:])) * 1000


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--size", default="320x192")
    parser.add_argument("--sigma", type=float, default=25)
    parser.add_argument("--crf", type=int, help="also with noise that has been through x264")
    args = parser.parse_args()
    size = tuple(map(int, args.size.split("x")))
    paths = sorted(p for p in args.folder.iterdir() if p.is_file())
    names = [path.stem for path in paths]
    print(
        f"{args.frames} frames (12 of the clean clips), the middle {args.size} pixels, tiny; "
        f"{machine()}"
    )
    steps = {f"temporal {s:g}": (TemporalFilter, s) for s in (0.0, *STRENGTHS)}
    ways = {"residuals, 0.5": (OfResiduals, 0.5), "flow both ways, 0.5": (BothWays, 0.5)}
    noisy = [clips.load(path, args.frames, size, args.sigma) for path in paths]
    head(f"noise {args.sigma:g}", names)
    row("source", [(clips.psnr(c.noisy, c.clean), clips.flicker(c.noisy, c.clean)) for c in noisy])
    table(noisy, steps | ways)
    if args.crf is not None:
        coded = [clips.load(p, args.frames, size, args.sigma, crf=args.crf) for p in paths]
        head(f"noise {args.sigma:g}, x264 crf {args.crf}", names)
        row("source", [(clips.psnr(c.noisy, c.clean), clips.flicker(c.noisy, c.clean))
                       for c in coded])  # fmt: skip
        table(coded, steps)
    head("no noise", names)
    table([clips.load(path, 12, size, 0) for path in paths], steps)
    print(f"\nA 1280x720 4:2:0 frame: {milliseconds(paths[0]):.0f} ms")


if __name__ == "__main__":
    main()

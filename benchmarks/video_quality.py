"""Restored video against the clean clip: PSNR, SSIM and flicker, for noise, H.264 and both.

    python benchmarks/video_quality.py DATA/val/video [--model tiny] [--frames 24] [--size 320x192]

Through the pipeline's own decoder, encoder, tiles and colour, as a file is restored: `mtair` knows
no video. Noise has fixed seeds, and x264 is set so that it gives the same bytes every time.
PSNR is over all samples of the 4:2:0 planes, SSIM over the luma, flicker the mean absolute change,
from frame to frame, of restored minus clean, in 8-bit code values.
"""

import argparse
import tempfile
from itertools import islice
from pathlib import Path

import clips
import numpy as np
from machine import machine
from skimage.metrics import structural_similarity

from pipeline.decode import VideoSource
from pipeline.encode import VideoWriter
from pipeline.encoder import EncodeSettings
from pipeline.frames import Frame, Planes, StreamInfo
from workers import describe_weights

DEGRADATIONS: dict[str, tuple[float, float | None]] = {
    "noise 25": (25, None),
    "x264 CRF 35": (0, 35),
    "noise 15, then x264 CRF 28": (15, 28),
}
"""Sigma of noise in RGB, then the CRF of x264 medium, or none."""


def degraded(
    clean: list[Planes], info: StreamInfo, sigma: float, crf: float | None
) -> list[Planes]:
    """Every frame of `clean`, made worse."""
    noisy = clean
    if sigma:
        noisy = [clips.add_noise(planes, sigma, number) for number, planes in enumerate(clean)]
    return noisy if crf is None else through_x264(noisy, info, crf)


def through_x264(clip: list[Planes], info: StreamInfo, crf: float) -> list[Planes]:
    """The frames of `clip` as a player sees them after x264."""
    info = clips.cropped(info, clip[0])
    rate = info.frame_rate or 25
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mkv"
        # x264's macroblock tree, in PyAV 18.1's wheel, reads memory that nothing was written to:
        # with it the same frames give other bytes every time, MALLOC_PERTURB_ says which.
        settings = EncodeSettings(
            "libx264", crf=crf, preset="medium", options={"mbtree": "0"}, threads=1
        )
        with VideoWriter(path, info, settings, copy_from=None) as writer:
            for number, planes in enumerate(clip):
                writer.write(Frame(number, round(number / rate / info.time_base), planes))
        with VideoSource(path) as source:
            return [frame.planes for frame in source.frames()]


def ssim(clip: list[Planes], clean: list[Planes]) -> float:
    """Of the luma, 7x7 uniform window, mean over the frames."""
    pairs = zip(clip, clean, strict=True)
    return float(np.mean([structural_similarity(a[0], b[0], data_range=255) for a, b in pairs]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--size", default="320x192", help="the middle of each frame")
    args = parser.parse_args()
    size = tuple(map(int, args.size.split("x")))
    weights = describe_weights(args.model).sha256
    print(f"{args.model}, weights sha256 `{weights}`, {args.frames} frames of {args.size}")
    print(f"{machine()}\n")
    print("| clip | degraded by | PSNR in | out | SSIM in | out | flicker in | out |")
    print("| --- | --- |" + " ---: |" * 6)
    for path in sorted(p for p in args.folder.iterdir() if p.is_file()):
        with VideoSource(path) as source:
            info = source.info
            clean = [clips.crop(f.planes, size) for f in islice(source.frames(), args.frames)]
        for name, (sigma, crf) in DEGRADATIONS.items():
            before = degraded(clean, info, sigma, crf)
            after = list(clips.restored(before, info, args.model))
            cells = (
                f"{measure(before, clean):.{digits}f} | {measure(after, clean):.{digits}f}"
                for measure, digits in ((clips.psnr, 2), (ssim, 4), (clips.flicker, 2))
            )
            print(f"| {path.stem} | {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

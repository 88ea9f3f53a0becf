"""What each level of --quality gives: kilobits a second and PSNR of luma against what was encoded.

    python benchmarks/encoders.py CLIP [--frames 48]

No network: the decoded frames of CLIP are encoded as a job would, decoded again and compared. Not
a comparison of encoders: each runs at the speed that a job without --preset gives it.
"""

import argparse
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
from machine import machine

from pipeline.decode import VideoSource
from pipeline.encode import VideoWriter
from pipeline.encoder import EncodeSettings
from pipeline.errors import RestoreError
from pipeline.frames import Frame, StreamInfo
from pipeline.quality import LEVELS, Quality

CODECS = {
    "libx264": ".mkv", "libx265": ".mkv", "libsvtav1": ".mkv", "libvpx-vp9": ".webm",
    "libvpx": ".webm", "prores_ks": ".mov", "mpeg4": ".mkv", "mjpeg": ".mov",
}  # fmt: skip
OPTIONS = {"libvpx-vp9": {"row-mt": "1", "cpu-used": "2"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clip", type=Path)
    parser.add_argument("--frames", type=int, default=48)
    asked = parser.parse_args()
    with VideoSource(asked.clip) as source:
        frames = list(islice(source.frames(), asked.frames))
        info = source.info
    print(f"{machine()}\n{asked.clip.name}, {len(frames)} frames of {info.width}x{info.height}\n")
    print("| encoder | " + " | ".join(f"{level} kb/s | PSNR" for level in LEVELS) + " |")
    print("| --- |" + " ---: | ---: |" * len(LEVELS))
    for codec in CODECS:
        cells = " | ".join(measure(codec, level, frames, info) for level in LEVELS)
        print(f"| {codec} | {cells} |", flush=True)


def measure(codec: str, level: Quality, frames: list[Frame], info: StreamInfo) -> str:
    settings = EncodeSettings(codec, quality=level, options=OPTIONS.get(codec, {}))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"out{CODECS[codec]}"
        try:
            with VideoWriter(path, info, settings, copy_from=None) as writer:
                for frame in frames:
                    writer.write(frame)
        except RestoreError as error:
            return f"{error} | -"
        with VideoSource(path) as again:
            pairs = zip(frames, again.frames(), strict=True)
            peak = (1 << info.pixel_format.bit_depth) - 1
            out_peak = (1 << again.info.pixel_format.bit_depth) - 1
            errors = [mean_square(a, peak, b, out_peak) for a, b in pairs]
        seconds = float((frames[-1].pts + frames[-1].duration - frames[0].pts) * info.time_base)
        rate = path.stat().st_size * 8 / seconds / 1000
    return f"{rate:.0f} | {-10 * np.log10(np.mean(errors)):.2f}"


def mean_square(one: Frame, peak: int, two: Frame, out_peak: int) -> float:
    a, b = one.planes[0] / peak, two.planes[0] / out_peak
    return float(np.mean((a - b) ** 2))


if __name__ == "__main__":
    main()

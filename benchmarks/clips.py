"""Short noisy clips with their clean originals, restored once and kept, for static and temporal.

Planes are read as BT.601 whatever the clip says: the noise is made in the same matrix, and only
differences between planes are measured.
"""

import hashlib
import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from pipeline.config import RestoreConfig
from pipeline.decode import VideoSource
from pipeline.derived import plan_grid
from pipeline.frames import Frame, Planes, StreamInfo
from pipeline.pools import open_pool
from pipeline.restore import restore_frames
from workers import describe_weights

SEED = 0
RGB_TO_YUV = np.float32(
    [[65.738, 129.057, 25.064], [-37.945, -74.494, 112.439], [112.439, -94.154, -18.285]]
) / np.float32(256)
"""Of differences: ITU-R BT.601, 219 and 224 steps."""


class Clip(NamedTuple):
    """The same frames three times; each a list of the three planes of 4:2:0."""

    clean: list[Planes]
    noisy: list[Planes]
    restored: list[Planes]


def load(
    path: Path, n_frames: int, size: tuple[int, int], sigma: float, model: str = "tiny",
    crf: int | None = None,
) -> Clip:  # fmt: skip
    """The clip's first frames, their middle of `size` (width, height) pixels; restored once.

    With `crf` the noisy frames have been through x264.
    """
    with VideoSource(path) as source:
        info = source.info
        clean = [crop(frame.planes, size) for frame in islice(source.frames(), n_frames)]
    noisy = [add_noise(planes, sigma, number) for number, planes in enumerate(clean)]
    if crf is not None:
        from video_quality import through_x264  # which imports this file

        noisy = through_x264(noisy, info, crf)
    sha256 = describe_weights(model).sha256
    key = hashlib.sha256(repr((path.name, n_frames, size, sigma, SEED, sha256, crf)).encode())
    cache = Path(tempfile.gettempdir()) / "restored" / f"{path.stem}-{key.hexdigest()[:12]}.npz"
    if not cache.exists():
        cache.parent.mkdir(exist_ok=True)
        done = list(restored(noisy, info, model))
        np.savez(cache, *(np.stack(plane) for plane in zip(*done, strict=True)))
    with np.load(cache) as kept:
        return Clip(clean, noisy, list(zip(*(kept[name] for name in kept.files), strict=True)))


def restored(clip: list[Planes], info: StreamInfo, model: str) -> Iterator[Planes]:
    """Every frame through a pool and the window, each as one tile."""
    info = cropped(info, clip[0])
    config = RestoreConfig.load(overrides={"model.model": model, "tile.size": 0})
    grid = plan_grid(info, config, "cpu", 1)
    frames = (Frame(number, number, planes) for number, planes in enumerate(clip))
    with open_pool(info.pixel_format, config, "cpu") as pool:
        for frame in restore_frames(frames, grid, pool.submit, 2):
            yield frame.planes


def cropped(info: StreamInfo, planes: Planes) -> StreamInfo:
    """The stream of such planes, in BT.601."""
    height, width = planes[0].shape
    pixel_format = replace(info.pixel_format, matrix="bt601", full_range=False)
    return replace(info, width=width, height=height, pixel_format=pixel_format)


def crop(planes: Planes, size: tuple[int, int]) -> Planes:
    """The middle of a 4:2:0 frame; all of it where it is smaller."""
    height, width = planes[0].shape
    w, h = min(size[0], width // 16 * 16), min(size[1], height // 16 * 16)
    x, y = (width - w) // 4 * 2, (height - h) // 4 * 2
    luma = planes[0][y : y + h, x : x + w]
    chroma = [p[y // 2 : (y + h) // 2, x // 2 : (x + w) // 2] for p in planes[1:]]
    return tuple(np.ascontiguousarray(plane) for plane in (luma, *chroma))


def add_noise(planes: Planes, sigma: float, number: int) -> Planes:
    """Gaussian noise in RGB, as a sensor adds it, brought to 8-bit 4:2:0; chroma is averaged."""
    rng = np.random.default_rng([SEED, number])
    noise = rng.normal(0, sigma, (*planes[0].shape, 3)).astype(np.float32) @ RGB_TO_YUV.T
    parts = [noise[..., 0], *(half(noise[..., number]) for number in (1, 2))]
    return tuple(
        np.clip(np.rint(plane + part), 0, 255).astype(np.uint8)
        for plane, part in zip(planes, parts, strict=True)
    )


def half(plane: np.ndarray) -> np.ndarray:
    """Means of 2x2 samples."""
    height, width = plane.shape
    return cv2.resize(plane, (width // 2, height // 2), interpolation=cv2.INTER_AREA)


def errors(clip: list[Planes], clean: list[Planes]) -> np.ndarray:
    """`clip` minus `clean`: every sample of every frame, float32 [frame, sample]."""
    return np.stack([
        np.concatenate([(p.astype(np.float32) - q).ravel() for p, q in zip(a, b, strict=True)])
        for a, b in zip(clip, clean, strict=True)
    ])  # fmt: skip


def psnr(clip: list[Planes], clean: list[Planes]) -> float:
    """In dB, over all samples of all planes and frames."""
    error = float(np.mean(np.square(errors(clip, clean))))
    return 10 * math.log10(255**2 / error) if error else math.inf


def flicker(clip: list[Planes], clean: list[Planes]) -> float:
    """Mean absolute difference of the error from frame to frame, in 8-bit code values."""
    return float(np.abs(np.diff(errors(clip, clean), axis=0)).mean())

"""Training data: images in memory, pairs of each degradation, and the batch of a step.

A batch is a pure function of (seed, step): a resumed run, and every process of a run in several,
sees what an unbroken single one would have seen. Knows nothing of the network.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtair import degrade
from mtair.images import Pixels, read_image
from mtair.schedule import TrainConfig


class TrainingData:
    """All training images in memory: clean ones, rain pairs and haze pairs of `root`.

    `root` is laid out as docs/training.md has it. The first twelve clean images whose name starts
    with `val_` (BSDS500's own validation split, none of them in CBSD68) are held out for progress.
    """

    def __init__(self, root: Path) -> None:
        bsd = sorted((root / "clean_bsd").glob("*.jpg"))
        held_out = [path for path in bsd if path.name.startswith("val_")][:12]
        self.held_out = [read_image(path) for path in held_out]
        self.clean = [read_image(path) for path in bsd if path not in held_out]
        for path in sorted((root / "clean_imagenet_sample").glob("*.[jJ]*")):
            # JPEG-sourced: two thirds of the size hides most of the blocks.
            image = read_image(path)
            h, w = image.shape[:2]
            size = (w * 2 // 3, h * 2 // 3)
            small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
            self.clean.append(small.astype(np.uint8))
        self.haze = [
            (read_image(path), read_image(_ground_truth(path)))
            for folder in ("SOTS_outdoor", "SOTS_indoor")
            for path in sorted((root / folder / "hazy").iterdir())
        ]
        outdoor = sorted((root / "SOTS_outdoor/hazy").iterdir())
        self.scenes = [(read_image(_ground_truth(p)), _depth(p)) for p in outdoor]
        self.rain = [
            (image[:, : image.shape[1] // 2], image[:, image.shape[1] // 2 :])
            for path in sorted((root / "rain1200_sample_sidebyside").glob("*.jpg"))
            for image in [read_image(path)]
        ]
        self.h264 = [
            (read_image(path), read_image(root / "h264/clean" / path.name))
            for path in sorted((root / "h264/degraded").glob("*.png"))
        ]
        for name in ("held_out", "clean", "haze", "rain"):
            if not getattr(self, name):
                raise FileNotFoundError(f"{root}: no training images there of the kind {name}")

    def check(self, config: TrainConfig) -> None:
        """Raises ValueError where a step of `config` would ask for what is not here."""
        if "h264" in config.mixture and not self.h264:
            raise ValueError("h264 pairs are in the mixture and not in the data: see h264_pairs.py")
        pairs = [pair[0] for pair in self.haze + self.rain + self.h264]
        smallest = min(min(image.shape[:2]) for image in self.clean + pairs)
        if config.largest_patch() > smallest:
            raise ValueError(
                f"patches of {config.largest_patch()} pixels (twice a stage's where there is a "
                f"wide_share) do not fit the smallest image, of {smallest}"
            )


def _ground_truth(hazy: Path) -> Path:
    gt = hazy.parent.parent / "gt"
    same = gt / hazy.name
    return same if same.exists() else gt / f"{hazy.stem.split('_')[0]}{hazy.suffix}"


def _depth(hazy: Path) -> NDArray[np.float32]:
    """The depth of a pair named SCENE_AIRLIGHT_BETA."""
    _, airlight, beta = hazy.stem.split("_")
    images = [read_image(path).astype(np.float32) for path in (hazy, _ground_truth(hazy))]
    degraded, clean = (image / np.float32(255) for image in images)
    return degrade.depth_of_pair(degraded, clean, float(airlight), float(beta))


def _crop(
    images: tuple[Pixels | degrade.Image, ...], patch: int, rng: np.random.Generator,
    upright: bool = False,
) -> list[degrade.Image]:  # fmt: skip
    """The same random window and the same one of eight flips and rotations of each image.

    `upright`: of the two that leave above what is above, as rain and the sky are in every video.
    """
    h, w = images[0].shape[:2]
    y, x = rng.integers(0, h - patch + 1), rng.integers(0, w - patch + 1)
    turn, flip = 0 if upright else int(rng.integers(4)), bool(rng.integers(2))
    out = []
    for image in images:
        window = np.rot90(image[y : y + patch, x : x + patch], turn)
        window = window[:, ::-1] if flip else window
        scale = np.float32(255 if image.dtype == np.uint8 else 1)
        out.append(np.ascontiguousarray(window).astype(np.float32) / scale)
    return out


def _pick(images: list[Any], rng: np.random.Generator) -> Any:
    return images[int(rng.integers(len(images)))]


def white_board(picture: degrade.Image, rng: np.random.Generator) -> degrade.Image:
    """A board, sheet or slide as large as `picture`, parts of which may be shown on it.

    Near white and unevenly lit, with writing, lines and boxes in dark or strong colours: no photo
    of the training sets is like it, and a network that never saw one takes it for haze.
    """
    h, w = picture.shape[:2]
    board = np.full((h, w, 3), 255, np.uint8)  # OpenCV writes letters on 8 bit alone
    for _ in range(int(rng.integers(0, 12))):
        x, right, y, bottom = (int(n) for n in rng.integers(0, [w, w, h, h]))
        colour, thick = rng.uniform(0, rng.uniform(30, 230), 3).tolist(), int(rng.integers(1, 4))
        match rng.integers(4):
            case 0:
                cv2.line(board, (x, y), (right, bottom), colour, thick, cv2.LINE_AA)
            case 1:
                cv2.rectangle(board, (x, y), (right, bottom), colour, thick)
            case 2 if right > x and bottom > y:
                board[y:bottom, x:right] = picture[y:bottom, x:right] * 255
            case _:
                letters = "".join(map(chr, rng.integers(33, 127, 12)))
                font, size = int(rng.integers(0, 8)), rng.uniform(0.3, 2)
                cv2.putText(board, letters, (x - w // 2, y), font, size, colour, thick, cv2.LINE_AA)
    light = rng.uniform(0.75, 1.0) - 0.15 * rng.random() * degrade.smooth_depth(h, w, rng)
    lit = board * (light[..., None] * rng.uniform(0.94, 1.0, 3) / 255)
    blurred = cv2.GaussianBlur(lit.astype(np.float32), (0, 0), rng.uniform(0.3, 1.2))
    return blurred.astype(np.float32)


def make_pair(
    data: TrainingData, kind: str, patch: int, rng: np.random.Generator
) -> tuple[degrade.Image, degrade.Image]:
    """(degraded, clean) `[patch, patch, 3]` of one kind of the mixture."""
    if kind == "haze":
        return _haze_pair(data, patch, rng)
    if kind == "rain" and rng.random() < 0.15:
        degraded, clean = _crop(_pick(data.rain, rng), patch, rng, upright=True)
        return degraded, clean
    if kind == "h264":
        degraded, clean = _crop(_pick(data.h264, rng), patch, rng)
        return degraded, clean
    if rng.random() < 0.06:  # what is white all over is not behind haze
        clean = white_board(_crop((_pick(data.clean, rng),), patch, rng)[0], rng)
    else:
        (clean,) = _crop((_pick(data.clean, rng),), patch, rng)
    if kind == "noise":
        sigma = rng.choice([15, 25, 50], p=[0.5, 0.25, 0.25])  # the lightest leaves most to learn
        return degrade.gaussian_noise(clean, float(sigma), rng), clean
    if kind == "blind_noise":
        return degrade.gaussian_noise(clean, rng.uniform(0, 55), rng), clean
    if kind == "video_noise" and rng.random() < 0.4:
        sigma = rng.uniform(5, 40)
        return degrade.plane_noise(clean, sigma, sigma * rng.uniform(0.2, 1), rng), clean
    if kind == "video_noise":
        sigma, quality = rng.uniform(5, 50), int(rng.integers(50, 100))
        return degrade.video_noise(clean, sigma, quality, rng), clean
    if kind == "rain":
        return degrade.rain(clean, rng), clean
    if kind == "sensor_noise":
        electrons = 10 ** rng.uniform(1.3, 3)  # sigmas of some 26 to 4 in a bright place
        return degrade.sensor_noise(clean, electrons, rng.uniform(0, 3), rng), clean
    if kind == "compression":
        return degrade.jpeg(clean, int(rng.integers(20, 95))), clean
    if rng.random() < 0.5:  # a landscape as it is: not everything far away is behind haze
        clean, _ = _crop(_pick(data.scenes, rng), patch, rng, upright=True)
    if rng.random() < 0.5:  # nor is all that is dark or pale
        clean = clean ** np.float32(rng.uniform(0.6, 1.7))
    return clean, clean


def _haze_pair(
    data: TrainingData, patch: int, rng: np.random.Generator
) -> tuple[degrade.Image, degrade.Image]:
    """A pair as it is, a scene hazed anew through its depth, or another picture through one."""
    way = rng.random()
    if way < 0.3:
        degraded, clean = _crop(_pick(data.haze, rng), patch, rng, upright=True)
        return degraded, clean
    if way < 0.8:
        clean, depth = _crop(_pick(data.scenes, rng), patch, rng, upright=True)
        beta = rng.uniform(0.06, 0.22)  # of the pairs: 0.08 to 0.2
    else:
        (clean,) = _crop((_pick(data.clean, rng),), patch, rng)
        depth, beta = degrade.smooth_depth(patch, patch, rng), rng.uniform(0.4, 1.8)
    return degrade.haze(clean, depth, beta, rng.uniform(0.75, 1.0)), clean


def make_batch(data: TrainingData, config: TrainConfig, step: int) -> tuple[Tensor, Tensor]:
    """(degraded, clean) float `[batch, 3, patch, patch]`; the same for the same seed and step."""
    rng = np.random.default_rng([config.seed, step])
    patch, batch = config.stage(step)
    if rng.random() < config.wide_share:
        patch, batch = 2 * patch, max(1, batch // 4)
    odds = np.array(list(config.mixture.values()))
    kinds = rng.choice(list(config.mixture), size=batch, p=odds / odds.sum())
    pairs = [make_pair(data, str(kind), patch, rng) for kind in kinds]
    degraded, clean = (np.stack(side) for side in zip(*pairs, strict=True))
    return tuple(torch.from_numpy(t).permute(0, 3, 1, 2) for t in (degraded, clean))  # type: ignore[return-value]


def batches(data: TrainingData, config: TrainConfig, first: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of `first` and after, `config.loaders` of them in the making at a time."""
    with ThreadPoolExecutor(config.loaders) as pool:
        steps = iter(range(first, config.steps))
        ahead: deque[Future[tuple[Tensor, Tensor]]] = deque(
            pool.submit(make_batch, data, config, step) for step in islice(steps, config.loaders)
        )
        while ahead:
            batch = ahead.popleft().result()
            ahead.extend(pool.submit(make_batch, data, config, step) for step in islice(steps, 1))
            yield batch

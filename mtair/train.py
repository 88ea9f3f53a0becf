"""Training: clean images in, weights out, resumable at any checkpoint.

Owns the schedule, the mixture of degradations and the loop; the batch of a step is a pure function
of (seed, step), so that a resumed run sees what an unbroken one would have seen.
"""

import json
import logging
import math
import platform
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from mtair import checkpoint, degrade
from mtair.model import MTAIR, Dimensions

logger = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One YAML of configs/train. Unknown keys are errors."""

    model: str
    """Path of a configs/models YAML."""
    seed: int
    steps: int
    stages: list[tuple[float, int, int]]
    """(share of the steps, patch side in pixels, batch size), in order; the shares sum to 1."""
    learning_rate: float
    warmup_steps: int
    final_learning_rate: float
    weight_decay: float
    clip_norm: float
    ema_decay: float
    mixture: dict[str, float]
    """Share of the pixels of each degradation; sums to 1."""
    wide_kinds: list[str]
    """Degradations trained in steps of their own, on a quarter as many patches of twice the side:
    haze and rain are told by what lies further around a pixel than noise is."""

    @classmethod
    def load(cls, path: Path) -> "TrainConfig":
        """Raises ValueError naming the key that is unknown, missing or out of range."""
        values = yaml.safe_load(path.read_text())
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected keys and values")
        known = {f.name for f in fields(cls)}
        if wrong := set(values) ^ known:
            raise ValueError(f"{path}: unknown or missing keys {sorted(wrong)}")
        for f in fields(cls):
            if f.type is float:  # YAML takes 1e-3, without a point, for text
                values[f.name] = _number(values[f.name], f"{path}: {f.name}")
        values["stages"] = [tuple(stage) for stage in values["stages"]]
        config = cls(**values)
        if not math.isclose(sum(s[0] for s in config.stages), 1.0):
            raise ValueError(f"{path}: the shares of the stages do not sum to 1")
        if not math.isclose(sum(config.mixture.values()), 1.0):
            raise ValueError(f"{path}: the mixture does not sum to 1")
        if wrong := set(config.mixture) - set(MIXTURE) | set(config.wide_kinds) - set(
            config.mixture
        ):
            raise ValueError(f"{path}: unknown degradations {sorted(wrong)}; known {MIXTURE}")
        return config

    def stage(self, step: int) -> tuple[int, int]:
        """(patch side, batch size) at `step`."""
        done = 0.0
        for share, patch, batch in self.stages:
            done += share
            if step < done * self.steps:
                return patch, batch
        return self.stages[-1][1], self.stages[-1][2]

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, then half a cosine to final_learning_rate."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        t = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        low = self.final_learning_rate
        return low + (self.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * t))


def _number(value: Any, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected a number, got {value!r}") from error


MIXTURE = ("noise", "blind_noise", "video_noise", "rain", "haze", "clean")


def _read_image(path: Path) -> Pixels:
    bgr = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if bgr is None:
        raise FileNotFoundError(f"{path}: not a readable image")
    return np.ascontiguousarray(bgr[..., ::-1]).astype(np.uint8)


class TrainingData:
    """All training images in memory: clean ones, rain pairs and haze pairs of `root`.

    `root` is laid out as the data pack's `train` folder. The clean images whose name starts with
    `val_` (BSDS500's own validation split, none of them in CBSD68) are held out for progress.
    """

    def __init__(self, root: Path) -> None:
        bsd = sorted((root / "clean_bsd").glob("*.jpg"))
        self.held_out = [_read_image(p) for p in bsd if p.name.startswith("val_")][:12]
        self.clean = [_read_image(p) for p in bsd if not p.name.startswith("val_")]
        for path in sorted((root / "clean_imagenet_sample").glob("*.[jJ]*")):
            # JPEG-sourced: two thirds of the size hides most of the blocks.
            image = _read_image(path)
            h, w = image.shape[:2]
            size = (w * 2 // 3, h * 2 // 3)
            small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
            self.clean.append(small.astype(np.uint8))
        self.haze = [
            (_read_image(path), _read_image(_ground_truth(path)))
            for folder in ("SOTS_outdoor", "SOTS_indoor")
            for path in sorted((root / folder / "hazy").iterdir())
        ]
        outdoor = sorted((root / "SOTS_outdoor/hazy").iterdir())
        self.scenes = [(_read_image(_ground_truth(p)), _depth(p)) for p in outdoor]
        self.rain = [
            (image[:, : image.shape[1] // 2], image[:, image.shape[1] // 2 :])
            for path in sorted((root / "rain1200_sample_sidebyside").glob("*.jpg"))
            for image in [_read_image(path)]
        ]
        for name in ("held_out", "clean", "haze", "rain"):
            if not getattr(self, name):
                raise FileNotFoundError(f"{root}: no training images there of the kind {name}")


def _ground_truth(hazy: Path) -> Path:
    gt = hazy.parent.parent / "gt"
    same = gt / hazy.name
    return same if same.exists() else gt / f"{hazy.stem.split('_')[0]}{hazy.suffix}"


def _depth(hazy: Path) -> NDArray[np.float32]:
    """The depth of a pair named SCENE_AIRLIGHT_BETA."""
    _, airlight, beta = hazy.stem.split("_")
    images = [_read_image(path).astype(np.float32) for path in (hazy, _ground_truth(hazy))]
    degraded, clean = (image / np.float32(255) for image in images)
    return degrade.depth_of_pair(degraded, clean, float(airlight), float(beta))


def _crop(
    images: tuple[Pixels | degrade.Image, ...], patch: int, rng: np.random.Generator
) -> list[degrade.Image]:
    """The same random window and the same one of eight flips and rotations of each image."""
    h, w = images[0].shape[:2]
    y, x = rng.integers(0, h - patch + 1), rng.integers(0, w - patch + 1)
    turn, flip = int(rng.integers(4)), bool(rng.integers(2))
    out = []
    for image in images:
        window = np.rot90(image[y : y + patch, x : x + patch], turn)
        window = window[:, ::-1] if flip else window
        scale = np.float32(255 if image.dtype == np.uint8 else 1)
        out.append(np.ascontiguousarray(window).astype(np.float32) / scale)
    return out


def _pick(images: list[Any], rng: np.random.Generator) -> Any:
    return images[int(rng.integers(len(images)))]


def make_pair(
    data: TrainingData, kind: str, patch: int, rng: np.random.Generator
) -> tuple[degrade.Image, degrade.Image]:
    """(degraded, clean) `[patch, patch, 3]` of one kind of the mixture."""
    if kind == "haze":
        return _haze_pair(data, patch, rng)
    if kind == "rain" and rng.random() < 0.15:
        degraded, clean = _crop(_pick(data.rain, rng), patch, rng)
        return degraded, clean
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
    return clean, clean


def _haze_pair(
    data: TrainingData, patch: int, rng: np.random.Generator
) -> tuple[degrade.Image, degrade.Image]:
    """A pair as it is, a scene hazed anew through its depth, or another picture through one."""
    way = rng.random()
    if way < 0.3:
        degraded, clean = _crop(_pick(data.haze, rng), patch, rng)
        return degraded, clean
    if way < 0.8:
        clean, depth = _crop(_pick(data.scenes, rng), patch, rng)
        beta = rng.uniform(0.06, 0.22)  # of the pairs: 0.08 to 0.2
    else:
        (clean,) = _crop((_pick(data.clean, rng),), patch, rng)
        depth, beta = degrade.smooth_depth(patch, patch, rng), rng.uniform(0.4, 1.8)
    return degrade.haze(clean, depth, beta, rng.uniform(0.75, 1.0)), clean


def make_batch(data: TrainingData, config: TrainConfig, step: int) -> tuple[Tensor, Tensor]:
    """(degraded, clean) float `[batch, 3, patch, patch]`; the same for the same seed and step."""
    rng = np.random.default_rng([config.seed, step])
    patch, batch = config.stage(step)
    shares = {kind: config.mixture[kind] for kind in config.wide_kinds}
    if rng.random() < sum(shares.values()):
        patch, batch = 2 * patch, max(1, batch // 4)
    else:
        shares = {k: v for k, v in config.mixture.items() if k not in shares}
    odds = np.array(list(shares.values())) / sum(shares.values())
    kinds = rng.choice(list(shares), size=batch, p=odds)
    pairs = [make_pair(data, str(kind), patch, rng) for kind in kinds]
    degraded, clean = (np.stack(side) for side in zip(*pairs, strict=True))
    return tuple(torch.from_numpy(t).permute(0, 3, 1, 2) for t in (degraded, clean))  # type: ignore[return-value]


def _batches(
    data: TrainingData, config: TrainConfig, first: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of `first` and after, each made in a thread while the one before is trained on."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(make_batch, data, config, first)
        for step in range(first, config.steps):
            batch = ahead.result()
            ahead = pool.submit(make_batch, data, config, step + 1)
            yield batch


@torch.inference_mode()
def held_out_psnr(model: MTAIR, data: TrainingData, sigma: float = 25.0) -> float:
    """Mean PSNR in dB of the held-out images at one noise level: progress, not a result."""
    total = 0.0
    for number, image in enumerate(data.held_out):
        clean = image.astype(np.float32) / np.float32(255)
        noisy = degrade.gaussian_noise(clean, sigma, np.random.default_rng([7, number]))
        out = model(torch.from_numpy(noisy).permute(2, 0, 1)[None]).clamp(0, 1)
        error = (out[0].permute(1, 2, 0) - torch.from_numpy(clean)).square().mean().item()
        total += -10 * math.log10(error)
    return total / len(data.held_out)


class Trainer:
    """The state of a run: model, its moving average, optimiser and step."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        torch.manual_seed(config.seed)
        self.config, self.folder = config, folder
        dims = Dimensions.from_dict(yaml.safe_load(Path(config.model).read_text()))
        self.model = MTAIR(dims).train()
        self.average = deepcopy(self.model).eval().requires_grad_(False)
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.step, self.seconds = 0, 0.0

    def train_step(self, degraded: Tensor, clean: Tensor) -> float:
        """One step of AdamW on the L1 loss; returns the loss. Raises FloatingPointError on NaN."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.rate(self.step)
        loss = (self.model(degraded) - clean).abs().mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.step}: lower the rate"
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient is {norm.item()} at step {self.step}: lower the rate"
            )
        self.optimiser.step()
        self.step += 1
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        averages: list[Tensor] = list(self.average.parameters())
        values: list[Tensor] = list(self.model.parameters())
        with torch.no_grad():
            torch._foreach_lerp_(averages, values, 1 - decay)
        return float(loss.item())

    def save(self) -> None:
        """Write the resumable state and, beside it, the averaged weights as safetensors."""
        state = {
            "step": self.step, "seconds": self.seconds, "model": self.model.state_dict(),
            "average": self.average.state_dict(), "optimiser": self.optimiser.state_dict(),
        }  # fmt: skip
        part = self.folder / "state.pt.part"
        torch.save(state, part)
        part.replace(self.folder / "state.pt")
        checkpoint.save(self.average, self.folder / "weights.safetensors", self.record())

    def resume(self) -> None:
        """Go on from the folder's state.pt, if there is one."""
        path = self.folder / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.seconds = state["step"], state["seconds"]
        logger.info("resumed at step %d", self.step)

    def start_from(self, weights: str) -> None:
        """Take the weights of a finished run (a shipped name or a file) instead of random ones."""
        tensors = checkpoint.load_model(weights).state_dict()
        self.model.load_state_dict(tensors)
        self.average.load_state_dict(tensors)

    def record(self) -> dict[str, Any]:
        """What a weights file says of its making."""
        return {
            "config": asdict(self.config), "steps_done": self.step,
            "hours": round(self.seconds / 3600, 2), "threads": torch.get_num_threads(),
            "machine": platform.processor() or platform.machine(), "torch": torch.__version__,
            "loss": "L1", "precision": "float32",
        }  # fmt: skip


def train(
    config: TrainConfig,
    data_root: Path,
    folder: Path,
    *,
    init: str | None = None,
    save_seconds: float = 240.0,
    check_steps: int = 1000,
) -> Path:
    """Train, or go on from `folder`, to the last step; returns the path of the weights.

    A new run starts from the weights `init`, a shipped name or a file, else from random ones.

    `folder/log.jsonl` gets a line every 50 steps (step, loss, rate, seconds) and the held-out PSNR
    every `check_steps`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cv2.setNumThreads(1)  # the patches are small, and the cores belong to the network
    data = TrainingData(data_root)
    trainer = Trainer(config, folder)
    if init is not None:
        trainer.start_from(init)
    trainer.resume()
    losses: list[float] = []
    before, last_save = trainer.seconds, time.monotonic()
    start = last_save
    with (folder / "log.jsonl").open("a") as log:
        for degraded, clean in _batches(data, config, trainer.step):
            losses.append(trainer.train_step(degraded, clean))
            trainer.seconds = before + time.monotonic() - start
            line: dict[str, float] = {}
            if trainer.step % 50 == 0:
                line = {
                    "step": trainer.step, "loss": round(float(np.mean(losses)), 5),
                    "rate": config.rate(trainer.step), "seconds": round(trainer.seconds),
                }  # fmt: skip
                losses.clear()
            if trainer.step % check_steps == 0:
                line["held_out_psnr_25"] = round(held_out_psnr(trainer.average, data), 3)
            if line:
                log.write(json.dumps(line) + "\n")
                log.flush()
            if time.monotonic() - last_save > save_seconds:
                trainer.save()
                last_save = time.monotonic()
    trainer.save()
    return folder / "weights.safetensors"

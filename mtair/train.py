"""Training: clean images in, weights out, resumable at any checkpoint, on one device or several.

Owns the loop, the loss and the state of a run. Started by `torchrun`, each process trains on its
rows of the same batch, so that the run is the one that a single process would have made.
"""

import json
import logging
import math
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn

from mtair import checkpoint, state
from mtair.data import TrainingData, batches
from mtair.grow import grow
from mtair.memory import keep_freed_memory
from mtair.model import MTAIR, Dimensions
from mtair.progress import forget_lines_after, held_out_psnr, save_samples
from mtair.schedule import TrainConfig

logger = logging.getLogger(__name__)

FREE_TO_CHANGE = {"model", "steps", "check_steps", "loaders"}
"""Of a config, when its run is resumed: the rest would make the record of its making a lie. The
network is compared by its weights."""


@dataclass(frozen=True, slots=True)
class Process:
    """This process among those of a run, and its device."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@contextmanager
def join_processes() -> Iterator[Process]:
    """Take the place that torchrun's environment names; alone where there is none."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Process(device=device)
        return
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    try:
        yield Process(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


class Trainer:
    """The state of a run: model, its moving average, optimiser and step."""

    def __init__(self, config: TrainConfig, folder: Path, process: Process | None = None) -> None:
        torch.manual_seed(config.seed)
        self.config, self.folder, self.process = config, folder, process or Process()
        dims = Dimensions.from_dict(yaml.safe_load(Path(config.model).read_text()))
        self.model = MTAIR(dims).train().to(self.process.device)
        self.average = deepcopy(self.model).eval().requires_grad_(False)
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay,
            fused=True,
        )  # fmt: skip
        several = self.process.count > 1
        self._spread: nn.Module = (
            nn.parallel.DistributedDataParallel(self.model) if several else self.model
        )
        self.step, self.seconds = 0, 0.0
        self.started_from: dict[str, Any] | None = None

    def train_step(self, degraded: Tensor, clean: Tensor) -> float:
        """One step of AdamW on a batch, of which this process takes its rows; returns the loss.

        Raises FloatingPointError, in every process, where the loss or the gradient is no number.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.rate(self.step)
        loss = self._loss(degraded, clean)
        value = self._mean(loss)
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} at step {self.step}: lower the rate")
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
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
        return value

    def _loss(self, degraded: Tensor, clean: Tensor) -> Tensor:
        rows, share = self._rows(len(degraded))
        device = self.process.device
        degraded, clean = degraded[rows].to(device), clean[rows].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            restored: Tensor = self._spread(degraded)
        error = restored - clean
        loss = error.abs().mean()
        if self.config.fft_weight:
            # Orthonormal: the weight then means the same whatever the side of the patch.
            spectrum = torch.view_as_real(torch.fft.rfft2(error, norm="ortho"))
            loss = loss + self.config.fft_weight * spectrum.abs().mean()
        return loss * share

    def _rows(self, n: int) -> tuple[slice, float]:
        """This process's rows of a batch of n, and what their mean counts: over the processes the
        mean is then that of the batch, as DistributedDataParallel averages gradients."""
        rank, count = self.process.rank, self.process.count
        if rank >= n:  # fewer rows than processes, and every one must take part
            return slice(0, 1), 0.0
        return slice(rank, None, count), len(range(rank, n, count)) * count / n

    def _mean(self, loss: Tensor) -> float:
        """The mean over the processes."""
        total = loss.detach().clone()
        if self.process.count > 1:
            dist.all_reduce(total)
        return float(total.item()) / self.process.count

    def save(self) -> None:
        """Write the resumable state and, beside it, the averaged weights as safetensors."""
        values = {
            "step": self.step, "seconds": self.seconds, "model": self.model.state_dict(),
            "average": self.average.state_dict(), "optimiser": self.optimiser.state_dict(),
            "started_from": self.started_from, "config": asdict(self.config),
        }  # fmt: skip
        state.save(values, self.folder)
        checkpoint.save(self.average, self.folder / "weights.safetensors", self.record())

    def resume(self) -> None:
        """Go on from the state in the folder, if there is one.

        Raises StateError where it is damaged, of another run, or not there for every process.
        """
        values = state.load(self.folder)
        if values is not None:
            self._take(values)
        if self.process.count > 1:
            self._check_same_step()

    def _take(self, values: dict[str, Any]) -> None:
        was, now = values.get("config", {}), asdict(self.config)
        changed = sorted(name for name in was.keys() - FREE_TO_CHANGE if was[name] != now[name])
        if changed:
            raise state.StateError(
                f"{self.folder}: the run there has another {' and '.join(changed)}; start one in "
                "another folder"
            )
        try:
            self.model.load_state_dict(values["model"])
            self.average.load_state_dict(values["average"])
            self.optimiser.load_state_dict(values["optimiser"])
        except (RuntimeError, ValueError) as error:
            raise state.StateError(
                f"{self.folder}: the run there is of another network than {self.config.model}; "
                "start one in another folder"
            ) from error
        self.step, self.seconds = values["step"], values["seconds"]
        self.started_from = values.get("started_from")
        logger.info("resumed at step %d", self.step)

    def _check_same_step(self) -> None:
        steps = torch.tensor([self.step, -self.step], device=self.process.device)
        dist.all_reduce(steps, dist.ReduceOp.MAX)
        most, least = int(steps[0]), -int(steps[1])
        if most != least:
            raise state.StateError(
                f"{self.folder}: the processes found runs of {least} to {most} steps there; it "
                "must be one folder that all of them see"
            )

    def start_from(self, weights: str) -> None:
        """Take the weights of a finished run (a shipped name or a file) instead of random ones.

        A smaller network is grown. Raises ValueError where this one cannot be grown from it.
        """
        tensors = grow(checkpoint.load_model(weights), self.model.dims).state_dict()
        self.model.load_state_dict(tensors)
        self.average.load_state_dict(tensors)
        info = checkpoint.describe(weights)
        self.started_from = {"sha256": info.sha256, "hours": info.hours}

    def record(self) -> dict[str, Any]:
        """What a weights file says of its making."""
        weight, device = self.config.fft_weight, self.process.device
        cpu = platform.processor() or platform.machine()
        return {
            "config": asdict(self.config), "steps_done": self.step,
            "hours": round(self.seconds / 3600, 2), "threads": torch.get_num_threads(),
            "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
            "processes": self.process.count, "torch": torch.__version__,
            "loss": f"L1 + {weight:g} L1 of the spectra" if weight else "L1",
            "precision": {"fp32": "float32", "bf16": "bfloat16 autocast"}[self.config.precision],
            "started_from": self.started_from,
        }  # fmt: skip


def train(
    config: TrainConfig,
    data_root: Path,
    folder: Path,
    *,
    init: str | None = None,
    save_seconds: float = 240.0,
) -> Path:
    """Train, or go on from `folder`, to the last step; returns the path of the weights.

    A new run starts from the weights `init`, a shipped name or a file, else from random ones.
    Under torchrun `folder` must be one that every process sees; the first alone writes to it.

    `folder/log.jsonl` gets a line every 50 steps (step, loss, rate, seconds) and the held-out PSNR
    every `config.check_steps`, when `folder/samples` gets a picture as well.
    """
    folder.mkdir(parents=True, exist_ok=True)
    keep_freed_memory(2**31 - 1)  # a step's activations: a quarter of its time on a CPU
    cv2.setNumThreads(1)  # the patches are small, and the cores belong to the network
    data = TrainingData(data_root)
    data.check(config)
    with join_processes() as process:
        trainer = Trainer(config, folder, process)
        if init is not None and not state.is_in(folder):
            trainer.start_from(init)
        trainer.resume()
        if process.count > 1:
            dist.barrier()  # the first may save at once, and all read the same files
        _run(trainer, data, save_seconds)
    return folder / "weights.safetensors"


def _run(trainer: Trainer, data: TrainingData, save_seconds: float) -> None:
    config, folder = trainer.config, trainer.folder
    losses: list[float] = []
    before, last_save = trainer.seconds, time.monotonic()
    start = last_save
    if not trainer.process.rank:
        forget_lines_after(trainer.step, folder / "log.jsonl")
    with (folder / "log.jsonl").open("a") as log:
        for degraded, clean in batches(data, config, trainer.step):
            losses.append(trainer.train_step(degraded, clean))
            trainer.seconds = before + time.monotonic() - start
            line: dict[str, float] = {}
            if trainer.step % 50 == 0:
                line = {
                    "step": trainer.step, "loss": round(float(np.mean(losses)), 5),
                    "rate": config.rate(trainer.step), "seconds": round(trainer.seconds),
                }  # fmt: skip
                losses.clear()
            if trainer.process.rank:
                continue
            if trainer.step % config.check_steps == 0:
                line["step"] = trainer.step
                line["held_out_psnr_25"] = round(held_out_psnr(trainer.average, data), 3)
                picture = folder / "samples" / f"{trainer.step:07}.png"
                save_samples(trainer.average, data, config, picture)
            if line:
                log.write(json.dumps(line) + "\n")
                log.flush()
            if time.monotonic() - last_save > save_seconds:
                trainer.save()
                last_save = time.monotonic()
    if trainer.process.rank == 0:
        trainer.save()

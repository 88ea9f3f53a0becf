"""Owns which workers a job gets: what they have to know, in this process or on a Ray.

Knows no file and no stage.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.address import Address
from pipeline.config import RestoreConfig
from pipeline.errors import ConfigError, DeviceError, notes_of
from pipeline.frames import PixelFormat, StreamInfo, TileBatch
from pipeline.tiles import TileGrid
from workers import (
    BATCH_TIMEOUT_SECONDS,
    LocalPool,
    PlaneSpec,
    RayPool,
    RestorerPool,
    WeightsError,
    WorkerError,
    WorkerSpec,
    available_devices,
    describe_weights,
    pick_device,
    ray_session,
)

LIVE_BATCH_SECONDS = 60.0
"""What a small batch of a live stream may take: who waits longer for it sees a frozen picture."""


@contextmanager
def open_pool(
    pixel_format: PixelFormat | None, config: RestoreConfig, device: str, smaller: str = "",
    batch_timeout_seconds: float = BATCH_TIMEOUT_SECONDS,
) -> Iterator[RestorerPool]:  # fmt: skip
    """The pool that the settings ask for, closed at the end with all that was started for it.

    Without a pixel format each batch must come with its own. `smaller` names a second network.
    """
    spec = replace(worker_spec(pixel_format, config, device), smaller=smaller)
    several = config.model.device == "auto" and len(available_devices()) > 1
    if config.pool.kind == "local" or (config.pool.kind == "auto" and not several):
        with LocalPool(spec, batch_timeout_seconds=batch_timeout_seconds) as local:
            yield local
        return
    n_workers = len(available_devices()) if several else 1
    gpus = 0 if device == "cpu" else 1
    with ray_session(), RayPool(
        spec, n_workers, num_cpus_per_worker=_cpu_share(n_workers), num_gpus_per_worker=gpus,
        batch_timeout_seconds=batch_timeout_seconds,
    ) as ray:  # fmt: skip
        yield ray


@dataclass(frozen=True, slots=True)
class SharedPool:
    """A pool for streams of any size and pixel format."""

    pool: RestorerPool
    device: str
    stride: int
    """Of the network: tiles whose sides are multiples of it are restored without padding."""


@contextmanager
def shared_pool(config: RestoreConfig, user: Path | Address) -> Iterator[SharedPool]:
    """The pool for live streams; `user` begins the message where it cannot be opened."""
    with worker_errors(user):
        device = pick_device(config.model.device)
        stride = describe_weights(config.model.model).stride
        smaller = config.model.fallback or ""
        with open_pool(None, config, device, smaller, LIVE_BATCH_SECONDS) as pool:
            yield SharedPool(pool, device, stride)


def worker_spec(pixel_format: PixelFormat | None, config: RestoreConfig, device: str) -> WorkerSpec:
    """What a worker for such frames has to know."""
    return WorkerSpec(
        checkpoint=config.model.model, device=device,
        planes=None if pixel_format is None else plane_spec(pixel_format),
        precision=config.model.precision, strength=config.model.strength,
    )  # fmt: skip


def _cpu_share(n_workers: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // n_workers)


def plane_spec(pixel_format: PixelFormat) -> PlaneSpec:
    """What the workers have to know of a stream's planes."""
    return PlaneSpec(
        n_planes=pixel_format.n_planes, log2_chroma_w=pixel_format.log2_chroma_w,
        log2_chroma_h=pixel_format.log2_chroma_h, bit_depth=pixel_format.bit_depth,
        matrix=pixel_format.matrix, full_range=pixel_format.full_range,
        chroma_location=pixel_format.chroma_location,
    )  # fmt: skip


@contextmanager
def worker_errors(source: Path | Address) -> Iterator[None]:
    """The one border where the workers' errors become this package's."""
    try:
        yield
    except WeightsError as error:
        raise ConfigError(f"--model: {error}") from error
    except WorkerError as error:
        raise DeviceError(f"{source}: {error}{notes_of(error)}") from error


def size_batches(pool: RestorerPool, info: StreamInfo, grid: TileGrid) -> None:
    """Have the workers find how many tiles of a batch are best taken at once."""
    if grid.batch_size > 1:
        pool.warm_up(blank(info, grid))


def blank(info: StreamInfo, grid: TileGrid) -> TileBatch:
    """A batch of the real shape, to compile and to find out what memory allows."""
    shapes = info.pixel_format.plane_shapes(info.width, info.height)
    return grid.split(tuple(np.zeros(shape, info.pixel_format.dtype) for shape in shapes))[0]

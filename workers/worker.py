"""Owns one network on one device: tile planes in, restored tile planes out.
Knows no Ray, no queue, no frame and no place of a tile in a picture."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

import mtair
from mtair.checkpoint import describe
from mtair.graphs import Graphed
from mtair.machine import cpu_computes_bf16, machine
from mtair.memory import keep_freed_memory
from workers.batching import fastest
from workers.colour import add_residual, planes_to_rgb, to_tensor
from workers.spec import (
    PlaneSpec,
    Precision,
    TileBatch,
    WeightsError,
    WeightsInfo,
    WorkerError,
    WorkerSpec,
)

logger = logging.getLogger(__name__)

Network = Callable[[Tensor], Tensor]
"""RGB `[N, 3, H, W]` in 0..1 to the same; its output may be overwritten by the next call."""


HALO = 32
"""Pixels of its neighbour that a half of a tile sees; a multiple of every network's stride."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_OUT_OF_MEMORY_TEXTS = (
    "DefaultCPUAllocator",  # "can't allocate memory" on Linux, "not enough memory" on Windows
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)


def describe_weights(name_or_path: str) -> WeightsInfo:
    """Read a weights file's identity; raises WeightsError where it cannot be used."""
    try:
        info = describe(name_or_path)
    except mtair.CheckpointError as error:
        raise WeightsError(str(error)) from error
    with torch.device("meta"):  # the network's shape alone, in no memory
        stride = mtair.MTAIR(info.dims).stride
    return WeightsInfo(info.name, info.sha256, stride)


class TileWorker:
    """The network on one device. Not thread-safe: one call at a time.

    Raises WeightsError where the weights cannot be used, WorkerError where the device cannot.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        keep_freed_memory()
        if spec.threads:
            torch.set_num_threads(spec.threads)
        self._spec = spec
        self._device = _device(spec.device)
        self._dtype = _dtype(spec.precision, self._device)
        cuda = self._device.type == "cuda"
        # Of its own: its copies and another worker's computation go on at the same time.
        self._stream = torch.cuda.Stream(self._device) if cuda else None  # type: ignore[no-untyped-call]
        names = [name for name in (spec.checkpoint, spec.smaller) if name]
        with self._on_stream():
            loaded = {name: self._load(name, self._dtype) for name in names}
        self._models: dict[str, Network] = {
            name: Graphed(model) if cuda else model for name, model in loaded.items()
        }
        self._float32_models: dict[str, nn.Module] = {}
        self._batch_limits: dict[tuple[int, ...], int] = {}
        """By the shape of a tile."""

    def __call__(
        self, tiles: TileBatch, planes: PlaneSpec | None = None, smaller: bool = False
    ) -> TileBatch:
        """Restore each tile: the same shapes and dtypes, arrays `[N, h, w]`, in the same order.

        `planes` says what their numbers mean where the spec does not, `smaller` asks for the second
        network. Where memory runs out, the batch is halved, and stays halved for later calls; then
        a single tile is. Raises WorkerError where the smallest does not fit, or the network's
        output is not finite.
        """
        if self._spec.strength == 0:
            return tiles
        self._use(planes, smaller)
        with self._on_stream():
            return self._restore_all(tiles)

    def _restore_all(self, tiles: TileBatch) -> TileBatch:
        parts: list[TileBatch] = []
        start, n_tiles, shape = 0, len(tiles[0]), tiles[0].shape[1:]
        while start < n_tiles:
            stop = min(start + self._batch_limits.get(shape, n_tiles), n_tiles)
            batch = tuple(plane[start:stop] for plane in tiles)
            part = self._restore_if_it_fits(batch)
            if part is None and stop - start > 1:
                self._batch_limits[shape] = self._halved(stop - start, tiles)
                continue
            parts.append(self._restore_in_halves(batch) if part is None else part)
            start = stop
        return _joined(parts, tiles)

    def warm_up(self, tiles: TileBatch, planes: PlaneSpec | None = None) -> None:
        """Restore a batch of the real shape: compiles kernels, finds what memory allows.

        Of several tiles, finds as well how many at once are fastest: later calls take so many.
        """
        n_tiles = len(tiles[0])
        self._use(planes, smaller=False)
        if n_tiles > 1 and self._spec.strength:
            with self._on_stream():
                fits = partial(self._fits, tiles)
                best = fastest(self._case(tiles), n_tiles, fits)
                self._batch_limits[tiles[0].shape[1:]] = best
            for model in self._models.values():
                if isinstance(model, Graphed):
                    model.forget()  # the numbers that were only tried
        for smaller in (False, True) if self._spec.smaller else (False,):
            self(tiles, planes, smaller)

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _use(self, planes: PlaneSpec | None, smaller: bool) -> None:
        given = planes or self._spec.planes
        assert given is not None
        self._planes = given
        self._name = self._spec.smaller if smaller else self._spec.checkpoint

    def _case(self, tiles: TileBatch) -> str:
        """All that the time of a tile depends on."""
        height, width = tiles[0].shape[1:]
        weights = describe_weights(self._name).sha256
        return f"{machine(self._device)}; {weights}; {width}x{height}; {self._dtype}"

    def _fits(self, tiles: TileBatch, n: int) -> bool:
        return self._restore_if_it_fits(tuple(plane[:n] for plane in tiles)) is not None

    def _load(self, name: str, dtype: torch.dtype) -> nn.Module:
        try:
            model = mtair.load_model(name, str(self._device))
        except mtair.CheckpointError as error:
            raise WeightsError(str(error)) from error
        return model.to(dtype).eval()

    def _restore_if_it_fits(self, tiles: TileBatch) -> TileBatch | None:
        try:
            return self._restore(tiles)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
        # Only here, out of `except`, has the traceback let go of the failed attempt's tensors.
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _halved(self, n_tiles: int, tiles: TileBatch) -> int:
        height, width = tiles[0].shape[1:]
        logger.warning(
            "Out of memory on %s with %d tiles of %dx%d: going on with %d at a time",
            self._device, n_tiles, width, height, n_tiles // 2,
        )  # fmt: skip
        return n_tiles // 2

    def _restore_in_halves(self, tile: TileBatch) -> TileBatch:
        """One tile as two, cut across its longer side, each with HALO rows of the other."""
        height, width = tile[0].shape[1:]
        axis = 1 if height >= width else 2
        length = tile[0].shape[axis]
        cut = -(-length // (2 * HALO)) * HALO
        if cut + HALO >= length:
            raise WorkerError(
                f"out of memory on {self._device} with one tile of {width}x{height}: "
                "use a smaller --tile"
            )
        logger.warning(
            "Out of memory on %s with one tile of %dx%d: halved", self._device, width, height
        )
        halves = []
        for first, last, keep in (
            (0, cut + HALO, slice(0, cut)),
            (cut - HALO, length, slice(HALO, None)),
        ):
            half = self._along(tile, axis, slice(first, last))
            part = self._restore_if_it_fits(half) or self._restore_in_halves(half)
            halves.append(self._along(part, axis, keep))
        return tuple(np.concatenate(planes, axis) for planes in zip(*halves, strict=True))

    def _along(self, tile: TileBatch, axis: int, pixels: slice) -> TileBatch:
        """A span of luma rows (axis 1) or columns (axis 2), with the chroma that belongs to it."""
        spec = self._planes
        shift = spec.log2_chroma_h if axis == 1 else spec.log2_chroma_w
        stop = None if pixels.stop is None else -(-pixels.stop // (1 << shift))
        chroma = slice(pixels.start >> shift, stop)
        before = (slice(None),) * axis
        return tuple(plane[(*before, chroma if i else pixels)] for i, plane in enumerate(tile))

    @torch.inference_mode()
    def _restore(self, tiles: TileBatch) -> TileBatch:
        planes = self._on_device(tiles)
        residual = self._residual(planes, self._models[self._name])
        try:
            return self._add(planes, residual)
        except FloatingPointError as error:
            if self._dtype == torch.float32:
                raise self._not_finite() from error
        # Half precision overflows where float32 does not; there is no third attempt.
        bad = (~residual.isfinite().flatten(1).all(1)).cpu().numpy()
        first = self._name not in self._float32_models
        logger.log(
            logging.WARNING if first else logging.DEBUG,
            "The network's output is not finite in %s in %d of %d tiles: such are done in float32",
            self._dtype, int(bad.sum()), len(bad),
        )  # fmt: skip
        if first:
            self._float32_models[self._name] = self._load(self._name, torch.float32)
        again = self._on_device(tuple(plane[bad] for plane in tiles))
        residual[torch.from_numpy(bad)] = self._residual(again, self._float32_models[self._name])
        try:
            return self._add(planes, residual)
        except FloatingPointError as error:
            raise self._not_finite() from error

    def _on_device(self, tiles: TileBatch) -> tuple[Tensor, ...]:
        return tuple(to_tensor(plane, self._device) for plane in tiles)

    def _residual(self, planes: tuple[Tensor, ...], model: Network) -> Tensor:
        # float32 whatever the network computes in: a bf16 image would lose the last bit of 8.
        rgb = planes_to_rgb(planes, self._planes)
        residual: Tensor = model(rgb).sub_(rgb)
        return residual

    def _add(self, planes: tuple[Tensor, ...], residual: Tensor) -> TileBatch:
        return add_residual(planes, residual, self._planes, self._spec.strength)

    def _not_finite(self) -> WorkerError:
        return WorkerError(
            f"the network's output is not finite even in float32: the weights "
            f"{self._name!r} are not usable on {self._device}"
        )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise WorkerError(f"{name!r} is no device: use cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise WorkerError(f"no {name} here: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _dtype(precision: Precision, device: torch.device) -> torch.dtype:
    if precision != "auto":
        return _DTYPES[precision]
    if device.type == "cuda":
        ampere_or_later = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if ampere_or_later else torch.float16
    return torch.bfloat16 if cpu_computes_bf16() else torch.float32


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(text in str(error) for text in _OUT_OF_MEMORY_TEXTS)


def _joined(parts: list[TileBatch], tiles: TileBatch) -> TileBatch:
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return tiles
    return tuple(np.concatenate(planes) for planes in zip(*parts, strict=True))

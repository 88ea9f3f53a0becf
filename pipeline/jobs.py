"""A job from its files to its files: the only place that joins the stages to a pool.

Owns threads and the life of every stage; knows neither pixels nor networks.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pipeline.address import Address
from pipeline.config import RestoreConfig
from pipeline.decode import VideoSource
from pipeline.encode import CONTAINERS, EncodeSettings, VideoWriter, default_settings
from pipeline.errors import (
    ConfigError,
    DeviceError,
    IntegrityError,
    Interrupted,
    SourceError,
)
from pipeline.frames import Frame, PixelFormat, StreamInfo, TileBatch
from pipeline.ledger import job_key
from pipeline.live import LiveSource
from pipeline.output import LiveOutput
from pipeline.publish import target_of
from pipeline.restore import Submit, restore_frames
from pipeline.segments import StopRequest, plan, until_asked
from pipeline.static import StaticTiles
from pipeline.stats import StreamStats
from pipeline.temporal import TemporalFilter
from pipeline.tiles import TileGrid
from workers import (
    LocalPool,
    PlaneSpec,
    RayPool,
    RestorerPool,
    WeightsError,
    WeightsInfo,
    WorkerError,
    WorkerSpec,
    available_devices,
    describe_weights,
    pick_device,
    ray_session,
)

logger = logging.getLogger(__name__)

DECODE_AHEAD = ENCODE_BEHIND = 2
"""Frames that wait between a codec's thread and the window; part of the memory bound."""

CPU_TILE, CUDA_TILE = (512, 512), (768, 768)
"""What `tile.size: auto` aims at: the CPU one is measured, see the README; the CUDA one is not."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """What a finished job did."""

    output: Path
    n_frames: int
    seconds: float
    """From the first frame asked for to the file under its final name."""
    warnings: tuple[str, ...]
    weights_sha256: str
    n_earlier: int = 0
    """How many of the frames an earlier, interrupted run had finished."""


def restored_name(source: Path) -> Path:
    """`clip.mp4` → `clip_restored.mp4`, beside it; `.mkv` for what is only read, such as `.avi`."""
    suffix = source.suffix if source.suffix.lower() in CONTAINERS else ".mkv"
    return source.with_name(f"{source.stem}_restored{suffix}")


def restore_file(
    source: str | Path, output: str | Path | None = None, config: RestoreConfig | None = None, *,
    on_frame: Callable[[int, int | None], None] | None = None, stop: StopRequest | None = None,
) -> RestoreReport:  # fmt: skip
    """Restore one video file; the output appears under its name only when complete.

    `output` defaults to `restored_name(source)`. `on_frame(done, expected)` is called after every
    frame; expected is None where the source does not say. Raises the subclasses of RestoreError,
    with a note where finished segments were kept, from which the next call goes on.
    """
    source = Path(source)
    output = restored_name(source) if output is None else Path(output)
    config = config or RestoreConfig()
    stop = stop or StopRequest()
    start, end = config.start_seconds, config.end_seconds
    with _worker_errors(source), ExitStack() as stack:
        video = stack.enter_context(VideoSource(source, start_seconds=start, end_seconds=end))
        weights = describe_weights(config.model.model)
        device = pick_device(config.model.device)
        grid = plan_grid(video.info, config, device, weights.stride)
        settings = encode_settings(output, video.info, config)
        writer = stack.enter_context(
            VideoWriter(
                output,
                video.info,
                settings,
                copy_from=source,
                start_seconds=start,
                end_seconds=end,
                overwrite=config.overwrite,
                job=_job(source, output, config, weights, device, grid, settings),
            )
        )
        warnings = tuple(writer.warnings)
        for warning in warnings:
            logger.warning("%s", warning)
        pool = stack.enter_context(open_pool(video.info.pixel_format, config, device))
        logger.info("%s", _plan(source, output, video.info, grid, pool, weights))
        began = time.monotonic()
        expected = _expected_frames(video.info, config)
        earlier = done = writer.n_written
        static = static_tiles(pool.submit, video.info, grid, config)
        stop.can_wait = config.resume
        # Closed before the writer is, whatever happens: the encoder's thread must have ended.
        with closing(_restored(video, grid, static, writer, config, stop)) as restored:
            for done in restored:
                if on_frame is not None:
                    on_frame(done, expected)
        stop.can_wait = False
        _check_counts(source, video, done, writer)
        _log_reuse(source, static)
    seconds = time.monotonic() - began
    return RestoreReport(output, done, seconds, warnings, weights.sha256, earlier)


def restore_stream(
    source: str | Address, sink: str | Address, config: RestoreConfig | None = None, *,
    stats: StreamStats | None = None, stop: threading.Event | None = None,
) -> StreamStats:  # fmt: skip
    """Restore a live stream until `stop` is set, or one of its ends is lost for good.

    Raises the subclasses of RestoreError: StreamLost where the source did not come back within
    `config.live.reconnects`, SourceError or SinkError where trying again is no use.
    """
    source, sink = (Address.parse(a) if isinstance(a, str) else a for a in (source, sink))
    config = config or RestoreConfig()
    stats, stop = stats or StreamStats(), stop or threading.Event()
    if config.temporal:
        raise ConfigError("temporal: not there for live streams yet; leave it 0")
    device = pick_device(config.model.device)
    with _worker_errors(source), ExitStack() as stack:
        weights = describe_weights(config.model.model)
        pools = stack.enter_context(ExitStack())
        output = stack.enter_context(LiveOutput(target_of(sink), config.encode, config.live, stats))
        live = stack.enter_context(LiveSource(source, config.live, stats, output.write_audio, stop))
        output.repeat_while(live.away)
        opened: PixelFormat | None = None
        for take, frames in live.takes():
            if take.info.pixel_format != opened:
                pools.close()
                opened = take.info.pixel_format
                pool = pools.enter_context(open_pool(opened, config, device))
            grid = plan_grid(take.info, config, device, weights.stride)
            pool.warm_up(_blank(take.info, grid))
            output.begin(take)
            static = static_tiles(pool.submit, take.info, grid, config)
            # As few in flight as keep the workers busy: each more is one model's time of delay.
            window = -(-pool.n_workers // grid.n_batches)
            for frame in restore_frames(_watched(frames, output, stats), grid,
                                        _unless_passed(static, live), window):  # fmt: skip
                output.write(frame)
    return stats


def _watched(
    frames: Iterator[Frame | None], output: LiveOutput, stats: StreamStats
) -> Iterator[Frame | None]:
    for frame in frames:
        stats.alive("restore")
        output.check()
        yield frame


def _unless_passed(submit: Submit, live: LiveSource) -> Submit:
    """`submit`, or the tiles as they are for the frames that the controller passes through."""

    def switched(batch: TileBatch) -> Future[TileBatch]:
        if live.restoring:
            return submit(batch)
        passed: Future[TileBatch] = Future()
        passed.set_result(batch)
        return passed

    return switched


def _blank(info: StreamInfo, grid: TileGrid) -> TileBatch:
    """A batch of the real shape, to compile and to find out what memory allows."""
    shapes = info.pixel_format.plane_shapes(info.width, info.height)
    return grid.split(tuple(np.zeros(shape, info.pixel_format.dtype) for shape in shapes))[0]


def _restored(
    video: VideoSource, grid: TileGrid, static: StaticTiles, writer: VideoWriter,
    config: RestoreConfig, stop: StopRequest,
) -> Generator[int]:  # fmt: skip
    """The whole program: decode | restore in order | encode; yields how many frames are through."""
    before = writer.n_written
    planned = plan(video.frames(writer.place), config.segment.frames)
    frames = _forgetting(_ahead(planned, DECODE_AHEAD), static)
    temporal = temporal_filter(video.info, config)
    restored = _calmed(
        frames, lambda kept: restore_frames(kept, grid, static, config.pool.window), temporal
    )
    written = _behind(writer.write, until_asked(restored, stop), ENCODE_BEHIND)
    for done, _ in enumerate(written, start=before + 1):
        yield done
    if stop.obeyed:
        raise Interrupted(f"{video.path}: stopped as asked; no output was written")


def _calmed(
    frames: Iterable[Frame],
    restore: Callable[[Iterable[Frame]], Iterator[Frame]],
    temporal: TemporalFilter | None,
) -> Iterator[Frame]:
    """Restored frames through the filter, each with its source; without one, as restored."""
    if temporal is None:
        return restore(frames)
    sources: deque[Frame] = deque()  # those in the window

    def kept() -> Iterator[Frame]:
        for frame in frames:
            sources.append(frame)
            yield frame

    return _filtered(restore(kept()), sources, temporal)


def _filtered(
    restored: Iterable[Frame], sources: deque[Frame], temporal: TemporalFilter
) -> Iterator[Frame]:
    for frame in restored:
        yield temporal(sources.popleft(), frame)
        if frame.ends_segment:  # a job that goes on after it has nothing to remember either
            temporal.reset()


def _forgetting(frames: Iterable[Frame], static: StaticTiles) -> Iterator[Frame]:
    """The same frames; no tile of one segment is reused in another, whoever restores that."""
    for frame in frames:
        yield frame
        if frame.ends_segment:  # asked for the next: this one's tiles have all been submitted
            static.reset()


def _ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """The same items, up to `depth` of them fetched in a thread before they are asked for."""
    end = object()
    with ThreadPoolExecutor(1, "decode") as thread:
        try:
            coming = deque(thread.submit(next, items, end) for _ in range(depth))
            while (item := coming.popleft().result()) is not end:
                coming.append(thread.submit(next, items, end))
                yield item  # type: ignore[misc]
        finally:
            thread.shutdown(cancel_futures=True)


def _behind(write: Callable[[Frame], None], frames: Iterable[Frame], depth: int) -> Iterator[None]:
    """Write every frame in a thread, at most `depth` of them waiting; yields as each is written."""
    with ThreadPoolExecutor(1, "encode") as thread:
        try:
            waiting: deque[Future[None]] = deque()
            for frame in frames:
                waiting.append(thread.submit(write, frame))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            thread.shutdown(cancel_futures=True)


def plan_grid(info: StreamInfo, config: RestoreConfig, device: str, stride: int) -> TileGrid:
    """The tiles of a stream. Raises ConfigError where the settings make none."""
    size = config.tile.size
    if size == "auto":
        size = CPU_TILE if device == "cpu" else CUDA_TILE
    pixel_format = info.pixel_format
    try:
        return TileGrid.plan(
            info.width, info.height, log2_chroma_w=pixel_format.log2_chroma_w,
            log2_chroma_h=pixel_format.log2_chroma_h, n_planes=pixel_format.n_planes, tile=size,
            overlap=config.tile.overlap, batch_size=config.tile.batch, align=stride,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(f"tiles: {error}") from error


def static_tiles(
    submit: Submit, info: StreamInfo, grid: TileGrid, config: RestoreConfig
) -> StaticTiles:
    """`submit` that restores nothing twice; the threshold in the stream's own sample units."""
    unit = 1 << (info.pixel_format.bit_depth - 8)
    return StaticTiles(submit, grid.n_batches, config.tile.static_threshold * unit)


def temporal_filter(info: StreamInfo, config: RestoreConfig) -> TemporalFilter | None:
    """None where nothing is to be averaged; what `strength` leaves of a frame is left alone."""
    strength = config.temporal * config.model.strength
    return TemporalFilter(strength, info.pixel_format.bit_depth) if strength else None


def _job(
    source: Path, output: Path, config: RestoreConfig, weights: WeightsInfo, device: str,
    grid: TileGrid, settings: EncodeSettings,
) -> dict[str, str] | None:  # fmt: skip
    """The key of everything that the output depends on; None where nothing is to be resumed."""
    if not config.resume:
        return None
    # Whatever a later version adds to the settings counts, unless it is named here.
    no_matter: dict[str, Any] = {
        "overwrite": True, "resume": True, "model": {"model"}, "pool": {"window"},
        "live": True,
    }  # fmt: skip
    asked = config.model_dump(mode="json", exclude=no_matter)
    found = [device, available_devices(), str(grid), asdict(settings), output.suffix.lower()]
    try:
        return job_key(source, weights.sha256, {"asked": asked, "found": found})
    except OSError as error:
        raise SourceError(f"{source}: cannot be read ({error.strerror}); check it") from error


def encode_settings(output: Path, info: StreamInfo, config: RestoreConfig) -> EncodeSettings:
    """What the container and the source suggest, with what the user asked for in its place."""
    asked = config.encode.model_dump(exclude_none=True)
    base = EncodeSettings(asked["codec"]) if "codec" in asked else default_settings(output, info)
    return replace(base, **asked)


@contextmanager
def open_pool(
    pixel_format: PixelFormat, config: RestoreConfig, device: str
) -> Iterator[RestorerPool]:
    """The pool that the settings ask for, closed at the end with all that was started for it."""
    spec = WorkerSpec(
        checkpoint=config.model.model, planes=_plane_spec(pixel_format), device=device,
        precision=config.model.precision, strength=config.model.strength,
    )  # fmt: skip
    several = config.model.device == "auto" and len(available_devices()) > 1
    if config.pool.kind == "local" or (config.pool.kind == "auto" and not several):
        with LocalPool(spec) as local:
            yield local
        return
    n_workers = len(available_devices()) if several else 1
    gpus = 0 if device == "cpu" else 1
    with ray_session(), RayPool(
        spec, n_workers, num_cpus_per_worker=_cpu_share(n_workers), num_gpus_per_worker=gpus
    ) as ray:  # fmt: skip
        yield ray


def _cpu_share(n_workers: int) -> int:
    import os

    return max(1, len(os.sched_getaffinity(0)) // n_workers)


def _plane_spec(pixel_format: PixelFormat) -> PlaneSpec:
    return PlaneSpec(
        n_planes=pixel_format.n_planes, log2_chroma_w=pixel_format.log2_chroma_w,
        log2_chroma_h=pixel_format.log2_chroma_h, bit_depth=pixel_format.bit_depth,
        matrix=pixel_format.matrix, full_range=pixel_format.full_range,
        chroma_location=pixel_format.chroma_location,
    )  # fmt: skip


@contextmanager
def _worker_errors(source: Path | Address) -> Iterator[None]:
    """The one border where the workers' errors become this package's."""
    try:
        yield
    except WeightsError as error:
        raise ConfigError(f"--model: {error}") from error
    except WorkerError as error:
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        raise DeviceError(f"{source}: {error}{notes}") from error


def _expected_frames(info: StreamInfo, config: RestoreConfig) -> int | None:
    if info.duration_seconds is None or not info.frame_rate:
        return info.n_frames
    if config.start_seconds is None and config.end_seconds is None and info.n_frames:
        return info.n_frames
    end = min(config.end_seconds or info.duration_seconds, info.duration_seconds)
    return max(1, round((end - (config.start_seconds or 0)) * info.frame_rate))


def _check_counts(source: Path, video: VideoSource, n_restored: int, writer: VideoWriter) -> None:
    if not video.n_decoded == n_restored == writer.n_written:
        raise IntegrityError(
            f"{source}: {video.n_decoded} frames decoded, {n_restored} restored, "
            f"{writer.n_written} encoded: the output would not be faithful and was removed"
        )
    if video.n_corrupt:
        logger.warning("%s: %d corrupt packets gave no frame", source, video.n_corrupt)


def _log_reuse(source: Path, static: StaticTiles) -> None:
    values = {"tiles": static.n_tiles, "tiles_reused": static.n_reused}
    logger.info(
        "%s: %d of %d tiles stood still and were not restored again", source, static.n_reused,
        static.n_tiles, extra={"values": values},
    )  # fmt: skip


def _plan(
    source: Path, output: Path, info: StreamInfo, grid: TileGrid, pool: RestorerPool,
    weights: WeightsInfo,
) -> str:  # fmt: skip
    return (
        f"{source} → {output}: {info.width}x{info.height} {info.pixel_format.name}, "
        f"{grid.n_tiles} tiles of {grid.tile_width}x{grid.tile_height}, weights {weights.name} "
        f"{weights.sha256[:12]}, {type(pool).__name__} of {pool.n_workers}"
    )

"""A job from its file to its file: joins the stages.

Owns threads and the life of every stage; knows neither pixels nor networks.
"""

import logging
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import RestoreConfig
from pipeline.decode import VideoSource
from pipeline.derived import (
    encode_settings,
    open_source,
    output_name,
    plan_grid,
    resume_key,
    static_tiles,
    temporal_filter,
)
from pipeline.encode import VideoWriter
from pipeline.errors import IntegrityError, Interrupted
from pipeline.frames import StreamInfo
from pipeline.irregular import Progress, unkept_warning
from pipeline.plan import StreamPlan
from pipeline.pools import open_pool, size_batches, worker_errors
from pipeline.segments import StopRequest, plan, until_asked
from pipeline.stages import ENCODE_BEHIND, behind, decoded, restored
from pipeline.static import StaticTiles
from pipeline.tiles import TileGrid
from pipeline.watch import WatchedThread
from workers import RestorerPool, WeightsInfo, available_devices, describe_weights, pick_device

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True, slots=True)
class FilePlan:
    """What a job would do."""

    output: Path
    streams: tuple[StreamPlan, ...]
    warnings: tuple[str, ...]
    """What would not be kept as it is."""


def plan_file(
    source: str | Path, output: str | Path | None = None, config: RestoreConfig | None = None
) -> FilePlan:
    """What `restore_file` would do with the same arguments: restores and writes nothing.

    Raises what it would raise before its first frame, but for the device's and the workers' errors.
    """
    source = Path(source)
    output = output_name(source, None if output is None else Path(output))
    config = config or RestoreConfig()
    start, end = config.start_seconds, config.end_seconds
    with worker_errors(source), open_source(source, config) as video:
        weights = describe_weights(config.model.model)
        plan_grid(video.info, config, pick_device(config.model.device), weights.stride)
        writer = VideoWriter(
            output, video.info, encode_settings(output, video.info, config), copy_from=source,
            start_seconds=start, end_seconds=end, overwrite=config.overwrite, dry_run=True,
        )  # fmt: skip
        unkept = unkept_warning(video.tally.unkept)
        planned = FilePlan(output, tuple(writer.plan), (*writer.warnings, *unkept))
        writer.abort()
    return planned


def restore_file(
    source: str | Path, output: str | Path | None = None, config: RestoreConfig | None = None, *,
    on_frame: Callable[[int, int | None], None] | None = None, stop: StopRequest | None = None,
) -> RestoreReport:  # fmt: skip
    """Restore one video file; the output appears under its name only when complete.

    `output` defaults to `restored_name(source)`, and may be a folder for that. `on_frame(done,
    expected)` is called after every frame; expected is None where the source does not say. Raises
    the subclasses of RestoreError, with a note where finished segments were kept, from which the
    next call goes on.
    """
    source = Path(source)
    output = output_name(source, None if output is None else Path(output))
    config = config or RestoreConfig()
    stop = stop or StopRequest()
    start, end = config.start_seconds, config.end_seconds
    with worker_errors(source), ExitStack() as stack:
        video, decoder = stack.enter_context(_opened(source, config))
        weights = describe_weights(config.model.model)
        device = pick_device(config.model.device)
        grid = plan_grid(video.info, config, device, weights.stride)
        settings = encode_settings(output, video.info, config)
        devices = [device, available_devices()]
        key = resume_key(source, output, config, weights.sha256, devices, grid, settings)
        writer = stack.enter_context(
            VideoWriter(
                output, video.info, settings, copy_from=source, start_seconds=start,
                end_seconds=end, overwrite=config.overwrite, job=key,
            )
        )  # fmt: skip
        # Of the first picture: what is said before all the work.
        unkept = frozenset(video.tally.unkept)
        warnings = (*writer.warnings, *unkept_warning(unkept))
        for warning in warnings:
            logger.warning("%s", warning)
        pool = stack.enter_context(open_pool(video.info.pixel_format, config, device))
        logger.info("%s", _plan(source, output, video.info, grid, pool, weights))
        size_batches(pool, video.info, grid)
        began = time.monotonic()
        expected = _expected_frames(video.info, config)
        earlier = done = writer.n_written
        static = static_tiles(pool.submit, video.info, grid, config)
        stop.can_wait = config.resume
        # Closed before the writer is, whatever happens: the encoder's thread must have ended.
        with closing(_written(video, decoder, grid, static, writer, config, stop)) as written:
            for done in written:
                if on_frame is not None:
                    on_frame(done, expected)
        stop.can_wait = False
        _check_counts(source, video, done, writer)
        irregular = tuple(video.tally.irregular.warnings(config.decode.deinterlace, said=unkept))
        for warning in irregular:
            logger.warning("%s: %s", source, warning)
        _log_reuse(source, static)
    seconds = time.monotonic() - began
    return RestoreReport(output, done, seconds, warnings + irregular, weights.sha256, earlier)


def _written(
    video: VideoSource, decoder: WatchedThread, grid: TileGrid, static: StaticTiles,
    writer: VideoWriter, config: RestoreConfig, stop: StopRequest,
) -> Generator[int]:  # fmt: skip
    """The whole program: decode | restore in order | encode; yields how many frames are through."""
    before = writer.n_written
    planned = plan(video.frames(writer.place), config.segment.frames)
    frames = decoded(planned, video.tally.progress, decoder)
    temporal = temporal_filter(video.info, config)
    done_frames = restored(frames, grid, static, temporal, config.pool.window)
    written = behind(writer.write, until_asked(done_frames, stop), ENCODE_BEHIND)
    for done, _ in enumerate(written, start=before + 1):
        yield done
    if stop.obeyed:
        raise Interrupted(f"{video.path}: stopped as asked; no output was written")


@contextmanager
def _opened(source: Path, config: RestoreConfig) -> Iterator[tuple[VideoSource, WatchedThread]]:
    """The source and the thread that decodes it."""
    decoder = WatchedThread(str(source), config.decode.stall_timeout)
    video: VideoSource | None = None
    try:
        progress = Progress()
        opening = decoder.submit(lambda: open_source(source, config, progress=progress))
        video = decoder.wait(opening, lambda: progress.at)
        yield video, decoder
    finally:
        decoder.close()
        if video is not None:
            video.abandoned = decoder.stalled
            video.close()


def _expected_frames(info: StreamInfo, config: RestoreConfig) -> int | None:
    if info.duration_seconds is None or not info.frame_rate:
        return info.n_frames
    if config.start_seconds is None and config.end_seconds is None and info.n_frames:
        return info.n_frames
    end = min(config.end_seconds or info.duration_seconds, info.duration_seconds)
    return max(1, round((end - (config.start_seconds or 0)) * info.frame_rate))


def _check_counts(source: Path, video: VideoSource, n_restored: int, writer: VideoWriter) -> None:
    if not video.tally.n_decoded == n_restored == writer.n_written:
        raise IntegrityError(
            f"{source}: {video.tally.n_decoded} frames decoded, {n_restored} restored, "
            f"{writer.n_written} encoded: the output would not be faithful and was removed"
        )


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

"""A job from its files to its files: joins the stages, and alone knows the workers.

Owns threads and the life of every stage; knows neither pixels nor networks.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pipeline.address import Address
from pipeline.config import RestoreConfig
from pipeline.cut import Cut, CutVideo
from pipeline.decode import VideoSource
from pipeline.encode import (
    CONTAINERS,
    EncodeSettings,
    VideoWriter,
    default_settings,
    encoder_name,
)
from pipeline.errors import (
    ConfigError,
    DeviceError,
    IntegrityError,
    Interrupted,
    RestoreError,
    SourceError,
)
from pipeline.frames import Frame, PixelFormat, StreamInfo, TileBatch
from pipeline.ledger import job_key
from pipeline.parts import Part, PartWriter, RestoredPart, first_segment
from pipeline.plan import StreamPlan
from pipeline.restore import Submit, restore_frames
from pipeline.segments import StopRequest, plan, until_asked
from pipeline.stages import (
    DECODE_AHEAD,
    ENCODE_BEHIND,
    ahead,
    behind,
    calmed,
    decoded,
    forgetting,
)
from pipeline.static import StaticTiles
from pipeline.temporal import TemporalFilter
from pipeline.tiles import TileGrid
from pipeline.watch import WatchedThread
from workers import (
    LocalPool,
    Outcome,
    PlaneSpec,
    RayCrew,
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
    spread,
)

logger = logging.getLogger(__name__)

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
    output = restored_name(source) if output is None else Path(output)
    config = config or RestoreConfig()
    start, end = config.start_seconds, config.end_seconds
    with worker_errors(source), open_source(source, config) as video:
        weights = describe_weights(config.model.model)
        plan_grid(video.info, config, pick_device(config.model.device), weights.stride)
        writer = VideoWriter(
            output, video.info, encode_settings(output, video.info, config), copy_from=source,
            start_seconds=start, end_seconds=end, overwrite=config.overwrite, dry_run=True,
        )  # fmt: skip
        planned = FilePlan(output, tuple(writer.plan), tuple(writer.warnings))
        writer.abort()
    return planned


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
    with worker_errors(source), ExitStack() as stack:
        video, decoder = stack.enter_context(_opened(source, config))
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
                job=resume_key(
                    source, output, config, weights, [device, available_devices()], grid, settings
                ),
            )
        )
        warnings = tuple(writer.warnings)
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
        with closing(_restored(video, decoder, grid, static, writer, config, stop)) as restored:
            for done in restored:
                if on_frame is not None:
                    on_frame(done, expected)
        stop.can_wait = False
        _check_counts(source, video, done, writer, config.decode.deinterlace)
        _log_reuse(source, static)
    seconds = time.monotonic() - began
    return RestoreReport(output, done, seconds, warnings, weights.sha256, earlier)


def size_batches(pool: RestorerPool, info: StreamInfo, grid: TileGrid) -> None:
    """Have the workers find how many tiles of a batch are best taken at once."""
    if grid.batch_size > 1:
        pool.warm_up(blank(info, grid))


def blank(info: StreamInfo, grid: TileGrid) -> TileBatch:
    """A batch of the real shape, to compile and to find out what memory allows."""
    shapes = info.pixel_format.plane_shapes(info.width, info.height)
    return grid.split(tuple(np.zeros(shape, info.pixel_format.dtype) for shape in shapes))[0]


def _restored(
    video: VideoSource, decoder: WatchedThread, grid: TileGrid, static: StaticTiles,
    writer: VideoWriter, config: RestoreConfig, stop: StopRequest,
) -> Generator[int]:  # fmt: skip
    """The whole program: decode | restore in order | encode; yields how many frames are through."""
    before = writer.n_written
    planned = plan(video.frames(writer.place), config.segment.frames)
    frames = decoded(planned, video, decoder)
    restored = _stages(frames, video.info, grid, static, config)
    written = behind(writer.write, until_asked(restored, stop), ENCODE_BEHIND)
    for done, _ in enumerate(written, start=before + 1):
        yield done
    if stop.obeyed:
        raise Interrupted(f"{video.path}: stopped as asked; no output was written")


def _stages(
    frames: Iterator[Frame], info: StreamInfo, grid: TileGrid, static: StaticTiles,
    config: RestoreConfig,
) -> Iterator[Frame]:  # fmt: skip
    """Planned frames, restored in order."""
    temporal = temporal_filter(info, config)
    return calmed(
        forgetting(frames, static),
        lambda kept: restore_frames(kept, grid, static, config.pool.window), temporal,
    )  # fmt: skip


def open_source(source: Path, config: RestoreConfig, threads: int = 0) -> VideoSource:
    """The file, read as the settings say. Raises SourceError."""
    return VideoSource(
        source, start_seconds=config.start_seconds, end_seconds=config.end_seconds, threads=threads,
        deinterlace=config.decode.deinterlace, hwaccel=config.decode.hwaccel,
        max_pixels=config.decode.max_pixels, stall_seconds=config.decode.stall_timeout,
    )  # fmt: skip


@contextmanager
def _opened(source: Path, config: RestoreConfig) -> Iterator[tuple[VideoSource, WatchedThread]]:
    """The source and the thread that decodes it."""
    decoder = WatchedThread(str(source), config.decode.stall_timeout)
    video: VideoSource | None = None
    try:
        opening = decoder.submit(lambda: open_source(source, config))
        video = decoder.wait(opening, lambda: 0)
        yield video, decoder
    finally:
        decoder.close()
        if video is not None:
            video.abandoned = decoder.stalled
            video.close()


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


def resume_key(
    source: Path, output: Path, config: RestoreConfig, weights: WeightsInfo, devices: list[Any],
    grid: TileGrid, settings: EncodeSettings,
) -> dict[str, str] | None:  # fmt: skip
    """The key of everything that the output depends on; None where nothing is to be resumed."""
    if not config.resume:
        return None
    # Whatever a later version adds to the settings counts, unless it is named here.
    no_matter: dict[str, Any] = {
        "overwrite": True, "resume": True, "model": {"model", "fallback"}, "pool": {"window"},
        "decode": {"max_pixels", "stall_timeout"},
        "live": True,
    }  # fmt: skip
    asked = config.model_dump(mode="json", exclude=no_matter)
    found = [*devices, str(grid), asdict(settings), output.suffix.lower()]
    try:
        return job_key(source, weights.sha256, {"asked": asked, "found": found})
    except OSError as error:
        raise SourceError(f"{source}: cannot be read ({error.strerror}); check it") from error


def encode_settings(output: Path, info: StreamInfo, config: RestoreConfig) -> EncodeSettings:
    """What the container and the source suggest, with what the user asked for in its place."""
    asked = config.encode.model_dump(exclude_none=True)
    base = default_settings(output, info)
    if "codec" in asked:
        base = EncodeSettings(encoder_name(asked.pop("codec")))
    asked["options"] = base.options | asked["options"]
    return replace(base, **asked)


@contextmanager
def open_pool(
    pixel_format: PixelFormat | None, config: RestoreConfig, device: str, smaller: str = ""
) -> Iterator[RestorerPool]:
    """The pool that the settings ask for, closed at the end with all that was started for it.

    Without a pixel format each batch must come with its own. `smaller` names a second network.
    """
    spec = replace(worker_spec(pixel_format, config, device), smaller=smaller)
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
    device = pick_device(config.model.device)
    with worker_errors(user):
        stride = describe_weights(config.model.model).stride
        with open_pool(None, config, device, config.model.fallback or "") as pool:
            yield SharedPool(pool, device, stride)


def worker_spec(pixel_format: PixelFormat | None, config: RestoreConfig, device: str) -> WorkerSpec:
    """What a worker for such frames has to know."""
    return WorkerSpec(
        checkpoint=config.model.model, device=device,
        planes=None if pixel_format is None else plane_spec(pixel_format),
        precision=config.model.precision, strength=config.model.strength,
    )  # fmt: skip


def _cpu_share(n_workers: int) -> int:
    import os

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
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        raise DeviceError(f"{source}: {error}{notes}") from error


def _expected_frames(info: StreamInfo, config: RestoreConfig) -> int | None:
    if info.duration_seconds is None or not info.frame_rate:
        return info.n_frames
    if config.start_seconds is None and config.end_seconds is None and info.n_frames:
        return info.n_frames
    end = min(config.end_seconds or info.duration_seconds, info.duration_seconds)
    return max(1, round((end - (config.start_seconds or 0)) * info.frame_rate))


def _check_counts(
    source: Path, video: VideoSource, n_restored: int, writer: VideoWriter, deinterlace: str
) -> None:
    if not video.n_decoded == n_restored == writer.n_written:
        raise IntegrityError(
            f"{source}: {video.n_decoded} frames decoded, {n_restored} restored, "
            f"{writer.n_written} encoded: the output would not be faithful and was removed"
        )
    if video.n_interlaced:
        how = "left as they are" if deinterlace == "off" else "deinterlaced"
        logger.warning("%s: %d frames are interlaced and were %s", source, video.n_interlaced, how)
    if video.n_corrupt:
        logger.warning("%s: %d corrupt packets gave no frame", source, video.n_corrupt)
    if video.n_retimed:
        logger.warning(
            "%s: %d frames had no time of their own, or one not after that of the frame before; "
            "they follow it", source, video.n_retimed,
        )  # fmt: skip


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


KEPT_NETWORKS = 4
"""Streams of another pixel format need a network of their own; a worker keeps so many loaded."""


class PartJob:
    """What a worker does with each part, in its own process: decode, restore, encode.

    `weights` are the files that do not ship with this project, by the name that the settings have
    for them; `threads` those of the network and of the decoder.
    """

    def __init__(self, weights: Mapping[str, bytes], device: str, threads: int) -> None:
        self._weights, self._device, self._threads = dict(weights), device, threads
        self._pools: dict[WorkerSpec, LocalPool] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __call__(self, part: Part) -> RestoredPart | RestoreError:
        """The finished segments; an error that another try would meet again is a result too.

        Raises WorkerError where this worker failed and another might not.
        """
        try:
            with tempfile.TemporaryDirectory() as folder:
                return self._restored(part, Path(folder))
        except RestoreError as error:
            return error
        except WeightsError as error:
            return ConfigError(f"--model: {error}")

    def close(self) -> None:
        """Let go of networks and files. Again does nothing."""
        while self._pools:
            self._pools.popitem()[1].close()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _restored(self, part: Part, folder: Path) -> RestoredPart:
        info = part.encoding.info
        pool = self._pool(part)
        size_batches(pool, info, part.grid)
        static = static_tiles(pool.submit, info, part.grid, part.config)
        segments = PartWriter(part.encoding, folder)
        with _part_video(part, folder, self._threads) as video:
            planned = plan(video.frames(), part.config.segment.frames)
            if isinstance(video, CutVideo):
                planned = first_segment(planned)
            frames = ahead(planned, DECODE_AHEAD)
            restored = _stages(frames, info, part.grid, static, part.config)
            for _ in behind(segments.write, restored, ENCODE_BEHIND):
                pass
            if isinstance(video, CutVideo):
                segments.finished = [video.checked(segment) for segment in segments.finished]
            return segments.with_data()

    def _pool(self, part: Part) -> LocalPool:
        spec = worker_spec(part.encoding.info.pixel_format, part.config, self._device)
        spec = replace(spec, checkpoint=self._checkpoint(part), threads=self._threads)
        if spec not in self._pools:
            found = describe_weights(spec.checkpoint).sha256
            if found != part.weights_sha256:
                raise WeightsError(
                    f"a worker has other weights of that name ({found[:12]}): use the same "
                    "version on every machine"
                )
            if len(self._pools) == KEPT_NETWORKS:
                self._pools.pop(next(iter(self._pools))).close()
            self._pools[spec] = LocalPool(spec)
        return self._pools[spec]

    def _checkpoint(self, part: Part) -> str:
        """The weights' shipped name, or where this process has put what was sent."""
        name = part.config.model.model
        if name not in self._weights:
            return name
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name) / f"{part.weights_sha256[:16]}.safetensors"
        if not path.exists():
            path.write_bytes(self._weights[name])
        return str(path)


def weights_of(model: str) -> tuple[WeightsInfo, bytes | None]:
    """Which weights `model` names, and the file itself where it does not ship with this project.

    Raises ConfigError.
    """
    with worker_errors(Path(model)):
        info = describe_weights(model)
    path = Path(model)
    return info, path.read_bytes() if path.suffix or "/" in model else None


@contextmanager
def part_workers(
    job: PartJob, *, address: str | None, cpus: float, gpus: float, n_workers: int | None
) -> Iterator[Callable[[Iterable[Part]], Iterator[Outcome]]]:
    """Workers on the Ray at `address`, or on one of our own, that do `job`.

    Gives the function that has them do parts and yields the outcome of each as it comes. Raises
    DeviceError, as does that.
    """
    with (
        worker_errors(Path("Ray")),
        ray_session(address),
        RayCrew(
            job, num_cpus_per_worker=cpus, num_gpus_per_worker=gpus, n_workers=n_workers
        ) as crew,
    ):
        yield lambda parts: spread(crew, parts)


def _part_video(part: Part, folder: Path, threads: int) -> VideoSource:
    if isinstance(part.piece, Cut):
        return CutVideo(part.piece, part.source, threads, part.config.decode.deinterlace)
    path = folder / f"source{part.piece.suffix}"
    path.write_bytes(part.piece.data)
    video = open_source(path, part.config, threads)
    video.path = part.source  # in messages
    return video

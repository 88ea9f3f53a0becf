"""Owns what a job's settings come to for one source: tiles, encoder, filters, the key of its work.

Knows no pool and opens nothing but the source.
"""

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipeline.config import NO_MATTER, RestoreConfig
from pipeline.containers import CONTAINERS
from pipeline.decode import HwAccel, VideoSource
from pipeline.encoder import EncodeSettings, default_settings, encoder_name
from pipeline.errors import ConfigError, SourceError
from pipeline.frames import StreamInfo
from pipeline.irregular import Progress
from pipeline.ledger import job_key
from pipeline.restore import Submit
from pipeline.static import StaticTiles
from pipeline.temporal import TemporalFilter
from pipeline.tiles import TileGrid

CPU_TILE, CUDA_TILE = (512, 512), (768, 768)
"""What `tile.size: auto` aims at: the CPU one is measured, see the README; the CUDA one is not."""


def output_name(source: Path, asked: Path | None) -> Path:
    """What the output is called: as asked, or in the folder asked for, or beside the source.

    Raises SourceError where the source is a folder itself.
    """
    if asked is not None and not os.path.isdir(asked):
        return asked
    name = restored_name(source)
    return name if asked is None else asked / name.name


def restored_name(source: Path) -> Path:
    """`clip.mp4` → `clip_restored.mp4`, beside it; `.mkv` for what is only read, such as `.avi`."""
    if os.path.isdir(source):  # `.` has no name
        raise SourceError(f"{source}: is a directory; name a video file")
    suffix = source.suffix if source.suffix.lower() in CONTAINERS else ".mkv"
    return source.with_name(f"{source.stem}_restored{suffix}")


def open_source(
    source: Path, config: RestoreConfig, threads: int = 0, *, hwaccel: HwAccel | None = None,
    progress: Progress | None = None,
) -> VideoSource:  # fmt: skip
    """The file, read as the settings say, but for `hwaccel` if given. Raises SourceError."""
    return VideoSource(
        source, start_seconds=config.start_seconds, end_seconds=config.end_seconds, threads=threads,
        deinterlace=config.decode.deinterlace, hwaccel=hwaccel or config.decode.hwaccel,
        max_pixels=config.decode.max_pixels, stall_seconds=config.decode.stall_timeout,
        progress=progress,
    )  # fmt: skip


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
    source: Path, output: Path, config: RestoreConfig, weights_sha256: str, devices: list[Any],
    grid: TileGrid, settings: EncodeSettings,
) -> dict[str, str] | None:  # fmt: skip
    """The key of everything that the output depends on; None where nothing is to be resumed."""
    if not config.resume:
        return None
    # Whatever a later version adds to the settings counts, unless it is named here.
    asked = config.model_dump(mode="json", exclude=NO_MATTER)
    found = [*devices, str(grid), asdict(settings), output.suffix.lower()]
    try:
        return job_key(source, weights_sha256, {"asked": asked, "found": found})
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

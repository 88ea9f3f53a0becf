"""Owns what is asked of an encoder: settings, pixel format, options, tags. Knows no file."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.codec.codec import PixFmtLoss, find_best_pix_fmt_of_list

from pipeline.errors import ConfigError
from pipeline.frames import Frame, Matrix, PixelFormat, StreamInfo

_CRF_MAX = {
    "libx264": 51, "libx264rgb": 51, "libx265": 51, "libsvtav1": 63, "libvpx-vp9": 63, "libvpx": 63,
}  # fmt: skip
_DEFAULT_PRESETS = {"libx264": "medium", "libx264rgb": "medium", "libx265": "medium"}
_SWS_MATRICES: dict[Matrix, str] = {
    "bt601": "ITU601", "bt709": "ITU709", "fcc": "FCC", "smpte240m": "SMPTE240M",
    "bt2020": "BT2020",
}  # fmt: skip
_MATRIX_TAGS: dict[Matrix, int] = {
    "rgb": 0, "bt709": 1, "fcc": 4, "bt601": 6, "smpte240m": 7, "ycgco": 8, "bt2020": 9,
}  # fmt: skip
_LIMITED, _FULL = 1, 2


@dataclass(frozen=True, slots=True)
class EncodeSettings:
    """How the restored frames are encoded."""

    codec: str = "libx264"
    """An FFmpeg encoder."""
    crf: float | None = 18
    """Constant quality for x264, x265, SVT-AV1 and VP9, lower is better; others ignore it."""
    preset: str | None = None
    """Speed for encoders that have presets; None is medium for x264 and x265."""
    pix_fmt: str | None = None
    """None keeps the source's format, or the nearest one that the encoder takes."""
    options: dict[str, str] = field(default_factory=dict)
    """FFmpeg encoder options; they win over crf and preset."""


def default_settings(path: str | Path, info: StreamInfo) -> EncodeSettings:
    """Settings for a file of this name: VP9 for WebM, else the first of x264 and x265 that fits."""
    if Path(path).suffix.lower() == ".webm":
        options = {"b": "0", "row-mt": "1", "cpu-used": "2"}
        return EncodeSettings("libvpx-vp9", crf=24, options=options)
    name = info.pixel_format.name
    codecs = ("libx264", "libx265")
    keeps = (c for c in codecs if not _nearest_format(_video_codec(c), name)[1])
    return EncodeSettings(next(keeps, "libx264"))


def _video_codec(name: str) -> Any:
    try:
        codec = av.Codec(name, "w")
    except av.codec.codec.UnknownCodecError as error:
        raise ConfigError(f"codec {name!r} is unknown; try libx264, libx265 or ffv1") from error
    if codec.type != "video":
        raise ConfigError(f"codec {name!r} is for {codec.type}; try libx264, libx265 or ffv1")
    return codec


def _software_formats(codec: Any) -> list[Any]:
    formats = codec.video_formats or []
    return [f for f in formats if f.components and not any(c.is_alpha for c in f.components)]


def _nearest_format(codec: Any, name: str) -> tuple[str, PixFmtLoss]:
    formats = _software_formats(codec)
    if not formats or name in (f.name for f in formats):
        return name, PixFmtLoss.NONE
    if name == "gray":
        # Gray is exact as the luma of any 8-bit YUV; FFmpeg counts the range as a loss.
        luma = next((f.name for f in formats if f.name == "yuv420p"), None)
        if luma is not None:
            return luma, PixFmtLoss.NONE
    best, loss = find_best_pix_fmt_of_list(formats, name)
    assert best is not None
    known = PixFmtLoss.RESOLUTION | PixFmtLoss.DEPTH | PixFmtLoss.COLORSPACE | PixFmtLoss.CHROMA
    return best.name, PixFmtLoss(int(loss) & int(known))


def plan_format(settings: EncodeSettings, source: PixelFormat, warnings: list[str]) -> Any:
    """The VideoFormat to encode; what differs from the source goes to `warnings`.

    Raises ConfigError for an unknown codec or a format that it does not take.
    """
    codec = _video_codec(settings.codec)
    if settings.pix_fmt is None:
        name, loss = _nearest_format(codec, source.name)
        if name != source.name:
            lost = f", losing {loss.name}" if loss else " without loss"
            warnings.append(f"{settings.codec} does not take {source.name}: encoding {name}{lost}")
        return av.VideoFormat(name)
    names = [f.name for f in _software_formats(codec)]
    if names and settings.pix_fmt not in names:
        raise ConfigError(
            f"{settings.codec} does not take pixel format {settings.pix_fmt!r}; use one of "
            + " ".join(names)
        )
    try:
        return av.VideoFormat(settings.pix_fmt)
    except ValueError as error:
        raise ConfigError(f"pixel format {settings.pix_fmt!r} is unknown") from error


def add_video(
    output: Any, path: object, settings: EncodeSettings, info: StreamInfo, target: Any, threads: int
) -> Any:
    """A new stream of `output` with its encoder open; `path` is for messages.

    The same arguments give the same encoder, so that every segment fits under one header. Raises
    ConfigError for settings that the encoder or the container refuses.
    """
    # SVT-AV1 prints 20 lines each time that it opens, unless told so.
    os.environ.setdefault("SVT_LOG", "1")
    try:
        stream = output.add_stream(settings.codec, rate=info.frame_rate)
    except ValueError as error:
        raise ConfigError(
            f"{path}: this container cannot hold {settings.codec}; use .mkv or another codec"
        ) from error
    context = stream.codec_context
    stream.width, stream.height = info.width, info.height
    # Both, or the muxer resamples the pts to the frame rate.
    stream.time_base = context.time_base = info.time_base
    context.thread_count = threads
    tag_encoder(context, info, target)
    if info.rotation:
        stream.set_display_rotation(info.rotation)
    context.options = encoder_options(settings, info, target)
    try:
        context.open()
    except (av.FFmpegError, ValueError) as error:
        raise ConfigError(
            f"{path}: {settings.codec} does not open with preset {settings.preset}, "
            f"crf {settings.crf}, {target.name}, options {settings.options} "
            f"({getattr(error, 'strerror', error)}); check them"
        ) from error
    if context.options:
        raise ConfigError(
            f"{path}: {settings.codec} has no option {' '.join(context.options)}; remove it"
        )
    return stream


def encoder_options(settings: EncodeSettings, info: StreamInfo, target: Any) -> dict[str, str]:
    """FFmpeg's options for the encoder. Raises ConfigError for a crf out of range."""
    options: dict[str, str] = {}
    preset = settings.preset or _DEFAULT_PRESETS.get(settings.codec)
    if preset is not None:
        options["preset"] = preset
    most = _CRF_MAX.get(settings.codec)
    if settings.crf is not None and most is not None and "qp" not in settings.options:
        if not 0 <= settings.crf <= most:
            raise ConfigError(f"crf {settings.crf} is outside 0 to {most} for {settings.codec}")
        options["crf"] = f"{settings.crf:g}"
    site = info.pixel_format.chroma_location
    if site != "left" and any(c.width < 2 for c in av.VideoFormat(target.name, 2, 2).components):
        options["chroma_sample_location"] = site
    if settings.codec == "libx265":
        options["x265-params"] = "log-level=error"
    params = settings.options.get("x265-params")
    merged = {"x265-params": f"log-level=error:{params}"} if params else {}
    return options | settings.options | merged


def tag_encoder(context: Any, info: StreamInfo, target: Any) -> None:
    """Set format, colour tags and sample aspect ratio on an unopened encoder."""
    source = info.pixel_format
    context.pix_fmt = target.name
    context.color_primaries = info.color_primaries
    context.color_trc = info.color_trc
    context.colorspace = info.colorspace
    # Untagged gray is full range here and in FFmpeg, yet read back from H.264 it is limited YUV.
    context.color_range = info.color_range or (_FULL if source.full_range else 0)
    if source.n_planes == 1 and len(target.components) > 1:
        context.color_range = _FULL if source.full_range else _LIMITED
    elif target.is_rgb != (source.matrix == "rgb") and source.n_planes > 1:
        context.colorspace = 0 if target.is_rgb else _MATRIX_TAGS["bt709"]
        context.color_range = _FULL if target.is_rgb else _LIMITED
    if info.sample_aspect_ratio is not None:
        context.sample_aspect_ratio = info.sample_aspect_ratio


def to_picture(frame: Frame, info: StreamInfo, target: Any) -> Any:
    """An av.VideoFrame in the encoder's format, with the planes' padding filled in."""
    source = info.pixel_format
    planes = list(frame.planes)
    name = source.name
    if source.name == "gray" and target.name == "yuv420p":
        chroma = (-(-info.height // 2), -(-info.width // 2))
        planes += [np.full(chroma, 128, np.uint8)] * 2
        name = target.name
    picture = av.VideoFrame(info.width, info.height, name)
    for plane, samples in zip(picture.planes, planes, strict=True):
        _fill_plane(plane, samples)
    if name == target.name:
        return picture
    return _converted(picture, source, target)


def _fill_plane(plane: Any, samples: Any) -> None:
    rows = np.frombuffer(plane, np.uint8)[: plane.line_size * samples.shape[0]]
    data = np.ascontiguousarray(samples, samples.dtype.newbyteorder("<")).view(np.uint8)
    rows.reshape(-1, plane.line_size)[:, : data.shape[1]] = data


def _converted(picture: Any, source: PixelFormat, target: Any) -> Any:
    full = _FULL if source.full_range else _LIMITED
    matrix = _SWS_MATRICES.get(source.matrix, "ITU709")
    target_full = full
    if target.is_rgb != (source.matrix == "rgb"):
        target_full = _FULL if target.is_rgb else _LIMITED
    return picture.reformat(
        format=target.name,
        src_colorspace=matrix,
        dst_colorspace=matrix,
        src_color_range=full,
        dst_color_range=target_full,
    )

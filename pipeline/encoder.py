"""Owns what is asked of an encoder: settings, pixel format, options, tags. Knows no file."""

import contextlib
import io
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import av
from av.codec.codec import PixFmtLoss, find_best_pix_fmt_of_list

from pipeline.errors import ConfigError, SinkError
from pipeline.frames import Frame, PixelFormat, StreamInfo
from pipeline.hdr import hdr_parameters
from pipeline.pictures import as_luma, colour_tags, to_picture
from pipeline.quality import Quality, quality_options

_DEFAULT_PRESETS = {"libx264": "medium", "libx264rgb": "medium", "libx265": "medium"}
BT601_ALONE = ("libvpx", "mjpeg")
"""Encoders that can say no other matrix, whatever they are told."""
_NO_ODD_SIZES = ("libx264", "libx265")
_HARDWARE = ("_amf", "_mf", "_nvenc", "_qsv", "_v4l2m2m", "_vaapi", "_videotoolbox", "_vulkan")


@dataclass(frozen=True, slots=True)
class EncodeSettings:
    """How the restored frames are encoded."""

    codec: str = "libx264"
    """An FFmpeg encoder."""
    crf: float | None = None
    """Constant quality for x264, x265, SVT-AV1 and VP9, lower is better; instead of `quality`."""
    preset: str | None = None
    """Speed for encoders that have presets; None is medium for x264 and x265."""
    pix_fmt: str | None = None
    """None keeps the source's format, or the nearest one that the encoder takes."""
    options: dict[str, str] = field(default_factory=dict)
    """FFmpeg encoder options; they win over crf, quality and preset."""
    quality: Quality | None = None
    """None: visually-lossless where the encoder has such levels (quality.py)."""
    threads: int = 0
    """Of the encoder, whose bytes depend on them; 0: FFmpeg counts the machine's cores."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """How every segment of one output is encoded, in whatever process on whatever machine."""

    path: Path
    """Of the output: for messages."""
    container: str
    """FFmpeg's muxer: what an encoder is told depends on its kind."""
    settings: EncodeSettings
    info: StreamInfo
    pix_fmt: str
    shift: int
    """Ticks that are taken off every pts."""
    extradata: bytes
    """What the output's header holds: every segment must fit under it."""

    def open(self) -> Any:
        """A fresh encoder. Raises SinkError where it does not fit under the output's header."""
        # A container that is never written: what `add_stream` sets depends on its kind.
        nowhere = av.open(io.BytesIO(), "w", format=self.container)
        target = av.VideoFormat(self.pix_fmt)
        stream = add_video(nowhere, self.path, self.settings, self.info, target)
        # PyAV's container, streams and encoders refer to one another: unclosed, each segment's
        # encoder, tens of megabytes outside Python, would wait for the garbage collector.
        nowhere.close()
        if bytes(stream.codec_context.extradata or b"") != self.extradata:
            raise SinkError(
                f"{self.path}: {self.settings.codec} gives each segment another header; use "
                "another codec, and the same FFmpeg on every machine"
            )
        return stream.codec_context

    def picture(self, frame: Frame) -> Any:
        """The frame as the encoder takes it."""
        picture = to_picture(frame, self.info, av.VideoFormat(self.pix_fmt))
        picture.pts = frame.pts - self.shift
        picture.time_base = self.info.time_base
        picture.duration = frame.duration
        picture.pict_type = 0  # NONE: the encoder chooses
        return picture


def default_settings(path: str | Path, info: StreamInfo) -> EncodeSettings:
    """Settings for a file of this name: the first of two encoders that loses no bit depth.

    VP9 and AV1 for WebM (FFmpeg's libvpx may be built for 8 bits alone) and for odd sizes, else
    x264 and x265.
    """
    name = info.pixel_format.name
    open_codecs = Path(path).suffix.lower() == ".webm" or _is_odd(info, info.pixel_format)
    codecs = ("libvpx-vp9", "libsvtav1") if open_codecs else ("libx264", "libx265")
    keeps = (c for c in codecs if not _nearest_format(_software_formats(_video_codec(c)), name)[1])
    codec = next(keeps, codecs[0])
    options = {"row-mt": "1", "cpu-used": "2"} if codec == "libvpx-vp9" else {}
    return EncodeSettings(codec, options=options)


def _is_odd(info: StreamInfo, layout: PixelFormat) -> bool:
    """Whether a chroma sample at the border belongs to fewer pixels than the others."""
    return bool(
        info.width % (1 << layout.log2_chroma_w) or info.height % (1 << layout.log2_chroma_h)
    )


def encoder_name(name: str) -> str:
    """FFmpeg's encoder for a name that may be that of a codec: libx264 for h264."""
    return str(_video_codec(name).name)


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


def _nearest_format(formats: list[Any], name: str) -> tuple[str, PixFmtLoss]:
    if not formats or name in (f.name for f in formats):
        return name, PixFmtLoss.NONE
    if as_luma(name) in (f.name for f in formats):
        # FFmpeg counts the range as a loss.
        return as_luma(name), PixFmtLoss.NONE
    best, loss = find_best_pix_fmt_of_list(formats, name)
    assert best is not None
    known = PixFmtLoss.RESOLUTION | PixFmtLoss.DEPTH | PixFmtLoss.COLORSPACE | PixFmtLoss.CHROMA
    return best.name, PixFmtLoss(int(loss) & int(known))


def plan_format(settings: EncodeSettings, source: PixelFormat, warnings: list[str]) -> Any:
    """The VideoFormat to encode; what differs from the source goes to `warnings`.

    Raises ConfigError for an unknown codec or a format that it does not take.
    """
    codec = _video_codec(settings.codec)
    if codec.name in BT601_ALONE and source.matrix not in ("bt601", "rgb"):
        warnings.append(
            f"{codec.name} can say no other matrix than BT.601: players will show {source.matrix} "
            "in wrong colours; use another codec"
        )
    if settings.pix_fmt is None:
        name, loss = _nearest_format(_software_formats(codec), source.name)
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
        asked = av.VideoFormat(settings.pix_fmt)
    except ValueError as error:
        raise ConfigError(f"pixel format {settings.pix_fmt!r} is unknown") from error
    _, loss = _nearest_format([asked], source.name)
    if loss:
        warnings.append(f"{asked.name} was asked for: {source.name} loses {loss.name} in it")
    return asked


def add_video(
    output: Any, path: object, settings: EncodeSettings, info: StreamInfo, target: Any
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
        raise ConfigError(f"{path}: {cannot_hold(path, settings.codec)}") from error
    context = stream.codec_context
    stream.width, stream.height = info.width, info.height
    # Both, or the muxer resamples the pts to the frame rate.
    stream.time_base = context.time_base = info.time_base
    context.thread_count = settings.threads
    tag_encoder(context, info, target)
    if info.display_matrix is not None:
        stream.set_display_matrix(info.display_matrix)
    if context.codec.canonical_name == "hevc" and output.format.name in ("mp4", "mov"):
        context.codec_tag = "hvc1"  # Apple's players take no hev1, which is FFmpeg's choice
    context.options = options = encoder_options(settings, info, target)
    try:
        context.open()
    except (av.FFmpegError, ValueError) as error:
        cause = getattr(error, "strerror", error)
        if settings.codec.endswith(_HARDWARE):
            raise ConfigError(
                f"{path}: {settings.codec} needs hardware and a driver that are not there or "
                f"refuse ({cause}); use libx264, libx265 or libsvtav1"
            ) from error
        if settings.codec in _NO_ODD_SIZES and _is_odd(info, info.pixel_format):
            raise ConfigError(
                f"{path}: {settings.codec} takes no {info.width}x{info.height} pictures in "
                f"{target.name}; use libvpx-vp9, libsvtav1 or ffv1"
            ) from error
        said = " ".join(f"{name}={value}" for name, value in options.items())
        raise ConfigError(
            f"{path}: {settings.codec} does not open with {target.name} and {said or 'no options'} "
            f"({cause}); check them"
        ) from error
    if context.options:
        raise ConfigError(
            f"{path}: {settings.codec} has no option {' '.join(context.options)}; remove it"
        )
    return stream


def cannot_hold(path: object, codec: str) -> str:
    """What to say where a container refuses a video codec, and what to do."""
    if not isinstance(path, Path):
        return f"what it takes cannot hold {codec}; use another codec"
    other = "" if path.suffix.lower() == ".mkv" else ".mkv or "
    return f"{path.suffix} cannot hold {codec}; use {other}another codec"


def encoder_options(settings: EncodeSettings, info: StreamInfo, target: Any) -> dict[str, str]:
    """FFmpeg's options for the encoder. Raises ConfigError for a crf out of range."""
    options: dict[str, str] = {}
    preset = settings.preset or _DEFAULT_PRESETS.get(settings.codec)
    if preset is not None:
        options["preset"] = preset
    codec = _video_codec(settings.codec)
    options |= quality_options(codec, target, settings.quality, settings.crf, settings.options)
    site = info.pixel_format.chroma_location
    if site != "left" and any(c.width < 2 for c in av.VideoFormat(target.name, 2, 2).components):
        options["chroma_sample_location"] = site
    if settings.codec == "ffv1" and _breaks_slices(info):
        options["level"] = "1"
    if settings.codec == "libx265":
        # Its info would say in the header what processor and how many threads encoded: another
        # header on every kind of machine, and segments of one file come from all of them.
        options["x265-params"] = "log-level=error:info=0"
    if settings.codec == "mjpeg":
        options["strict"] = "unofficial"  # limited range, which every player knows
    if settings.codec in ("libx264", "libx264rgb") and _has_avx512():
        options["x264-params"] = "asm=avx2"
    if (hdr := hdr_parameters(settings.codec, info)) is not None:
        name, parameters = hdr
        options[name] = ":".join(filter(None, (options.get(name), parameters)))
    # The last of two parameters of one name counts: the user's.
    merged = {
        name: f"{ours}:{settings.options[name]}"
        for name, ours in options.items()
        if name.endswith("-params") and name in settings.options
    }
    return options | settings.options | merged


@cache
def _has_avx512() -> bool:
    """Whether x264 would use AVX-512, whose macroblock tree reads memory that nothing wrote.

    With it (PyAV 18.1's wheel) the same frames of some sizes, 320x192 for one, give other bytes
    each time; with AVX2, which every such processor has, the same. Resuming needs the same.
    """
    with contextlib.suppress(OSError):
        return " avx512bw" in Path("/proc/cpuinfo").read_text()
    return False


def _breaks_slices(info: StreamInfo) -> bool:
    """Whether FFmpeg's FFV1 (8.1, level 3) would lose samples of such a picture, or not open.

    Where its slices meet within one chroma sample of 4:1:1 or 4:1:0, it leaves out the last chroma
    column; it finds no slices at all for 3 rows of 4:2:0. Level 1 has no slices, and no threads.
    """
    widest = max(info.pixel_format.log2_chroma_w, info.pixel_format.log2_chroma_h)
    return (widest > 1 and bool(info.width % 4 or info.height % 4)) or info.height < 8


def tag_encoder(context: Any, info: StreamInfo, target: Any) -> None:
    """Set format, colour tags and sample aspect ratio on an unopened encoder."""
    context.pix_fmt = target.name
    for name, value in colour_tags(info, target).items():
        setattr(context, name, value)
    if info.sample_aspect_ratio is not None:
        context.sample_aspect_ratio = info.sample_aspect_ratio

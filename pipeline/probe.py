"""Owns what is known of a file before its frames are decoded: streams, formats. Decodes nothing."""

import io
import os
import re
import struct
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.codec.hwaccel import HWAccel
from av.sidedata.sidedata import Type

from pipeline.alpha import WITHOUT_ALPHA, has_alpha
from pipeline.errors import SourceError
from pipeline.frames import ChromaLocation, Matrix, PixelFormat, StreamInfo
from pipeline.hdr import read_hdr
from pipeline.side_data import side_data_of

_PLANAR = re.compile(r"(gray|gbrp|yuv(410|411|420|422|440|444)p)(9|10|12|14|16)?(?:le)?")
_LOG2_CHROMA = {
    "410": (2, 2), "411": (2, 0), "420": (1, 1), "422": (1, 0), "440": (0, 1), "444": (0, 0),
}  # fmt: skip
# swscale moves these into planes without changing a sample (a test holds each of them).
_TO_PLANAR = {
    "nv12": "yuv420p", "nv21": "yuv420p", "nv16": "yuv422p", "nv24": "yuv444p", "nv42": "yuv444p",
    "nv20le": "yuv422p10le", "p010le": "yuv420p10le", "p012le": "yuv420p12le",
    "p016le": "yuv420p16le", "p210le": "yuv422p10le", "p216le": "yuv422p16le",
    "p410le": "yuv444p10le", "y210le": "yuv422p10le", "xv30le": "yuv444p10le",
    "v30xle": "yuv444p10le", "vuyx": "yuv444p", "vyu444": "yuv444p",
    "yuyv422": "yuv422p", "uyvy422": "yuv422p", "yvyu422": "yuv422p",
    "rgb24": "gbrp", "bgr24": "gbrp", "rgb0": "gbrp", "bgr0": "gbrp", "0rgb": "gbrp",
    "0bgr": "gbrp", "pal8": "gbrp", "rgb48le": "gbrp16le", "bgr48le": "gbrp16le",
    "rgb48be": "gbrp16le", "bgr48be": "gbrp16le", "x2rgb10le": "gbrp10le",
}  # fmt: skip
_MATRICES: dict[int, Matrix] = {
    1: "bt709", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m", 8: "ycgco", 9: "bt2020",
    10: "bt2020", 14: "bt2020",
}  # fmt: skip
_HALF = 2
_SITES: dict[tuple[int, int], ChromaLocation] = {
    (1, 1): "topleft", (1, 2): "left", (2, 1): "top", (2, 2): "center",
}  # fmt: skip
_SEGMENT, _HEAD_BYTES = b"\x18\x53\x80\x67", 4096  # the element that is the file, and where
_FULL = 2  # AVCOL_RANGE_JPEG


MAX_PIXELS = 1 << 27
"""Of one picture, unless the user says otherwise: 16K is a little less."""
STALL_SECONDS = 60.0
"""How long a read may take, unless the user says otherwise."""
# Formats whose files name other files. FFmpeg opens those by itself, so that restoring one file
# would read others; the network is out of reach of all in any case.
_LISTS = {"hls", "concat", "dash", "sdp", "rtsp", "imf"}


def every_packet(
    container: Any, streams: Any, on_late: Callable[[], None] = lambda: None
) -> Iterator[Any]:
    """The packets of `streams`, then an empty one of each.

    Those of a stream that begins within the file are not among them: `on_late` says that there is
    one. PyAV 18.1 knows the streams that there were at opening, and flushes as many as FFmpeg knows
    by the end: an IndexError, after all that there was (av/container/input.py, demux).
    """
    try:
        yield from container.demux(streams)
    except IndexError:
        on_late()


def open_container(
    path: Path,
    stall_seconds: float = STALL_SECONDS,
    max_pixels: int | None = None,
    hwaccel: str | None = None,
    thorough: bool = False,
) -> Any:
    """Open a local regular file for demuxing, without network access. Raises SourceError.

    Pictures of more than `max_pixels` are refused; None is for a file that has passed already.
    `thorough` looks for streams in the first minute instead of the first seconds.
    """
    try:
        # A FIFO or a device would block for ever or never end.
        if not path.is_file():
            if path.exists() and not path.is_dir():
                raise SourceError(f"{path}: is a pipe or device; save what it gives to a file")
            cause = "is a directory" if path.is_dir() else "no such file"
            raise SourceError(f"{path}: {cause}; name a video file")
        if path.stat().st_size == 0:
            raise SourceError(f"{path}: the file is empty; get a complete copy")
        # "file:" keeps a colon in the name from being read as a protocol, and the whitelist keeps
        # a playlist named .mp4 from opening connections.
        url = f"file:{path}"
        container = av.open(
            url, "r", metadata_errors="replace",
            container_options=_LOCAL_ONLY | (_THOROUGH if thorough else {}),
            options={"max_pixels": str(max_pixels)} if max_pixels else {},
            timeout=(stall_seconds, stall_seconds),
            hwaccel=HWAccel(hwaccel, allow_software_fallback=False) if hwaccel else None,
        )  # fmt: skip
    except av.FFmpegError as error:
        raise SourceError(f"{path}: {_open_cause(path, error)}") from error
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}; check its permissions") from error
    if _LISTS & set(container.format.name.split(",")):
        container.close()
        raise SourceError(f"{path}: is a list of other files; name the video file itself")
    known = [s for s in container.streams.video if s.codec_context is not None]
    too_large = next((s for s in known if s.width * s.height > (max_pixels or sys.maxsize)), None)
    if too_large is not None:
        size = f"{too_large.width}x{too_large.height}"
        container.close()
        raise SourceError(
            f"{path}: its pictures are {size}, more than {max_pixels} pixels; allow it with "
            "--max-pixels if the file is to be trusted"
        )
    if container.format.name == "tty":
        container.close()
        raise SourceError(f"{path}: is a text file; name a video file")
    return container


_LOCAL_ONLY = {"protocol_whitelist": "file"}
_THOROUGH = {"analyzeduration": str(60 * av.time_base), "probesize": str(200 << 20)}


def pick_video_stream(container: Any, path: object) -> Any:
    """The stream that is restored: the default one, else the largest; never cover art."""
    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover]
    if not streams:
        container.close()
        raise SourceError(f"{path}: holds no video stream; name a file with video")
    usable = [s for s in streams if s.codec_context is not None]
    if not usable:
        container.close()
        raise SourceError(f"{path}: no decoder for its video; convert it with FFmpeg first")
    default = av.stream.Disposition.default
    return max(usable, key=lambda s: (bool(s.disposition & default), s.width * s.height, -s.index))


def _open_cause(path: Path, error: av.FFmpegError) -> str:
    if isinstance(error, av.PermissionError) and os.access(path, os.R_OK):
        return "refers to other files or to the network; name the video file itself"
    if not isinstance(error, av.InvalidDataError):
        return f"{cause_of(error)}; check the file and its permissions"
    with path.open("rb") as file:
        head = file.read(12)
    if head[4:8] in (b"ftyp", b"mdat", b"wide", b"free"):
        return "its index (moov) is missing, the recording was interrupted; get a complete copy"
    return "is not a video file that FFmpeg can read; check what it is"


def cause_of(error: av.FFmpegError) -> str:
    """FFmpeg's reason in one line."""
    if isinstance(error, av.error.ExitError):
        return "no data in time"
    return str(error.strerror or error).splitlines()[0]


def file_start(container: Any) -> Fraction:
    """The time, in seconds, that a trim counts from."""
    start = Fraction(container.start_time or 0, av.time_base)
    if container.format.name in ("mpegts", "mpeg"):
        return start  # whose clock may run over its end
    # Elsewhere below zero lies only the priming of audio codecs, which no player shows.
    return max(start, Fraction(0))


def declared_packets(container: Any, stream: Any) -> int:
    """How many packets the container says that the stream has; 0 when it does not say."""
    # The mp4 demuxer reads a whole index, already cut by the edit list; `frames` is not.
    if "mp4" in container.format.name:
        return len(stream.index_entries)
    return int(stream.frames)


def declared_end(stream: Any) -> Fraction | None:
    """When the stream says that its last frame ends, in seconds, or None.

    Only Matroska's tag: `stream.duration` is a guess from the bit rate in some containers.
    """
    match = re.match(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if match is None:
        return None
    return int(match[1]) * 3600 + int(match[2]) * 60 + Fraction(match[3])


def missing_bytes(path: Path, container: Any, stream: Any) -> int:
    """How many bytes at its end the file lacks by its own account; 0 where it gives none.

    The index of an mp4 and the header of a Matroska file tell before a frame is decoded; that of an
    AVI may be wrong.
    """
    size = path.stat().st_size
    name = container.format.name
    if "mp4" in name:
        entries = stream.index_entries
        return max(max((entry.pos + entry.size for entry in entries), default=0) - size, 0)
    if name == "avi":
        return _missing_of_riff(path, size)
    if "matroska" not in name:
        return 0
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    at = head.find(_SEGMENT) + len(_SEGMENT)
    # The length's own length is the number of zero bits that it begins with; all ones: unknown,
    # as in a recording that was never finished.
    width = 9 - head[at].bit_length() if _SEGMENT in head[:-9] else 9
    if width > 8:
        return 0
    length = int.from_bytes(head[at : at + width]) & ((1 << 7 * width) - 1)
    unknown = length == (1 << 7 * width) - 1
    return 0 if unknown else max(at + width + length - size, 0)


def _missing_of_riff(path: Path, size: int) -> int:
    """A large AVI is several RIFF chunks, one after the other."""
    at, end = 0, 0
    with path.open("rb") as file:
        while at + 8 <= size:
            file.seek(at)
            head = file.read(8)
            if head[:4] != b"RIFF":
                break
            end = at + 8 + int.from_bytes(head[4:], "little")
            at = end + end % 2
    return max(end - size, 0)


def read_stream_info(container: Any, stream: Any, picture: Any, path: object) -> StreamInfo:
    """What the stream and its first decoded picture say. Raises SourceError for odd formats."""
    # VP8 and VP9 keep it beside their pictures, where FFmpeg's own decoders do not look.
    if stream.metadata.get("alpha_mode") == "1":
        raise transparent(path, stream.codec_context.name)
    rate, guessed = stream.average_rate or stream.guessed_rate, stream.guessed_rate
    if rate and guessed and rate > 2 * guessed:
        rate = guessed  # a raw .dv has 60000 frames a second on average
    sar = stream.sample_aspect_ratio
    full = picture.format.name.startswith("yuvj")
    seconds = None
    if stream.duration:
        seconds = float(stream.duration * stream.time_base)
    elif container.duration:
        seconds = container.duration / av.time_base
    mastering_display, content_light = read_hdr(picture)
    return StreamInfo(
        width=picture.width,
        height=picture.height,
        time_base=Fraction(stream.time_base),
        frame_rate=Fraction(rate) if rate else None,
        pixel_format=_pixel_format(stream, picture, path),
        sample_aspect_ratio=Fraction(sar) if sar else None,
        rotation=picture.rotation,
        display_matrix=_display_matrix(picture),
        n_frames=stream.frames or None,
        duration_seconds=seconds,
        color_primaries=int(picture.color_primaries),
        color_trc=int(picture.color_trc),
        colorspace=int(picture.colorspace),
        color_range=_FULL if full else int(picture.color_range),
        mastering_display=mastering_display,
        content_light=content_light,
        metadata=dict(stream.metadata),
        start_pts=picture.pts or 0,
    )


def _display_matrix(picture: Any) -> tuple[int, ...] | None:
    data = bytes(side_data_of(picture).get(Type.DISPLAYMATRIX, b""))
    return struct.unpack_from("=9i", data) if len(data) >= 36 else None


def _pixel_format(stream: Any, picture: Any, path: object) -> PixelFormat:
    coded = picture.format.name
    name = _planar_name(picture.format, path)
    match = _PLANAR.fullmatch(name)
    assert match is not None
    kind, subsampling, depth = match.groups()
    log2_w, log2_h = _LOG2_CHROMA.get(subsampling, (0, 0))
    full_unless_tagged = kind in ("gray", "gbrp") or coded.startswith("yuvj")
    tagged = int(picture.color_range)
    return PixelFormat(
        name=name,
        n_planes=1 if kind == "gray" else 3,
        log2_chroma_w=log2_w,
        log2_chroma_h=log2_h,
        bit_depth=int(depth or 8),
        matrix="rgb" if kind == "gbrp" else _matrix(int(picture.colorspace), picture.height),
        full_range=tagged == _FULL if tagged else full_unless_tagged,
        chroma_location=_chroma_location(stream, log2_h) if log2_w or log2_h else "left",
    )


def _matrix(colorspace: int, height: int) -> Matrix:
    # Untagged video: every player guesses by size, SD as BT.601 and anything larger as BT.709.
    return _MATRICES.get(colorspace, "bt601" if height <= 576 else "bt709")


def _planar_name(pixel_format: Any, path: object) -> str:
    """FFmpeg's name of the little-endian planar format that holds the same samples."""
    name: str = pixel_format.name
    if name in WITHOUT_ALPHA:
        return WITHOUT_ALPHA[name]
    if has_alpha(pixel_format):
        raise transparent(path, name)
    name = name.replace("yuvj", "yuv").removesuffix("be")
    if name != pixel_format.name.replace("yuvj", "yuv"):
        name += "le"
    name = _TO_PLANAR.get(pixel_format.name, name)
    if _PLANAR.fullmatch(name) is None:
        raise SourceError(
            f"{path}: pixel format {name} is not supported; convert it to yuv444p16le"
        )
    return name


def transparent(path: object, what: str) -> SourceError:
    """For what an output could not show."""
    return SourceError(f"{path}: {what} has transparency, which is not kept; flatten it first")


def _chroma_location(stream: Any, log2_h: int) -> ChromaLocation:
    """Where the stream says that its chroma samples lie; `left` when it does not.

    With chroma in every row (4:2:2), as MPEG-2 tags it, top left is left.
    PyAV does not expose it. FFmpeg's Matroska muxer writes it into its header (ChromaSitingHorz,
    ChromaSitingVert: 1 is left or top, 2 is half), so a header into memory tells.
    """
    buffer = io.BytesIO()
    try:
        with av.open(buffer, "w", format="matroska") as output:
            output.add_stream_from_template(stream, opaque=True)
            output.start_encoding()
    except (av.FFmpegError, ValueError):
        return "left"
    header = buffer.getvalue()
    x, y = header.find(b"\x55\xb7\x81"), header.find(b"\x55\xb8\x81")
    if x < 0 or y < 0:
        return "left"
    return _SITES.get((header[x + 3], header[y + 3] if log2_h else _HALF), "left")

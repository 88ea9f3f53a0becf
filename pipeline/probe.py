"""Owns what a stream and its first picture say: size, rate, tags, pixel format. Decodes nothing."""

import io
import re
import struct
from fractions import Fraction
from typing import Any

import av
from av.sidedata.sidedata import Type

from pipeline.alpha import WITHOUT_ALPHA, has_alpha, transparent
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
_FULL = 2  # AVCOL_RANGE_JPEG


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

"""Owns the way from a Frame's planes to an encoder's picture with its tags: planes.py backwards.

Knows no encoder, only the format that one takes.
"""

from typing import Any

import av
import numpy as np

from pipeline.frames import Frame, Matrix, PixelFormat, StreamInfo

_SWS_MATRICES: dict[Matrix, str] = {
    "bt601": "ITU601", "bt709": "ITU709", "fcc": "FCC", "smpte240m": "SMPTE240M",
    "bt2020": "BT2020",
}  # fmt: skip
_MATRIX_TAGS: dict[Matrix, int] = {
    "rgb": 0, "bt709": 1, "fcc": 4, "bt601": 6, "smpte240m": 7, "ycgco": 8, "bt2020": 9,
}  # fmt: skip
_LIMITED, _FULL = 1, 2


def to_picture(frame: Frame, info: StreamInfo, target: Any) -> Any:
    """An av.VideoFrame in the encoder's format, with the planes' padding filled in."""
    source = info.pixel_format
    planes = list(frame.planes)
    name = source.name
    if source.n_planes == 1 and target.name == as_luma(name):
        chroma = (-(-info.height // 2), -(-info.width // 2))
        planes += [np.full(chroma, 1 << (source.bit_depth - 1), source.dtype)] * 2
        name = target.name
    picture = av.VideoFrame(info.width, info.height, name)
    for plane, samples in zip(picture.planes, planes, strict=True):
        _fill_plane(plane, samples)
    if name != target.name:
        picture = _converted(picture, source, target)
    # ProRes tags every picture as the picture says, whatever its encoder was told.
    for tag, value in colour_tags(info, target).items():
        setattr(picture, tag, value)
    return picture


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


def from_rgb(picture: Any, info: StreamInfo) -> Any:
    """An RGB picture scaled to the stream's size, in its pixel format, matrix and range."""
    source = info.pixel_format
    return picture.reformat(
        width=info.width,
        height=info.height,
        format=source.name,
        dst_colorspace=_SWS_MATRICES.get(source.matrix, "ITU709"),
        src_color_range=_FULL,
        dst_color_range=_FULL if source.full_range else _LIMITED,
    )


def colour_tags(info: StreamInfo, target: Any) -> dict[str, int]:
    """The colour tags, as FFmpeg's numbers, of the stream's pictures in the format `target`."""
    source = info.pixel_format
    colorspace = info.colorspace
    # Untagged gray is full range here and in FFmpeg, yet read back from H.264 it is limited YUV.
    color_range = info.color_range or (_FULL if source.full_range else 0)
    if source.n_planes == 1 and len(target.components) > 1:
        color_range = _FULL if source.full_range else _LIMITED
    elif target.is_rgb != (source.matrix == "rgb") and source.n_planes > 1:
        colorspace = 0 if target.is_rgb else _MATRIX_TAGS["bt709"]
        color_range = _FULL if target.is_rgb else _LIMITED
    return {
        "color_primaries": info.color_primaries, "color_trc": info.color_trc,
        "colorspace": colorspace, "color_range": color_range,
    }  # fmt: skip


def as_luma(name: str) -> str:
    """The YUV whose luma holds a gray format's samples; the name itself of any other."""
    return name.replace("gray", "yuv420p")

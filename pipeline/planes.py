"""Owns the way from a decoder's picture to the planes of a Frame: copies, no sample changed."""

from typing import Any

import numpy as np

from pipeline.errors import SourceError
from pipeline.frames import Plane, StreamInfo


def planes_of(picture: Any, info: StreamInfo, source: object) -> tuple[Plane, ...]:
    """Read-only copies of a decoded picture's planes, as `info` has them; `source` for messages."""
    picture = as_planar(picture, info.pixel_format.name)
    shapes = info.pixel_format.plane_shapes(info.width, info.height)
    planes = zip(picture.planes, shapes, strict=True)
    return tuple(_copy_plane(p, s, info.pixel_format.dtype, source) for p, s in planes)


def as_planar(picture: Any, name: str) -> Any:
    """The picture itself, or its samples moved into the planes of the format `name`."""
    if picture.format.name.replace("yuvj", "yuv") == name:
        return picture
    if picture.format.name == "pal8":
        # Straight to gbrp swscale would go through YUV; the palette look-up is exact.
        picture = picture.reformat(format="rgb24")
    return picture.reformat(format=name)


def _copy_plane(plane: Any, shape: tuple[int, int], dtype: type[Any], source: object) -> Plane:
    if plane.line_size < 0:
        raise SourceError(f"{source}: raw video stored bottom-up; convert it with FFmpeg first")
    height, width = shape
    size = np.dtype(dtype).itemsize
    rows = np.frombuffer(plane, np.uint8)[: height * plane.line_size]
    padded = rows.reshape(height, plane.line_size)[:, : width * size]
    copy = padded.copy().view(np.dtype(dtype).newbyteorder("<"))
    copy.flags.writeable = False
    return copy

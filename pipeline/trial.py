"""Owns the trial that tells, before anything is restored, which tags an output will not keep.

What an encoder writes into its stream and a muxer into its header differs from codec to codec and
from version to version: one picture is encoded, muxed into memory and read back.
"""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np

from pipeline.encoder import BT601_ALONE, EncodeSettings, add_video
from pipeline.errors import ConfigError, RestoreError
from pipeline.frames import Frame, StreamInfo
from pipeline.matroska import MATROSKA, fill_room, make_room
from pipeline.pictures import to_picture
from pipeline.probe import read_stream_info

_SIDE = 128
"""Pixels: large enough for every encoder here, small enough to cost nothing."""
_UNTAGGED = 2


def lost_tags(
    path: Path, container: str, settings: EncodeSettings, info: StreamInfo, target: Any
) -> list[str]:
    """A warning that names each tag of `info` that reads otherwise from such a file; or nothing.

    `container` is FFmpeg's muxer. A trial that cannot be written says nothing: the job itself will.
    Raises ConfigError for one that cannot be read back.
    """
    small = replace(info, width=min(info.width, _SIDE), height=min(info.height, _SIDE))
    try:
        written = _written(path, container, settings, small, target)
    except (av.FFmpegError, ValueError, RestoreError):
        return []
    try:
        back = _read(written, container, path)
    except av.FFmpegError as error:
        raise ConfigError(
            f"{path}: {settings.codec} in {path.suffix} cannot be read back ({error.strerror}); "
            "use another codec or container"
        ) from error
    except (ValueError, RestoreError):
        return []
    lost = _differing(small, back)
    if settings.codec in BT601_ALONE and "matrix" in lost:
        lost.remove("matrix")  # plan_format has said so, and what players will show
    if not lost:
        return []
    return [f"{settings.codec} in {path.suffix} does not keep: {', '.join(lost)}"]


def _written(
    path: Path, container: str, settings: EncodeSettings, info: StreamInfo, target: Any
) -> io.BytesIO:
    layout = info.pixel_format
    shapes = layout.plane_shapes(info.width, info.height)
    planes = tuple(np.full(shape, 1 << (layout.bit_depth - 1), layout.dtype) for shape in shapes)
    picture = to_picture(Frame(0, 0, planes), info, target)
    picture.pts, picture.time_base, picture.pict_type = 0, info.time_base, 0
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = add_video(output, path, replace(settings, threads=1), info, target)
        if container in MATROSKA:
            make_room(stream, info)
        output.mux([*stream.encode(picture), *stream.encode(None)])
    if container in MATROSKA:
        fill_room(buffer, info)
    buffer.seek(0)
    return buffer


def _read(file: io.BytesIO, container: str, path: Path) -> StreamInfo:
    again: Any = av.open(file, format=container)
    with again:
        stream = again.streams.video[0]
        return read_stream_info(again, stream, next(again.decode(stream)), path)


def _differing(info: StreamInfo, back: StreamInfo) -> list[str]:
    before, after = info.pixel_format, back.pixel_format
    same_kind = (before.matrix == "rgb") == (after.matrix == "rgb")
    gray = before.n_planes == 1
    lost = {
        # Of an untagged source it is what players guess, as they no longer do once one is written.
        "matrix": same_kind and not gray and before.matrix != "rgb"
        and (info.colorspace not in (_UNTAGGED, back.colorspace)
             or (back.colorspace != _UNTAGGED and before.matrix != after.matrix)),
        "range": same_kind and before.full_range != after.full_range,
        "primaries": info.color_primaries not in (_UNTAGGED, back.color_primaries),
        "transfer": info.color_trc not in (_UNTAGGED, back.color_trc),
        f"chroma site {before.chroma_location}":
        (before.log2_chroma_w, before.log2_chroma_h) == (after.log2_chroma_w, after.log2_chroma_h)
        and before.chroma_location != after.chroma_location,
        "mastering display": info.mastering_display is not None and back.mastering_display is None,
        "light level": info.content_light not in (None, back.content_light),
        "aspect": (info.sample_aspect_ratio or 1) != (back.sample_aspect_ratio or 1),
        "rotation, mirror": info.display_matrix != back.display_matrix,
    }  # fmt: skip
    return [name for name, is_lost in lost.items() if is_lost]

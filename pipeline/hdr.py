"""Owns HDR10's static metadata: read from a picture, given to the encoders that can write it.

The matrix, primaries and transfer (PQ, HLG) are plain colour tags and travel with those.
"""

import struct
from fractions import Fraction
from typing import Any

from av.sidedata.sidedata import Type

from pipeline.frames import MasteringDisplay, StreamInfo
from pipeline.side_data import side_data_of

# AVMasteringDisplayMetadata: ten rationals (red, green, blue and white as x, y, then the least and
# the greatest luminance) and two flags; AVContentLightMetadata: two numbers. PyAV 18 gives them as
# bytes alone (https://ffmpeg.org/doxygen/trunk/mastering__display__metadata_8h.html).
_MASTERING, _LIGHT = struct.Struct("=22i"), struct.Struct("=2I")
# FFmpeg hands this side data to encoders and muxers through fields of the codec context that PyAV
# 18 does not reach. These three take it as parameters of their own and write it into the stream.
_PARAMETERS = {"libx264": "x264-params", "libx265": "x265-params", "libsvtav1": "svtav1-params"}
_NAMES = {
    "libx264": ("mastering-display", "cll"),
    "libx265": ("master-display", "max-cll"),
    "libsvtav1": ("mastering-display", "content-light"),
}


def read_hdr(picture: Any) -> tuple[MasteringDisplay | None, tuple[int, int] | None]:
    """What a decoded picture says of its mastering display and of its content's light level."""
    found = side_data_of(picture)
    mastering = bytes(found.get(Type.MASTERING_DISPLAY_METADATA, b""))
    light = bytes(found.get(Type.CONTENT_LIGHT_LEVEL, b""))
    return (
        _mastering(mastering) if len(mastering) >= _MASTERING.size else None,
        _LIGHT.unpack_from(light) if len(light) >= _LIGHT.size else None,
    )


def _mastering(data: bytes) -> MasteringDisplay | None:
    *numbers, has_primaries, has_luminance = _MASTERING.unpack_from(data)
    if not (has_primaries and has_luminance and all(numbers[1::2])):
        return None
    values = [Fraction(n, d) for n, d in zip(numbers[::2], numbers[1::2], strict=True)]
    red, green, blue, white = zip(values[:8:2], values[1:8:2], strict=True)
    return MasteringDisplay((red, green, blue), white, values[8], values[9])


def hdr_parameters(codec: str, info: StreamInfo) -> tuple[str, str] | None:
    """The encoder's option that takes parameters, and those that carry HDR10; None if none does."""
    if codec not in _PARAMETERS:
        return None
    mastering_name, light_name = _NAMES[codec]
    parts = []
    if info.mastering_display is not None:
        parts.append(f"{mastering_name}={_display(codec, info.mastering_display)}")
    if info.content_light is not None:
        parts.append(f"{light_name}={info.content_light[0]},{info.content_light[1]}")
    return (_PARAMETERS[codec], ":".join(parts)) if parts else None


def _display(codec: str, display: MasteringDisplay) -> str:
    # SVT-AV1 takes the quantities themselves; the other two count as SEI does, in 0.00002 and in
    # 0.0001 cd/m².
    decimal = codec == "libsvtav1"

    def chroma(value: Fraction) -> str:
        return f"{float(value):.5f}" if decimal else str(round(value * 50000))

    def light(value: Fraction) -> str:
        return f"{float(value):.4f}" if decimal else str(round(value * 10000))

    red, green, blue = display.primaries
    places = {"G": green, "B": blue, "R": red, "WP": display.white_point}
    text = "".join(f"{name}({chroma(x)},{chroma(y)})" for name, (x, y) in places.items())
    return text + f"L({light(display.max_luminance)},{light(display.min_luminance)})"

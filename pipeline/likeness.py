"""Owns the comparison of what two videos say of their pictures: size, shape, colour, HDR10.

Knows no file and no pixel.
"""

from collections.abc import Iterator
from fractions import Fraction

from pipeline.frames import MasteringDisplay, StreamInfo

_UPRIGHT = (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
_ROUNDING = 5e-5  # of AV1's fixed point: 16 bits for colour, 8 to 18 for luminance


def compared(before: StreamInfo, after: StreamInfo) -> Iterator[tuple[str, object, object]]:
    """Each property by name, before and after; the two are equal where it was kept.

    Left out: what does not apply, and the pixel format, which an encoder may not take.
    """
    one, two = before.pixel_format, after.pixel_format
    for name in ("width", "height"):
        yield name, getattr(before, name), getattr(after, name)
    yield "rotation", _orientation(before), _orientation(after)
    # WebM says 1:1 where nothing was said.
    shapes = [info.sample_aspect_ratio or Fraction(1) for info in (before, after)]
    yield "sample aspect ratio", shapes[0], shapes[1]
    for name in ("color_primaries", "color_trc"):
        yield name.replace("_", " "), getattr(before, name), getattr(after, name)
    if (one.n_planes, one.matrix == "rgb") == (two.n_planes, two.matrix == "rgb"):
        # Untagged is read as a player reads it: the tag may appear, what it says may not change.
        yield "matrix", one.matrix, two.matrix
        yield "full range", one.full_range, two.full_range
        if (one.log2_chroma_w, one.log2_chroma_h) == (two.log2_chroma_w, two.log2_chroma_h):
            yield "chroma location", one.chroma_location, two.chroma_location
    yield from _hdr(before, after)


def _orientation(info: StreamInfo) -> str:
    """The display matrix in words; one that is no quarter turn or mirror in numbers."""
    matrix = info.display_matrix or _UPRIGHT
    a, b, _, c, d, *_ = matrix
    if {*map(abs, (a, b, c, d))} == {0, 1 << 16} and not any(matrix[i] for i in (2, 5, 6, 7)):
        return f"{info.rotation % 360} degrees" + (", mirrored" if a * d < b * c else "")
    return f"matrix {' '.join(map(str, matrix))}"


def _hdr(before: StreamInfo, after: StreamInfo) -> Iterator[tuple[str, object, object]]:
    one, two = (_display(info.mastering_display) for info in (before, after))
    if len(one) == len(two) and all(map(_is_near, one, two)):
        two = one
    if one or two:
        words = [" ".join(f"{value:g}" for value in display) or None for display in (one, two)]
        yield "mastering display", words[0], words[1]
    # 0 is for what is not known.
    lights = [
        info.content_light if any(info.content_light or ()) else None for info in (before, after)
    ]
    if any(lights):
        yield "content light level", lights[0], lights[1]


def _is_near(one: float, two: float) -> bool:
    return abs(one - two) <= _ROUNDING * max(1, one)


def _display(display: MasteringDisplay | None) -> list[float]:
    """Red, green, blue and white as x and y, the least and the greatest luminance."""
    if display is None:
        return []
    points = [*display.primaries, display.white_point]
    luminance = (display.min_luminance, display.max_luminance)
    return [float(value) for point in (*points, luminance) for value in point]

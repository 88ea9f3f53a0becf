"""Owns what FFmpeg's Matroska muxer is not told through PyAV: sample aspect ratio and HDR10.

PyAV 18 reaches neither `AVStream.sample_aspect_ratio` nor coded side data, and FFV1, VP9 and AV1 do
not say the first in their own stream. The muxer is made to leave room in the header, and once the
file is complete the elements are put there (RFC 9559). Nothing moves. Knows no codec.
"""

import struct
import zlib
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, BinaryIO

from pipeline.errors import IntegrityError
from pipeline.frames import StreamInfo

MATROSKA = ("matroska", "webm")
"""FFmpeg's muxers of the format."""

_ROOM = " " * 256
_HEAD = 12  # bytes that an element's identity and length may take
_SEGMENT, _CLUSTER, _TRACKS = b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75", b"\x16\x54\xae\x6b"
_CRC, _VOID, _TRACK, _NAME, _VIDEO = b"\xbf", b"\xec", b"\xae", b"\x53\x6e", b"\xe0"
_DISPLAY_WIDTH, _DISPLAY_HEIGHT, _DISPLAY_UNIT = b"\x54\xb0", b"\x54\xba", b"\x54\xb2"
_RATIO = 3  # a display unit: the two are a ratio and no pixels
_COLOUR, _MAX_CLL, _MAX_FALL, _MASTERING = b"\x55\xb0", b"\x55\xbc", b"\x55\xbd", b"\x55\xd0"
_FIRST_OF_MASTERING = 0x55D1  # red x, y, green, blue, white, then the greatest luminance, the least

_Elements = list[tuple[bytes, bytes]]


def make_room(stream: Any, info: StreamInfo) -> None:
    """Have the muxer leave room in the header for what `fill_room` will put there.

    `stream` is the output's video stream, tagged, before the header is written.
    """
    if _wanted(info):
        stream.metadata["title"] = stream.metadata.get("title", "") + _ROOM


def fill_room(file: BinaryIO, info: StreamInfo) -> None:
    """Say the aspect ratio and HDR10 of `info` in a complete file, open for reading and writing.

    Raises IntegrityError where there is no room.
    """
    if not _wanted(info):
        return
    for name, start, size in _top(file):
        if name == _TRACKS:
            file.seek(start)
            tracks = _filled(file.read(size), info)
            if tracks is not None and len(tracks) == size:
                file.seek(start)
                file.write(tracks)
                return
        if name == _CLUSTER:
            break
    raise IntegrityError("the header has no room for aspect ratio and HDR10; report this")


def _wanted(info: StreamInfo) -> bool:
    return (info.sample_aspect_ratio or 1) != 1 or bool(
        info.mastering_display or info.content_light
    )


def _top(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Identity, start and size of the content of each element in the segment."""
    at = 0
    while True:
        file.seek(at)
        head = file.read(_HEAD)
        if len(head) < _HEAD:
            return
        name, size, length = _head(head)
        if name == _SEGMENT:
            at += length
        else:
            yield name, at + length, size
            at += length + size


def _head(data: bytes) -> tuple[bytes, int, int]:
    """Identity of the element that `data` begins with, its size and the length of both."""
    # The number of zero bits that each begins with is its length, less one.
    width = 9 - data[0].bit_length()
    digits = 9 - data[width].bit_length()
    size = int.from_bytes(data[width : width + digits]) & ((1 << 7 * digits) - 1)
    return data[:width], size, width + digits


def _read(data: bytes) -> _Elements:
    return [(name, data[start:end]) for name, start, end in _places(data)]


def _places(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Identity of each element, and where its content lies."""
    at = 0
    while at < len(data):
        name, size, length = _head(data[at : at + _HEAD])
        yield name, at + length, at + length + size
        at += length + size


def _write(elements: _Elements) -> bytes:
    return b"".join(name + _size(len(data)) + data for name, data in elements)


def _size(value: int) -> bytes:
    width = next(w for w in range(1, 9) if value < (1 << 7 * w) - 1)
    return (value | 1 << 7 * width).to_bytes(width)


def _filled(tracks: bytes, info: StreamInfo) -> bytes | None:
    """The content of the tracks' element with that of the one that has room; None if none has."""
    for name, start, end in _places(tracks):
        entry = _read(tracks[start:end]) if name == _TRACK else []
        if dict(entry).get(_NAME, b"").endswith(_ROOM.encode()):
            tracks = tracks[:start] + _with_video(entry, end - start, info) + tracks[end:]
            if tracks.startswith(_CRC):
                at = len(_CRC) + 1
                crc = zlib.crc32(tracks[at + 4 :]).to_bytes(4, "little")
                tracks = tracks[:at] + crc + tracks[at + 4 :]
            return tracks
    return None


def _with_video(entry: _Elements, size: int, info: StreamInfo) -> bytes:
    changed = []
    for name, data in entry:
        if name == _NAME:
            data = data[: -len(_ROOM)]
        elif name == _VIDEO:
            data = _write(_told(_read(data), info))
        if data or name != _NAME:
            changed.append((name, data))
    written = _write(changed)
    left = size - len(written) - len(_VOID) - 8
    return written + _VOID + (left | 1 << 56).to_bytes(8) + bytes(left)


def _told(video: _Elements, info: StreamInfo) -> _Elements:
    """The elements of a track's picture with those of `info`."""
    if info.sample_aspect_ratio:
        sides = (_DISPLAY_WIDTH, _DISPLAY_HEIGHT, _DISPLAY_UNIT)
        video = [element for element in video if element[0] not in sides] + _shape(info)
    if info.mastering_display or info.content_light:
        colour = _read(dict(video).get(_COLOUR, b"")) + _hdr(info)
        video = [element for element in video if element[0] != _COLOUR]
        video.append((_COLOUR, _write(colour)))
    return video


def _shape(info: StreamInfo) -> _Elements:
    aspect = info.sample_aspect_ratio or Fraction(1)
    width = info.width * aspect
    if width.denominator == 1:
        return [(_DISPLAY_WIDTH, _number(int(width))), (_DISPLAY_HEIGHT, _number(info.height))]
    ratio = width / info.height
    return [
        (_DISPLAY_WIDTH, _number(ratio.numerator)), (_DISPLAY_HEIGHT, _number(ratio.denominator)),
        (_DISPLAY_UNIT, _number(_RATIO)),
    ]  # fmt: skip


def _hdr(info: StreamInfo) -> _Elements:
    elements = []
    if info.content_light is not None:
        names = (_MAX_CLL, _MAX_FALL)
        elements += [(n, _number(v)) for n, v in zip(names, info.content_light, strict=True)]
    if (display := info.mastering_display) is not None:
        points = [*display.primaries, display.white_point]
        values = [value for point in points for value in point]
        values += [display.max_luminance, display.min_luminance]
        inner = [
            ((_FIRST_OF_MASTERING + place).to_bytes(2), struct.pack(">d", float(value)))
            for place, value in enumerate(values)
        ]
        elements.append((_MASTERING, _write(inner)))
    return elements


def _number(value: int) -> bytes:
    return value.to_bytes(max(1, -(-value.bit_length() // 8)))

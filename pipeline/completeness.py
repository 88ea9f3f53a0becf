"""Owns what a file says of its own start, length and number of packets. Decodes nothing."""

import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

_MICROSECOND = Fraction(1, av.time_base)
_SEGMENT, _HEAD_BYTES = b"\x18\x53\x80\x67", 4096  # the element that is the file, and where


def exact(seconds: float) -> Fraction:
    """What was meant: 1.2 as a float is a little less than 1.2, whole microseconds are not."""
    return Fraction(round(seconds * av.time_base), av.time_base)


def file_start(container: Any) -> Fraction:
    """The time, in seconds, that a trim counts from."""
    start = Fraction(container.start_time or 0, av.time_base)
    # That is in microseconds: of those rounded up, a trim from 0 would lose the first frame.
    starts = (Fraction(s.start_time * s.time_base) for s in container.streams if s.start_time)
    start = min([start, *(t for t in starts if abs(t - start) < _MICROSECOND)])
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


def missing_bytes(path: Path, container: Any) -> int:
    """How many bytes at its end the file lacks by its own account; 0 where it gives none.

    The index of an mp4 and the header of a Matroska file tell before a frame is decoded; that of an
    AVI may be wrong.
    """
    size = path.stat().st_size
    name = container.format.name
    if "mp4" in name:
        ends = (e.pos + e.size for stream in container.streams for e in stream.index_entries)
        return max(max(ends, default=0) - size, 0)
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


def whole_until(path: Path, container: Any) -> Fraction:
    """Before which time, in seconds, an mp4 that lacks bytes at its end lacks no packet."""
    size = path.stat().st_size
    missing: Iterator[Fraction] = (
        entry.timestamp * Fraction(stream.time_base)  # when it is decoded: it is shown no earlier
        for stream in container.streams
        for entry in stream.index_entries
        if entry.pos + entry.size > size
    )
    return min(missing) - file_start(container)


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

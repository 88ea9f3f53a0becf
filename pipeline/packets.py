"""Owns what a file's packets are for a comparison: times, hashes and texts, in little memory.

Reads every packet of every stream but the restored one; keeps no packet.
"""

import hashlib
import re
from array import array
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from pipeline.containers import codec_of, kind_of
from pipeline.errors import SourceError
from pipeline.opening import cause_of, every_packet, is_cut_out

DIGEST = 16
_EMPTY_TEXT = b"\0\0"  # mp4 keeps these between two subtitles


@dataclass(frozen=True, slots=True)
class Times:
    """Ticks, their unit, and which time of theirs counts as 0."""

    ticks: "array[int]"
    unit: Fraction
    origin: Fraction = Fraction(0)

    def seconds(self, number: int) -> Fraction:
        return self.ticks[number] * self.unit - self.origin


@dataclass(slots=True)
class Packets:
    """All packets of one stream: times, durations, a hash of each and one of all bytes."""

    unit: Fraction
    origin: Fraction = Fraction(0)
    times: "array[int]" = field(default_factory=lambda: array("q"))
    durations: "array[int]" = field(default_factory=lambda: array("q"))
    digests: bytearray = field(default_factory=bytearray)
    """Of each packet the first DIGEST bytes of its SHA-256, one after the other."""
    texts: list[str] = field(default_factory=list)
    whole: Any = field(default_factory=hashlib.sha256)
    start: int | None = None
    """The first time that is played: an edit list skips what lies before."""

    def __len__(self) -> int:
        return len(self.times)

    def digest(self, number: int) -> bytes:
        """The hash of one packet."""
        return bytes(self.digests[number * DIGEST : (number + 1) * DIGEST])

    @property
    def starts(self) -> Times:
        """When each begins."""
        return Times(self.times, self.unit, self.origin)

    @property
    def ends(self) -> Times:
        """When each ends."""
        ends = array("q", map(sum, zip(self.times, self.durations, strict=True)))
        return Times(ends, self.unit, self.origin)

    @property
    def span(self) -> tuple[Fraction, Fraction]:
        """Start and end in seconds."""
        if not self.times:
            return Fraction(0), Fraction(0)
        end = max(self.ends.ticks)
        start = min(self.times) if self.start is None else self.start
        return start * self.unit - self.origin, end * self.unit - self.origin


class Streams:
    """The streams of one file but its restored one, by kind in their order, and their packets.

    `origin` is the time that counts as 0. Raises SourceError where the file breaks off.
    """

    def __init__(
        self, path: Path, container: Any, video_index: int, origin: Fraction = Fraction(0)
    ) -> None:
        streams = [s for s in container.streams if s.index != video_index]
        self.by_index = {s.index: s for s in streams}
        self.packets = {s.index: Packets(Fraction(s.time_base or 1), origin) for s in streams}
        read = [s for s in streams if s.type != "attachment"]
        heard: set[int] = set()
        try:
            for packet in every_packet(container, read) if read else ():
                if packet.size and not is_cut_out(packet, heard):
                    _add(self.packets[packet.stream.index], packet)
        except av.FFmpegError as error:
            raise SourceError(
                f"{path}: reading its streams stops ({cause_of(error)}); get a complete copy"
            ) from error

    def holds(self, index: int | None) -> bool:
        """Whether a stream has any packet."""
        return index in self.packets and bool(self.packets[index].times)

    def of_kind(self, kind: str) -> list[Any]:
        """The streams of one kind."""
        return [s for s in self.by_index.values() if kind_of(s) == kind]


def _add(packets: Packets, packet: Any) -> None:
    data = bytes(packet)
    stream = packet.stream
    if stream.type == "subtitle":
        if data == _EMPTY_TEXT:
            return
        if stream.codec_context is not None and stream.codec_context.codec.text_sub:
            packets.texts.append(_text_of(packet))
    elif codec_of(stream) == "aac" and not stream.codec_context.extradata:
        data = _without_adts(data)
    pts = packet.pts if packet.pts is not None else packet.dts or 0
    if packets.start is None and not packet.is_discard:
        packets.start = pts
    packets.times.append(pts)
    packets.durations.append(packet.duration or 0)
    packets.digests += hashlib.sha256(data).digest()[:DIGEST]
    packets.whole.update(data)


def _without_adts(data: bytes) -> bytes:
    # MPEG-TS gives each AAC packet a header; other containers keep it once for the stream.
    if len(data) > 7 and data[0] == 0xFF and data[1] & 0xF6 == 0xF0:
        return data[7 if data[1] & 1 else 9 :]
    return data


def _text_of(packet: Any) -> str:
    try:
        shown = packet.stream.codec_context.decode2(packet)
    except av.FFmpegError:
        return ""
    lines = [rect.dialogue.decode(errors="replace") for rect in shown or ()]
    return re.sub(r"{[^}]*}", "", "\n".join(lines)).replace("\\N", "\n").strip()

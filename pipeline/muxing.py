"""Owns what a muxer is given of the copied streams, so that no packet of a damaged source ends a
job's join: times that step back are moved on, what the muxer refuses is left out, both are said."""

import math
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av

_TS_NONSTRICT = 0x20000
"""AVFMT_TS_NONSTRICT: the muxer takes two packets of one time (libavformat/avformat.h)."""
MOST_REFUSED_IN_ROW = 100
"""Of one stream; one more is no damage, and ends the job."""


class Muxing:
    """Packets on their way into `output`, whose streams they have.

    FFmpeg refuses a packet that lies before the one before it, or where the muxer is strict at its
    time, but for text and data (compute_muxer_pkt_fields in libavformat/mux.c). Captures with lost
    packets have such sound, and files whose tracks are joined of several. And it refuses one that
    the container's form of the codec cannot be made of, as AAC with a damaged ADTS header
    (libavcodec/bsf/aac_adtstoasc.c); the next one is welcome.
    """

    def __init__(self, output: Any) -> None:
        self._output = output
        self._strict = not output.format.flags & _TS_NONSTRICT
        self._last: dict[int, int] = {}
        self._in_row: Counter[str] = Counter()
        self._n_moved: Counter[str] = Counter()
        self._n_refused: Counter[str] = Counter()

    def mux(self, packet: Any) -> None:
        """Raises av.FFmpegError where the disk does, or the muxer refuses all that comes."""
        name = f"{packet.stream.type} stream {packet.stream.index}"
        self._move_on(packet, name)
        try:
            self._output.mux(packet)
        except (av.error.InvalidDataError, av.error.ArgumentError, av.error.PatchWelcomeError):
            self._in_row[name] += 1
            self._n_refused[name] += 1
            if self._in_row[name] > MOST_REFUSED_IN_ROW:
                raise
        else:
            self._in_row[name] = 0

    def warnings(self) -> Iterator[str]:
        """A line for what was changed of each stream of the output."""
        for name, n in self._n_moved.items():
            yield f"{name}: {n} packets lay before the one before them and are moved on"
        for name, n in self._n_refused.items():
            yield f"{name}: {n} damaged packets are left out"

    def _move_on(self, packet: Any, name: str) -> None:
        if packet.dts is None:
            return
        stream, base = packet.stream, Fraction(packet.time_base)
        dts = _nearest(packet.dts * base / stream.time_base)
        least = self._last.get(stream.index)
        apart = self._strict and stream.type in ("audio", "video")
        if least is not None and dts < least + apart:
            dts = least + apart
            pts = dts if packet.pts is None else _nearest(packet.pts * base / stream.time_base)
            packet.duration = _nearest((packet.duration or 0) * base / stream.time_base)
            packet.pts, packet.dts = max(pts, dts), dts
            packet.time_base = stream.time_base
            self._n_moved[name] += 1
        self._last[stream.index] = dts


def _nearest(ticks: Fraction) -> int:
    """As av_rescale_q rounds: halves away from zero."""
    return math.floor(ticks + Fraction(1, 2)) if ticks >= 0 else -math.floor(Fraction(1, 2) - ticks)

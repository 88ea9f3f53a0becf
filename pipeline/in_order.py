"""Owns the order of a muxer's packets: times that step back in a source would end a job's join."""

import math
from collections import Counter
from fractions import Fraction
from typing import Any

_TS_NONSTRICT = 0x20000
"""AVFMT_TS_NONSTRICT: the muxer takes two packets of one time (libavformat/avformat.h)."""


class InOrder:
    """Packets on their way into `output`, each stream's moved on where it would go back.

    FFmpeg refuses a packet that lies before the one before it, or where the muxer is strict at its
    time, but for text and data (compute_muxer_pkt_fields in libavformat/mux.c). Captures with lost
    packets have such sound, and files whose tracks are joined of several.
    """

    def __init__(self, output: Any) -> None:
        self._strict = not output.format.flags & _TS_NONSTRICT
        self._last: dict[int, int] = {}
        self.n_moved: Counter[str] = Counter()
        """Of each stream of the output, by its kind and number."""

    def moved_on(self, packet: Any) -> Any:
        """The packet, whose stream is the output's, at a time that the muxer takes."""
        if packet.dts is None:
            return packet
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
            self.n_moved[f"{stream.type} stream {stream.index}"] += 1
        self._last[stream.index] = dts
        return packet


def _nearest(ticks: Fraction) -> int:
    """As av_rescale_q rounds: halves away from zero."""
    return math.floor(ticks + Fraction(1, 2)) if ticks >= 0 else -math.floor(Fraction(1, 2) - ticks)

"""Owns the packets of a file's video stream: read in coded order, counted, missed where they lack.

Decodes nothing and knows no frame but by its times.
"""

import math
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from pipeline.completeness import declared_end, declared_packets, file_start
from pipeline.errors import SourceError
from pipeline.irregular import Tally
from pipeline.opening import cause_of, every_packet, pick_video_stream

MIN_MISSING_SECONDS = Fraction(1)
"""A stream that ends so much before its declared duration counts as truncated."""
# Codecs whose packets may hold a picture that is never shown.
_HIDDEN = {"vp8", "libvpx", "vp9", "libvpx-vp9", "av1", "libdav1d", "mpeg4", "vc1", "wmv3", "vvc"}


class FilePackets:
    """The packets of a container's video stream, then empty ones that drain a decoder.

    Counted in `tally`. `shown_at` holds, in AVI alone, the times of the packets not yet decoded: a
    packet is a frame there, and the n-th picture shown belongs to the n-th place in the file.
    """

    def __init__(
        self, path: Path, container: Any, tally: Tally, end_pts: int | None = None
    ) -> None:
        self.path, self.container, self.tally = path, container, tally
        self._end_pts = end_pts
        self.stream = pick_video_stream(container, path)
        self.container_name = str(container.format.name)
        self._time_base, self._start = Fraction(self.stream.time_base), file_start(container)
        self.shown_at: deque[int] = deque()
        self.end_seen = 0
        """The latest end of a packet, in the stream's time_base."""
        self.whole_until = 0
        """Every frame before this was read: what follows in coded order is not shown earlier."""
        self._n_empty = 0
        self._last_is_corrupt = False

    def __iter__(self) -> Iterator[Any]:
        """Raises SourceError where reading breaks off."""

        def late() -> None:
            self.tally.unkept.add("a stream that begins within the file")

        try:
            for packet in every_packet(self.container, self.stream, late):
                if packet.size:
                    self._count(packet)
                    yield packet
                else:
                    self._n_empty += packet.dts is not None  # a gap; the last one ends the stream
        except av.FFmpegError as error:
            raise SourceError(
                f"{self.path}: reading stops after {self.tally.n_demuxed} packets "
                f"({cause_of(error)}); the file is damaged or truncated, get a complete copy"
            ) from error
        # A decoder that fails while it drains still holds pictures: ask again, until its EOFError.
        while True:
            yield av.Packet()

    def _count(self, packet: Any) -> None:
        tally = self.tally
        tally.progress.made()
        tally.n_demuxed += 1
        tally.n_corrupt += packet.is_corrupt and not is_after(packet, self._end_pts)
        tally.n_skipped += packet.is_discard
        self._last_is_corrupt = packet.is_corrupt
        if self.container_name == "avi" and packet.dts is not None:
            self.shown_at.append(packet.dts)
            # FFmpeg passes over an empty chunk, which stands for the frame before it.
            self._n_empty = packet.dts + 1 - tally.n_demuxed
        decoded_at = packet.dts if packet.dts is not None else packet.pts
        if decoded_at is not None and not packet.is_corrupt:
            self.whole_until = decoded_at + (packet.duration or 0)
        if packet.pts is not None:
            self.end_seen = max(self.end_seen, packet.pts + (packet.duration or 0))

    def check_complete(self, interval: Fraction, end_pts: int | None, *, from_start: bool) -> None:
        """Raises SourceError where the container says that more should have come.

        `interval` is the last frame's, in seconds; up to `end_pts` was asked for, all if it is
        None. `from_start`: all packets from the first one on were read.
        """
        if self.has_reached(end_pts):
            return
        is_mp4 = "mp4" in self.container_name
        expected = declared_packets(self.container, self.stream) if from_start else 0
        if expected:
            # The index of an mp4 is exact; other containers merely hint.
            missing = expected - self.tally.n_demuxed - self._n_empty
            if missing > (0 if is_mp4 else 2 + expected // 20):
                raise self.truncated(f"{expected - missing} of {expected} frames")
        n_frames = self.tally.n_decoded
        if is_mp4 and self._last_is_corrupt:
            raise self.truncated(f"frame {n_frames}, the last one is incomplete")
        end = declared_end(self.stream)
        if end is None:
            return
        if end_pts is not None:
            end = min(end, end_pts * self.stream.time_base)
        # The muxer took the same maximum over the packets, be their durations right or wrong.
        lacking = end - self.end_seen * Fraction(self.stream.time_base)
        if lacking > max(MIN_MISSING_SECONDS, 2 * interval):
            raise self.truncated(f"{n_frames} frames, {float(lacking):.1f} s early")

    def has_reached(self, end_pts: int | None) -> bool:
        """Whether every frame before that end was read."""
        return end_pts is not None and self.whole_until >= end_pts

    def truncated(self, after: str) -> SourceError:
        """The error for a file that ends `after` that, with what of it was read."""
        there = self.whole_until * self._time_base - self._start
        return truncated(self.path, after, there)

    def count_missing(self) -> None:
        """Add to `n_corrupt` the packets that gave no picture and no error either, all being read.

        A decoder with frame threads that fails while it drains: PyAV gives the pictures before the
        error without it, and what FFmpeg still holds is out of reach after that.
        """
        # In AVI every packet is a frame, and what a hidden one does not show is missing.
        hidden = self.stream.codec_context.name in _HIDDEN and self.container_name != "avi"
        tally = self.tally
        if not hidden and not tally.n_interlaced:
            given = tally.n_corrupt + tally.n_decoded + tally.n_skipped
            tally.n_corrupt += max(tally.n_demuxed - given, 0)


def is_after(packet: Any, end_pts: int | None) -> bool:
    """Whether no frame before `end_pts` is in it."""
    return bool(end_pts is not None and packet.dts is not None and packet.dts >= end_pts)


def truncated(path: Path, after: str, there: Fraction | None = None) -> SourceError:
    """For a file that ends `after` that, too early by its own account; `there` are the seconds of
    it that could be restored, if that is known."""
    rest = (
        f", or restore what is there with --to {math.floor(there * 1000) / 1000}" if there else ""
    )
    return SourceError(
        f"{path}: ends after {after}; the file is truncated, get a complete copy{rest}"
    )
